"""A stretch of a collector's log, its own or a copy of another's, as batches to be sent again.

Each batch comes once, in the order of its arrival, under the identity it was born with: what was accepted, what was parked
(not again where it was released), and what was rejected, whose place in its stream is used up, too. What was
refused is no part of a stream, and stays where it is.
"""

from __future__ import annotations

from pathlib import Path

from collector.handoff.log import Damage, Kind, scan, segments
from collector.resend.batches import Source, unreadable
from collector.resend.files import of_identity
from wire.identity import BatchId

_BROUGHT = frozenset((Kind.ACCEPTED, Kind.PARKED, Kind.REJECTED))


def log_end(directory: Path) -> int:
    """Offset behind what the log has now."""
    bases = segments(directory)
    return bases[-1] + (directory / f"{bases[-1]:020d}.log").stat().st_size if bases else 0


def log_batches(directory: Path, end: int) -> Source:
    """Every batch before offset `end`, and every damaged place."""
    for record in scan(directory, 0, end):
        if isinstance(record, Damage):
            yield unreadable(f"{directory}: {record.place}", record.offset, "damaged; see `log verify`")
            continue
        if record.kind not in _BROUGHT:
            continue
        place = f"{directory} at offset {record.offset}"
        identity = BatchId(record.agent_id, record.epoch, record.seq)
        yield of_identity(place, record.end, identity, record.body)
