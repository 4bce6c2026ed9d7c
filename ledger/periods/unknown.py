"""What is not booked, and where it may lie: the one thing that both blockers and watermarks are read off. Pure.

For each agent: the holes of every epoch, what is held back, and what its newest epoch has not said yet (its tail).
The unknown tail of an older epoch is none of them: the openings of the newer epoch tell what it held, and the
difference is booked as recovered.

A batch that is not booked lies between its neighbours in the stream, those whose intervals are known: no earlier
than the *start* of the one below and no later than the *end* of the one above, since a batch may share the interval
of either (`streams`). Neighbours are booked batches, and parked and rejected ones whose bytes could be read. Below
the first of an epoch, the epoch before it is the neighbour, unless the newer one is seen to begin before the older
one's end (a clock set back, an old copy of a spool): then nothing bounds it.

If a clock was set back, and the first batches of the new epoch are late, and the ones after them begin behind the
older epoch's end, the bound is wrong. What then comes after a close becomes an adjustment, as whatever is late does.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import chain

import msgspec

from ledger.periods.spans import subtract
from ledger.periods.streams import (
    ENDLESS_UNIX_NS,
    UNKNOWN_START_UNIX_NS,
    Held,
    HeldKind,
    Run,
    Span,
    Stream,
)

ID_DIGITS = 12


class Kind(StrEnum):
    SILENT = "silent"
    """The agent's newest epoch has not said anything behind this time yet."""
    MISSING = "missing"
    """Later batches of the stream arrived, these did not."""
    PARKED = "parked"
    REJECTED = "rejected"
    CONFLICT = "conflict"


class Unknown(msgspec.Struct, frozen=True):
    """Something that is not booked, and may lie anywhere in [start_unix_ns, end_unix_ns).

    `start_unix_ns` is UNKNOWN_START_UNIX_NS and `end_unix_ns` ENDLESS_UNIX_NS where nothing bounds it. Both sequence
    numbers are 0 where none are known (`silent`). `id` is a function of what it is about, not of its bounds, which
    narrow as its neighbours arrive; what shrinks, or (`silent`) speaks again, is another one.
    """

    id: str
    kind: Kind
    agent_id: str
    epoch: int
    first_seq: int
    last_seq: int
    start_unix_ns: int
    end_unix_ns: int
    tenant: str
    """Whose it is; empty where nobody can know."""
    reason: str
    """Why the collector held it back; empty for what did not arrive."""


def unknowns(
    streams: Iterable[Stream], held: Iterable[Held], retired: Mapping[str, int]
) -> dict[str, list[Unknown]]:
    """Agent -> what is not booked of it, in the order of (epoch, first_seq, kind); empty for one that is complete
    for ever, as a retired one can be. Agents ascend.

    A retired agent (agent -> unix ns: an operator's word that it is gone) is not waited for: it has no tail, unless
    an interval of its newest epoch begins at or after its retirement. Then it is not gone.
    """
    runs: dict[str, dict[int, tuple[Run, ...]]] = {}
    for stream in streams:
        runs.setdefault(stream.agent_id, {})[stream.epoch] = stream.runs
    kept: dict[tuple[str, int], list[Held]] = {}
    for one in held:
        runs.setdefault(one.agent_id, {}).setdefault(one.epoch, ())
        kept.setdefault((one.agent_id, one.epoch), []).append(one)
    out = {}
    for agent_id in sorted(runs):
        found: list[Unknown] = []
        before: int | None = None
        lives = [
            _Life(agent_id, epoch, runs[agent_id][epoch], kept.get((agent_id, epoch), []))
            for epoch in sorted(runs[agent_id])
        ]
        for life in lives:
            found += sorted(life.unbooked(before), key=lambda u: (u.first_seq, u.kind))
            if life is lives[-1]:
                found += life.tail(before, retired.get(agent_id))
            if life.known:
                before = life.known[-1].end_unix_ns
        out[agent_id] = found
    return out


