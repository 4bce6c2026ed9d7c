"""What the ledger knows of its streams: which sequence numbers are booked, when they lie, what is held back. Pure.

The order of a stream, on which every bound here rests (usage.proto, "Time"): with rising `seq`, the interval stays
*the same* or moves on; it never goes back. It stays the same because an agent writes one batch for each tenant,
and more for a large one, over every interval. So the batch that follows one over [s, e) may begin at s again, and
what is contiguous up to that batch is complete up to s, not up to e.

Across epochs there is no such order: after a clock was set back, or an old copy of the spool was restored, a newer
epoch begins before the older one's end.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

UNKNOWN_START_UNIX_NS = 0
"""Nothing says when it began."""
ENDLESS_UNIX_NS = 2**64 - 1
"""Nothing says when it ended."""


class Span(NamedTuple):
    """Sequence numbers of one stream, both ends included."""

    agent_id: str
    epoch: int
    first_seq: int
    last_seq: int


class Run(NamedTuple):
    """Booked sequence numbers without a hole, as many as there are, both ends included; and the bounds of its first
    and of its last interval. For the ledger's table they are, over the batches of the run: min(start), min(end),
    max(start), max(end).
    """

    first_seq: int
    last_seq: int
    start_unix_ns: int
    first_end_unix_ns: int
    last_start_unix_ns: int
    end_unix_ns: int


class Stream(NamedTuple):
    """One life of an agent's spool. Runs ascend, and there is a hole between each and the next."""

    agent_id: str
    epoch: int
    runs: tuple[Run, ...]


class HeldKind(StrEnum):
    """Why something that arrived is not booked."""

    PARKED = "parked"
    """Over its tenant's rate; booked once it is released."""
    REJECTED = "rejected"
    """Invalid as it is; booked only if somebody lets it in."""
    CONFLICT = "conflict"
    """Other bytes arrived under an identity that is taken."""


class Held(NamedTuple):
    """One identity that arrived and is not booked. Bounds are None where the bytes could not be read."""

    kind: HeldKind
    agent_id: str
    epoch: int
    seq: int
    tenant: str
    start_unix_ns: int | None
    end_unix_ns: int | None
    reason: str
