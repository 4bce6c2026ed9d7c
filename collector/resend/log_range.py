"""A stretch of a collector's log, its own or a copy of another's, as batches to be sent again.

Each batch comes once, in the order of its arrival, under the identity it was born with: what was accepted, what was parked
(not again where it was released), and what was rejected, whose place in its stream is used up, too. What was
refused is no part of a stream, and stays where it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from collector.handoff.log import Damage, Kind, Record, scan, segments
from collector.resend.batches import Source, unreadable
from collector.resend.files import of_identity
from wire.identity import BatchId
from wire.log import segment_path

_BROUGHT = frozenset((Kind.ACCEPTED, Kind.PARKED, Kind.REJECTED))


class Extent(NamedTuple):
    """Offsets of what a log has now."""

    begin: int
    """Not 0 where the log has been pruned."""
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def extent_of(directory: Path) -> Extent:
    bases = segments(directory)
    if not bases:
        return Extent(0, 0)
    return Extent(bases[0], bases[-1] + segment_path(directory, bases[-1]).stat().st_size)


def begins_at_unix_ns(directory: Path) -> int | None:
    """When the first batch that the log still has came in; None: it has none."""
    records = (record for record in scan(directory) if isinstance(record, Record))
    first = next(records, None)
    return None if first is None else first.received_at_unix_ns


def log_batches(directory: Path, extent: Extent) -> Source:
    """Every batch of it, and every damaged place."""
    for record in scan(directory, extent.begin, extent.end):
        if isinstance(record, Damage):
            read = record.offset - extent.begin
            yield unreadable(f"{directory}: {record.place}", read, "damaged; see `log verify`")
            continue
        if record.kind not in _BROUGHT:
            continue
        place = f"{directory} at offset {record.offset}"
        identity = BatchId(record.agent_id, record.epoch, record.seq)
        yield of_identity(place, record.end - extent.begin, identity, record.body)
