"""Openings and what is booked -> what no batch carried. Pure.

Strategy. For each incarnation and measure the books hold a count: all that is booked of it so far. Its counter minus that
count is the same at every opening if nothing is missing. The first opening of an incarnation says what that difference
is (its `mark`); each later one finds it higher by what is missing, which is recovered, and so counted from then on.

Nesting. The kernel's CPU, I/O and (v2) OOM counters include what lies below a cgroup, while rows have the units inside
taken off. So the count of a unit includes all that is booked of, and recovered for, the units inside it: inner units
are settled first, and what is left of a difference is the unit's own, with the tails of inner units that ended and so have
no opening any more. What lies where is read off the paths, and a cgroup is younger than the one around it, which kernfs
ids tell. Throttling is a cgroup's own, and so are OOM kills on v1, where alone the root knows them.

From zero. A unit without an earlier opening counts from zero if it must have been born since the agent's first reading:
because all units alive at an earlier opening of the host are in the books and it is not among them, or because its
whole boot began after another one of this agent. Otherwise it may have used some before the agent came, and nothing is
recovered for it; what is missing is in the unit around it.

Invariant. Σ booked + Σ recovered of a host between two openings of its root = the root's difference, whatever is in doubt
further in: what is not recovered for a unit is left to the ones around it. For CPU time this includes the deficit that
the epoch began with; for the other nested measures what an epoch began with is not told, and a difference of that size
remains until the next opening.

Unknown rows are no hole: the agent keeps the older base of a counter that is unreadable once, and its next difference
covers that time too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import TypeVar

from ledger.recover.facts import (
    BITS,
    RECOVERABLE,
    Beginning,
    Booked,
    Doubt,
    Opening,
    Recovered,
    Recovery,
    Unknown,
)
from wire.v1 import usage_pb2 as pb

ROOT_ID = 1
FOLDED_ID = 0
_CPU = RECOVERABLE.index("cpu_usage_ns")
assert _CPU == 0, "what the CPU counter says is known before the others are judged"
_OOM = RECOVERABLE.index("oom_kills")
_IO = frozenset(k for k, name in enumerate(RECOVERABLE) if name.startswith("io_"))
_OWN = frozenset(
    RECOVERABLE.index(name) for name in ("cpu_periods", "cpu_throttled_periods", "cpu_throttled_ns")
)
_Span = tuple[int, int]
"""(epoch, span_start_ns): in the order in which an agent wrote them."""
_Fact = TypeVar("_Fact", Opening, Booked, Beginning)


class _Unit:
    """One incarnation: what is in the books of it, and how far its counters are ahead of that."""

    __slots__ = (
        "around",
        "cgroup_id",
        "counted",
        "counted_end_ns",
        "folded",
        "inside",
        "last_end_ns",
        "marks",
        "may_nest",
        "opened",
        "path",
        "repeated",
        "was_reset",
    )

    def __init__(self, cgroup_id: int, path: str, kind: int) -> None:
        self.cgroup_id = cgroup_id
        self.path = path
        self.may_nest = kind != pb.UNIT_KIND_CONTAINER and cgroup_id != ROOT_ID
        self.around: list[_Unit] = []
        self.last_end_ns = 0
        self.counted_end_ns = 0
        """End of the last row that is in `counted`: its own, or of a unit inside."""
        self.forget()

    def forget(self) -> None:
        """Begin anew: counters from here on have nothing to do with those before."""
        self.opened = False
        self.marks: list[int | None] = [None] * len(RECOVERABLE)
        self.counted = [0] * len(RECOVERABLE)
        self.clear_doubts()

    def clear_doubts(self) -> None:
        self.inside = [0] * len(RECOVERABLE)
        """Recovered for units inside since this one's last opening."""
        self.folded = [False] * len(RECOVERABLE)
        self.was_reset = False
        self.repeated = False
        """Rows since then tell again what others told, here or in a unit inside: an older copy of the spool came back."""


def _age(unit: _Unit) -> int:
    """Kernfs numbers cgroups in the order in which they are made."""
    return unit.cgroup_id


