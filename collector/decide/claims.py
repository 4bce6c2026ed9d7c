"""Who of several collectors publishes a batch, and what a copy in the topic may say of itself. Pure.

A batch is *claimed* in Redis before it is logged, and *marked* delivered before it is acknowledged. The script that
judges claims is `state/redis_streams.py`; here is what a collector makes of its verdicts.

Invariants, whatever dies, stands still or forgets. What is answered DUPLICATE is in the topic. Of the copies of one
batch in the topic at most one is without the header `dedup=unverified`: a copy is published without it only under a
claim that was granted as the first one ever, and by a collector that has not handed it to a producer before.

Time. A claim is a lease. What is handed to the producer at `t` leaves it at `t + delivery_timeout` at the latest, so a
claim is used for SPARE_SECONDS, then renewed before it is used; it holds for SPARE_SECONDS more than both, for clocks
that run unevenly and bytes that are under way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum, IntEnum
from typing import NamedTuple, Protocol

from wire.identity import DIGEST_BYTES, AgentId

SPARE_SECONDS = 5.0
MAX_SHARED_SEQ = 1 << 53
"""Redis counts in doubles; a batch numbered above is never known there."""

_ITEM = struct.Struct(">Q32s")


class StreamId(NamedTuple):
    agent_id: AgentId
    epoch: int


Numbered = tuple[int, bytes]
"""A batch of a stream: (seq, digest)."""
Batches = Mapping[StreamId, Sequence[Numbered]]


class Verdict(IntEnum):
    """On one claim; the numbers are the script's."""

    GRANTED = 0
    """Nobody has claimed it before."""
    UNVERIFIED = 1
    """Granted, but it may be in the topic already: another collector's claim ran out, or Redis has forgotten."""
    HELD = 2
    """Another collector is publishing it."""
    DELIVERED = 3
    """It is in a topic."""
    CONFLICT = 4
    """This identity is claimed or delivered with another digest."""
    AWAY = 5
    """Redis did not answer."""


class Claimed(NamedTuple):
    """The answer to one claim."""

    verdict: Verdict
    retry_after_ms: int = 0
    """Of HELD: until the other's claim runs out."""
    known: bytes = b""
    """Of CONFLICT: the first bytes of the other digest."""


AWAY = Claimed(Verdict.AWAY)
_SAYS_ALL = {
    ord(str(int(verdict))): Claimed(verdict)
    for verdict in (Verdict.GRANTED, Verdict.UNVERIFIED, Verdict.DELIVERED)
}
"""By the script's digit: answers that have nothing to add, made once."""
_HELD = ord(str(int(Verdict.HELD)))


class Ledger(Protocol):
    """What all collectors know in common, for a thread that may wait."""

    def claim_and_wait(self, batches: Batches) -> Mapping[tuple[StreamId, int], Claimed]:
        """Answers by (stream, seq); what is not in it is AWAY."""

    def mark_and_wait(self, batches: Batches) -> None:
        """These are delivered. While Redis is away they are kept and told later."""


class Fate(Enum):
    """What the publisher does with a record."""

    PUBLISH = "publish"
    UNVERIFIED = "unverified"
    """Publish, with the header."""
    SKIP = "skip"
    WAIT = "wait"
    REFUSE = "refuse"
    """To the rejected ones: it is taken in here, and another collector has delivered another batch of its name."""


class Standing(NamedTuple):
    """What the publisher knows of a record before it asks anybody."""

    shared: bool
    """It was the first word on its identity, so other collectors may have the same; else it is this one's alone."""
    handed_over: bool
    """It may have been given to a producer before."""
    flagged: bool
    """It was taken in unverified."""
    claimed_before_ns: int
    """At most so long ago it was claimed; wall clock, so it may be negative."""

    @property
    def must_claim(self) -> bool:
        """Whether the claim it was taken in with is not good enough any more."""
        fresh = 0 <= self.claimed_before_ns <= SPARE_SECONDS * 1e9
        return self.shared and (self.handed_over or self.flagged or not fresh)

    def fate(self, claimed: Claimed | None) -> Fate:
        """`claimed`: the answer, where `must_claim` asked for one."""
        verdict = Verdict.GRANTED if claimed is None else claimed.verdict
        if verdict is Verdict.DELIVERED:
            return Fate.SKIP
        if verdict is Verdict.HELD:
            return Fate.WAIT
        if verdict is Verdict.CONFLICT:
            return Fate.REFUSE
        doubtful = self.handed_over or self.flagged or verdict is not Verdict.GRANTED
        return Fate.UNVERIFIED if doubtful else Fate.PUBLISH


def lease_ms(delivery_timeout_seconds: float) -> int:
    """How long a claim holds."""
    return round((delivery_timeout_seconds + 2 * SPARE_SECONDS) * 1_000)


def pack(batches: Iterable[Numbered]) -> bytes:
    """As the script takes them."""
    return b"".join(_ITEM.pack(seq, digest) for seq, digest in batches)


def unpack(packed: bytes) -> Iterator[Numbered]:
    yield from _ITEM.iter_unpack(packed)


assert _ITEM.size == 8 + DIGEST_BYTES


def read_reply(batches: Sequence[Numbered], reply: Sequence[bytes | int]) -> list[Claimed]:
    """The script's answer to a claim: a digit for each batch, the longest wait, then what is known of each conflict."""
    verdicts, wait_ms, *known = reply
    assert isinstance(verdicts, bytes)
    assert len(verdicts) == len(batches)
    others = iter(known)
    answers = []
    for digit in verdicts:
        claimed = _SAYS_ALL.get(digit)
        if claimed is None and digit == _HELD:
            claimed = Claimed(Verdict.HELD, retry_after_ms=int(wait_ms))
        elif claimed is None:
            other = next(others)
            assert isinstance(other, bytes)
            claimed = Claimed(Verdict.CONFLICT, known=other)
        answers.append(claimed)
    return answers