class _Life:
    """One epoch of one agent. `before` is the end of the last batch that is known of an older one, or None."""

    def __init__(self, agent_id: str, epoch: int, runs: tuple[Run, ...], held: list[Held]) -> None:
        self._stream = agent_id, epoch
        self._booked = [Span(agent_id, epoch, run.first_seq, run.last_seq) for run in runs]
        firsts = [run.first_seq for run in runs]
        # What was rejected or parked and got in after all is settled. A conflict is about other bytes, and stays.
        self._held = [
            one
            for one in held
            if one.kind is HeldKind.CONFLICT
            or not (at := bisect(firsts, one.seq))
            or one.seq > runs[at - 1].last_seq
        ]
        self.known = sorted(chain(runs, self._readable()))
        """Neighbours for what is not known, by sequence number."""
        self._known_firsts = [run.first_seq for run in self.known]

    def _readable(self) -> Iterator[Run]:
        for one in self._held:
            start, end = one.start_unix_ns, one.end_unix_ns
            if one.kind is not HeldKind.CONFLICT and start is not None and end is not None:
                yield Run(one.seq, one.seq, start, end, start, end)

    def unbooked(self, before: int | None) -> Iterator[Unknown]:
        agent_id, epoch = self._stream
        arrived = [
            Span(agent_id, epoch, one.seq, one.seq) for one in self._held if one.kind is not HeldKind.CONFLICT
        ]
        last = max(chain((s.last_seq for s in self._booked), (one.seq for one in self._held)), default=0)
        if last:
            for hole in subtract([Span(agent_id, epoch, 1, last)], chain(self._booked, arrived)):
                bounds = self._around(hole.first_seq, before)
                yield _unknown(Kind.MISSING, *hole, bounds)
        by_identity: dict[tuple[HeldKind, int], list[Held]] = {}
        for one in self._held:
            by_identity.setdefault((one.kind, one.seq), []).append(one)
        for (kind, seq), copies in by_identity.items():
            around = self._around(seq, before)
            starts = [around[0] if one.start_unix_ns is None else one.start_unix_ns for one in copies]
            ends = [around[1] if one.end_unix_ns is None else one.end_unix_ns for one in copies]
            tenants = {one.tenant for one in copies}
            reasons = sorted({one.reason for one in copies})
            yield _unknown(
                Kind(kind.value),
                *(agent_id, epoch, seq, seq),
                (min(starts), max(ends)),
                tenants.pop() if len(tenants) == 1 else "",
                ", ".join(reasons),
            )

    def tail(self, before: int | None, retired_unix_ns: int | None) -> Iterator[Unknown]:
        if self.known:
            start = self.known[-1].last_start_unix_ns
            if retired_unix_ns is not None and start < retired_unix_ns:
                return
        elif retired_unix_ns is not None:
            return
        else:
            start = UNKNOWN_START_UNIX_NS if before is None else before
        yield _unknown(Kind.SILENT, *self._stream, 0, 0, (start, ENDLESS_UNIX_NS))

    def _around(self, seq: int, before: int | None) -> tuple[int, int]:
        """Where a batch that nobody could read may lie, by its neighbours."""
        at = bisect(self._known_firsts, seq)
        below = self.known[at - 1] if at else None
        above = self.known[at] if at < len(self.known) else None
        if below is not None and seq <= below.last_seq:
            # A conflict with a booked batch: other bytes in its place.
            return below.start_unix_ns, below.end_unix_ns
        end = ENDLESS_UNIX_NS if above is None else above.first_end_unix_ns
        if below is not None:
            # In a stream that keeps the contract min and max change nothing. In another, an empty stretch would
            # hide what is missing.
            start = below.last_start_unix_ns
            return start if above is None else min(start, above.start_unix_ns), max(end, below.end_unix_ns)
        if before is None or (above is not None and above.start_unix_ns < before):
            return UNKNOWN_START_UNIX_NS, end
        return before, end


def _unknown(
    kind: Kind,
    agent_id: str,
    epoch: int,
    first_seq: int,
    last_seq: int,
    bounds: tuple[int, int],
    tenant: str = "",
    reason: str = "",
) -> Unknown:
    start, end = bounds
    # A tail is known by where it begins: when its agent speaks again, that is another silence.
    since = start if kind is Kind.SILENT else 0
    identity = f"{kind} {agent_id} {epoch} {first_seq} {last_seq} {since}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:ID_DIGITS]
    # An interval is never empty; a stretch that were would overlap nothing.
    return Unknown(
        name, kind, agent_id, epoch, first_seq, last_seq, start, max(end, start + 1), tenant, reason
    )