class _Boot:
    """All that one agent wrote about one boot."""

    def __init__(self, openings: list[Opening], booked: list[Booked], beginnings: list[Beginning]) -> None:
        self.openings = _by_span(openings)
        self.booked = _by_span(booked)
        self.beginnings = _by_span(beginnings)
        self.spans = sorted(self.openings.keys() | self.booked.keys())
        root_knows_oom = any(o.known & BITS[_OOM] for o in openings if o.cgroup_id == ROOT_ID)
        self.own = _OWN | {_OOM} if root_knows_oom else _OWN
        self.root = _Unit(ROOT_ID, "/", int(pb.UNIT_KIND_HOST))
        self.units = {(ROOT_ID, "/"): self.root}
        named = chain(
            ((o.cgroup_id, o.cgroup_path, o.kind) for o in openings),
            ((b.cgroup_id, b.cgroup_path, b.kind) for b in booked),
        )
        for cgroup_id, path, kind in named:
            if cgroup_id not in (ROOT_ID, FOLDED_ID) and (cgroup_id, path) not in self.units:
                self.units[cgroup_id, path] = _Unit(cgroup_id, path, kind)
        self._nest()

    def _nest(self) -> None:
        at: dict[str, list[_Unit]] = defaultdict(list)
        for unit in sorted(self.units.values(), key=_age):
            at[unit.path].append(unit)
        for unit in self.units.values():
            if unit is self.root:
                continue
            unit.around.append(self.root)
            slash = unit.path.find("/", 1)
            while slash > 0:
                # Of those that had this path one after the other, the last that was there before.
                there = at.get(unit.path[:slash], ())
                older = bisect_left(there, unit.cgroup_id, key=_age)
                if older:
                    unit.around.append(there[older - 1])
                slash = unit.path.find("/", slash + 1)

    def count(self, unit: _Unit, amounts: Iterable[tuple[int, int]], recovered: bool = False) -> None:
        """Put amounts (measure, amount) into the books of a unit and, where counters are nested, of those around it."""
        for k, amount in amounts:
            unit.counted[k] += amount
            if k not in self.own:
                for outer in unit.around:
                    outer.counted[k] += amount
                    if recovered:
                        outer.inside[k] += amount

    def count_span(self, span: _Span) -> None:
        booked = [(rows, self._unit_of(rows)) for rows in self.booked.get(span, ())]
        for rows, unit in booked:
            for counting in (unit, *unit.around):
                counting.repeated |= rows.first_start_ns < counting.counted_end_ns
        for rows, unit in booked:
            amounts = [(k, amount) for k, amount in enumerate(rows.sums) if amount]
            self.count(unit, amounts)
            for counting in (unit, *unit.around):
                counting.counted_end_ns = max(counting.counted_end_ns, rows.last_end_ns)
            if rows.cgroup_id == FOLDED_ID:
                for other in self.units.values():
                    if other.may_nest:
                        for k, _ in amounts:
                            other.folded[k] = k not in self.own
            else:
                unit.was_reset |= rows.was_reset
                unit.last_end_ns = max(unit.last_end_ns, rows.last_end_ns)

    def _unit_of(self, rows: Booked) -> _Unit:
        """Folded rows may be of any unit that has ended: all that is known is that they were on this host."""
        if rows.cgroup_id in (ROOT_ID, FOLDED_ID):
            return self.root
        return self.units[rows.cgroup_id, rows.cgroup_path]


class _Settling:
    """One opening under way: where the results go."""

    __slots__ = ("_since_ns", "opening", "recovery")

    def __init__(self, recovery: Recovery, opening: Opening, since_ns: int) -> None:
        self.recovery, self.opening, self._since_ns = recovery, opening, since_ns

    def _about(self) -> tuple[str, int, str, int, str, str, int, int]:
        o = self.opening
        since = self._since_ns or o.start_ns
        first, last = min(since, o.start_ns), max(since, o.start_ns)
        return o.agent_id, o.epoch, o.boot_id, o.cgroup_id, o.cgroup_path, o.tenant, first, last

    def recover(self, k: int, amount: int) -> None:
        self.recovery.recovered.append(Recovered(*self._about(), RECOVERABLE[k], amount))

    def doubt(self, k: int, doubt: Doubt) -> None:
        self.recovery.unknown.append(Unknown(*self._about(), RECOVERABLE[k], doubt))


def recovered(
    openings: Iterable[Opening], booked: Iterable[Booked], beginnings: Iterable[Beginning]
) -> Recovery:
    """What the openings of any number of agents say that no booked row does; amounts of 0 are left out.

    All that is booked of an agent must be given at once: what is recovered at one opening depends on those before.
    """
    agents: dict[str, dict[str, tuple[list[Opening], list[Booked], list[Beginning]]]] = defaultdict(
        lambda: defaultdict(lambda: ([], [], []))
    )
    for opening in openings:
        agents[opening.agent_id][opening.boot_id][0].append(opening)
    for rows in booked:
        agents[rows.agent_id][rows.boot_id][1].append(rows)
    for beginning in beginnings:
        if beginning.boot_id in agents[beginning.agent_id]:
            agents[beginning.agent_id][beginning.boot_id][2].append(beginning)
    recovery = Recovery([], [])
    for agent_id in sorted(agents):
        boots = sorted(agents[agent_id].values(), key=_first_seen)
        ends = sorted((rows.epoch, rows.last_end_ns) for facts in boots for rows in facts[1])
        for number, facts in enumerate(boots):
            _settle_boot(_Boot(*facts), number > 0, ends, recovery)
    return recovery


def _first_seen(facts: tuple[list[Opening], list[Booked], list[Beginning]]) -> tuple[int, int]:
    seen = [(o.epoch, o.start_ns) for o in facts[0]] + [(b.epoch, b.first_start_ns) for b in facts[1]]
    return min(seen)


