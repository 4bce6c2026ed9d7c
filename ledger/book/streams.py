"""Which batches are in the books: per stream the runs of its sequence numbers, and the times they lie in. Pure.

Derived from the table at start and kept up with what is booked, so that no look at what is complete reads the table: its
cost is that of the streams, not of all that was ever booked. The table's key is what keeps a batch from being there twice.
Memory: six numbers a run. A stream without holes is one run, however long.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from wire.identity import AgentId


class StreamId(NamedTuple):
    agent_id: AgentId
    epoch: int


class BookedRun(NamedTuple):
    """Consecutive numbers, both ends included, and over their batches min(start), min(end), max(start), max(end) in Unix
    ns."""

    first: int
    last: int
    start_ns: int
    first_end_ns: int
    last_start_ns: int
    end_ns: int


class Runs:
    """Disjoint runs of whole numbers, ascending, none touching the next."""

    __slots__ = ("_firsts", "_runs")

    def __init__(self, runs: Iterable[BookedRun] = ()) -> None:
        self._runs = list(runs)
        self._firsts = [run.first for run in self._runs]
        assert all(run.first <= run.last for run in self._runs)
        assert all(a.last + 1 < b.first for a, b in pairwise(self._runs))

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._firsts, number) - 1
        return at >= 0 and number <= self._runs[at].last

    def __iter__(self) -> Iterator[BookedRun]:
        return iter(self._runs)

    def __len__(self) -> int:
        """How many runs."""
        return len(self._runs)

    def add(self, number: int, start_ns: int, end_ns: int) -> None:
        """One batch over [start_ns, end_ns). One that is there changes nothing."""
        runs, firsts = self._runs, self._firsts
        at = bisect_right(firsts, number)
        before = runs[at - 1] if at else None
        if before is not None and number <= before.last:
            return
        new = BookedRun(number, number, start_ns, end_ns, start_ns, end_ns)
        behind = runs[at] if at < len(runs) else None
        low, high = at, at
        if before is not None and before.last + 1 == number:
            new, low = _joined(before, new), at - 1
        if behind is not None and behind.first == number + 1:
            new, high = _joined(new, behind), at + 1
        if low + 1 == high:  # By far the most: a stream goes on.
            runs[low], firsts[low] = new, new.first
        else:
            runs[low:high], firsts[low:high] = [new], [new.first]

    @property
    def missing(self) -> int:
        """Numbers from 1 to the last run that are in none."""
        held = sum(run.last - run.first + 1 for run in self._runs)
        return (self._runs[-1].last if self._runs else 0) - held


def _joined(low: BookedRun, high: BookedRun) -> BookedRun:
    return BookedRun(
        low.first,
        high.last,
        min(low.start_ns, high.start_ns),
        min(low.first_end_ns, high.first_end_ns),
        max(low.last_start_ns, high.last_start_ns),
        max(low.end_ns, high.end_ns),
    )


class Streams:
    """All streams."""

    def __init__(self, runs: Iterable[tuple[StreamId, Iterable[BookedRun]]] = ()) -> None:
        self._runs = {stream: Runs(found) for stream, found in runs}

    def booked(self, stream: StreamId, seq: int) -> bool:
        runs = self._runs.get(stream)
        return runs is not None and seq in runs

    def add(self, stream: StreamId, seq: int, start_ns: int, end_ns: int) -> None:
        runs = self._runs.get(stream)
        if runs is None:
            runs = self._runs[stream] = Runs()
        runs.add(seq, start_ns, end_ns)

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[tuple[StreamId, Runs]]:
        return iter(self._runs.items())

    @property
    def agents(self) -> int:
        return len({stream.agent_id for stream in self._runs})

    @property
    def missing(self) -> int:
        """Batches before some booked one of their stream that are not booked."""
        return sum(runs.missing for runs in self._runs.values())
