"""What comes in, and what a source of it can do."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple, Protocol

from wire.identity import AgentId

NOBODY = AgentId("00000000-0000-0000-0000-000000000000")
"""The agent of what is no batch."""
MAX_REASON_CHARACTERS = 1_024


class Kind(Enum):
    BOOKABLE = auto()
    """To be booked, each identity once."""
    PARKED = auto()
    """Durable, and waiting in its tenant's queue; comes again as BOOKABLE when it is released."""
    REJECTED = auto()
    """Invalid for ever; its identity is used up."""
    REFUSED = auto()
    """Evidence only: the identity it names stays as it was."""
    ADOPTED = auto()
    """No batch, and of the log only: the stream goes on at `seq`; what came before was answered elsewhere or never
    sent."""


class Arrival(NamedTuple):
    """One record, as a collector took it in."""

    kind: Kind
    received_at_unix_ns: int
    agent_id: AgentId
    epoch: int
    seq: int
    digest: bytes
    """SHA-256 of `body`, always."""
    reason: str
    """Of what was rejected or refused: "REASON_NAME detail", bounded, as it was written; not fit for a terminal."""
    body: bytes
    """The UsageBatch; of what was refused, any bytes."""


class Source(Protocol):
    """Of one thread. What it cannot get over by itself is a LedgerError with the fix; `read` may be tried again."""

    @property
    def places(self) -> tuple[str, ...]:
        """What is read, by name."""
        ...

    @property
    def trouble(self) -> str:
        """Why nothing comes at present, with the fix; empty if all is well. It passes by itself."""
        ...

    @property
    def lost(self) -> dict[str, tuple[int, int]]:
        """Place -> positions [from, to) that were deleted before they were read. Whoever has written an entry down
        takes it out."""
        ...

    def read(self, most_bytes: int, wait_seconds: float) -> list[Arrival]:
        """What came next: about `most_bytes`, but one at least if there is one; [] when nothing came in time."""
        ...

    def positions(self) -> dict[str, int]:
        """Place -> offset behind what `read` has returned so far: what to go on from after a restart."""
        ...

    def lag(self) -> int:
        """Bytes (log) or records (Kafka) that are not read yet, as far as known."""
        ...

    def close(self) -> None: ...


def bounded_reason(said: bytes) -> str:
    return said[: 4 * MAX_REASON_CHARACTERS].decode(errors="replace")[:MAX_REASON_CHARACTERS]
