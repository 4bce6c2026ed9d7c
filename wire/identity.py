"""Names that travel: agents, batches, and the digest that pins a batch's bytes."""

from __future__ import annotations

import hashlib
import re
import uuid
from typing import NamedTuple, NewType

AgentId = NewType("AgentId", str)
"""A lower-case UUID with dashes; the last path segment of the agent's SPIFFE id."""

UNATTRIBUTED = "unattributed"
"""The tenant of usage that nobody owns yet; `owners.host` and `owners.default` unless they are set."""

DIGEST_BYTES = 32
_PIECE_BYTES = 31 * 64
"""Whole SHA-256 blocks, below hashlib's HASHLIB_GIL_MINSIZE."""

_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_AGENT = re.compile(_UUID)
_SPIFFE = re.compile(rf"spiffe://([a-z0-9._-]{{1,255}})/agent/({_UUID})")


class BatchId(NamedTuple):
    """Identity of a batch, assigned before its first send. `seq` counts from 1 within (agent_id, epoch)."""

    agent_id: AgentId
    epoch: int
    seq: int


def digest(batch: bytes) -> bytes:
    """SHA-256 of a serialised UsageBatch: 32 bytes.

    Fed in pieces: from 2048 bytes on hashlib gives the GIL up, and to hand it over and back costs several times
    what hashing a batch does (measured: a quarter of the collector's time).
    """
    if len(batch) <= _PIECE_BYTES:
        return hashlib.sha256(batch).digest()
    hasher = hashlib.sha256()
    view = memoryview(batch)
    for at in range(0, len(batch), _PIECE_BYTES):
        hasher.update(view[at : at + _PIECE_BYTES])
    return hasher.digest()


def new_agent_id() -> AgentId:
    return AgentId(str(uuid.uuid4()))


def is_agent_id(text: str) -> bool:
    """Whether it is one, to the letter: what holds may stand in SQL, a path or a URI."""
    return _AGENT.fullmatch(text) is not None


def spiffe_uri(trust_domain: str, agent_id: AgentId) -> str:
    """The URI SAN of an agent's certificate (SPIFFE-ID, section 2)."""
    return f"spiffe://{trust_domain}/agent/{agent_id}"


def agent_of_spiffe(uri: str, trust_domain: str) -> AgentId | None:
    """The agent a URI SAN names, or None if it is not an agent of this trust domain."""
    match = _SPIFFE.fullmatch(uri)
    if match is None or match[1] != trust_domain:
        return None
    return AgentId(match[2])