def _settle_boot(boot: _Boot, is_later: bool, ends: list[tuple[int, int]], recovery: Recovery) -> None:
    """`is_later`: another boot of this agent came before, so that every counter began at zero under its eyes.
    `ends`: (epoch, end) of what is booked of the agent.
    """
    from_zero, is_first, source = is_later, not is_later, ""
    before: _Span | None = None
    for span in boot.spans:
        beginnings = boot.beginnings.get(span, [])
        sources = {b.cpu_source for b in beginnings if b.cpu_source}
        reread = before is not None and span[0] == before[0]
        changed = bool(sources and source and source not in sources)
        if reread or changed:
            for unit in boot.units.values():
                unit.forget()
            from_zero = False
        owed = next((b.cpu_owed_ns for b in beginnings if b.cpu_owed_ns is not None), 0)
        missing_base: Doubt | None = Doubt.SOURCE_CHANGED if changed else Doubt.NO_OPENING
        if reread or is_first:
            missing_base = None
        earlier_end_ns = max((end for epoch, end in ends if epoch < span[0]), default=0)
        # A host's own books are closed last: what is missing in units is theirs.
        for opening in sorted(_first_of_each(boot.openings.get(span, ())), key=_inner_first):
            unit = boot.root
            if opening.cgroup_id != ROOT_ID:
                unit = boot.units[opening.cgroup_id, opening.cgroup_path]
            since = unit.last_end_ns or earlier_end_ns
            settling = _Settling(recovery, opening, since)
            _settle(boot, unit, settling, owed, from_zero, missing_base)
        boot.count_span(span)
        from_zero = from_zero or any(b.whole for b in beginnings)
        is_first = False
        source = next(iter(sources), source)
        before = span


def _settle(
    boot: _Boot,
    unit: _Unit,
    settling: _Settling,
    owed_cpu_ns: int,
    from_zero: bool,
    missing_base: Doubt | None,
) -> None:
    """Compare one opening with the books, and put into them what is recovered.

    `from_zero`: a unit that never opened before was born since. `missing_base`: what to say of one that has nothing to
    be compared with; None: that is as it should be.
    """
    opening = settling.opening
    amounts = []
    # Rows tell twice what an older copy of the spool repeats: they overlap, or this opening lies before them, or, where the
    # clock was set back between the copy and its return, the CPU counter does, which never falls otherwise.
    unit.repeated |= opening.start_ns < unit.counted_end_ns
    for k, counter in enumerate(opening.counters):
        mark = unit.marks[k]
        if not opening.known & BITS[k]:
            if mark is not None:
                settling.doubt(k, Doubt.NOT_KNOWN)
            continue
        # What an epoch begins with as owed was booked before it and will be taken off its rows.
        owed = owed_cpu_ns if k == _CPU and unit is boot.root else 0
        ahead = counter + owed - unit.counted[k]
        if mark is None and from_zero and not unit.opened:
            mark = 0 if counter else owed
        if mark is None:
            if counter and missing_base is not None:
                settling.doubt(k, Doubt.NOT_KNOWN if unit.opened else missing_base)
            unit.marks[k] = ahead
            continue
        amount = ahead - mark
        unit.repeated |= k == _CPU and amount + unit.inside[k] < 0
        doubt = _doubt(unit, k, amount) if amount else None
        if doubt is not None:
            settling.doubt(k, doubt)
            mark = ahead
        elif amount:
            settling.recover(k, amount)
            amounts.append((k, amount))
        unit.marks[k] = mark
    boot.count(unit, amounts, recovered=True)
    if unit.repeated:
        for outer in unit.around:
            outer.repeated = True
    unit.opened = True
    unit.clear_doubts()


def _doubt(unit: _Unit, k: int, amount: int) -> Doubt | None:
    if unit.was_reset:
        return Doubt.RESET
    if unit.folded[k]:
        return Doubt.FOLDED
    if k in _IO and amount + unit.inside[k] < 0 and not unit.repeated:
        return Doubt.DEVICE_GONE
    return None


def _first_of_each(openings: Iterable[Opening]) -> Iterable[Opening]:
    """An agent may tell an opening again when its unit was unreadable while rows waited over the epoch's beginning."""
    first: dict[tuple[int, str], Opening] = {}
    for opening in sorted(openings, key=lambda o: o.start_ns):
        first.setdefault((opening.cgroup_id, opening.cgroup_path), opening)
    return first.values()


def _inner_first(opening: Opening) -> tuple[int, int, str]:
    if opening.cgroup_id == ROOT_ID:
        return (1, 0, "")
    return (0, -opening.cgroup_path.count("/"), opening.cgroup_path)


def _by_span(facts: list[_Fact]) -> dict[_Span, list[_Fact]]:
    out: dict[_Span, list[_Fact]] = defaultdict(list)
    for fact in facts:
        out[fact.epoch, fact.span_start_ns].append(fact)
    return out
