"""Conservation, whatever happens: what is billed and what is owed is what the kernel counted."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.meter import usage
from agent.meter.model import Reading, Snapshot
from tests.agent.readings import CADENCE, SECOND, WALL, reading, root, snapshot
from tests.agent.test_usage import CPU, MEMORY, begin, deficit, persisted, row, step


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, object]]:
    """Moments in the life of a host: who lives where, what each used, what the clock and the boot did."""
    moments = []
    for _ in range(draw(st.integers(1, 6))):
        units = draw(st.lists(st.integers(2, 7), unique=True, max_size=5))
        moments.append(
            {
                "units": units,
                "used": {u: draw(st.integers(0, 10**12)) for u in (1, *units)},
                "readable": {u: draw(st.sampled_from(("yes",) * 8 + ("no", "short"))) for u in units},
                "ahead": {u: draw(st.integers(0, 10**6)) for u in units},
                "reboot": draw(st.integers(0, 9)) == 0,
                "clock": draw(st.sampled_from((0, 0, 0, -3_600, 7, 86_400))),
                "failed_commit": draw(st.integers(0, 3)) == 0,
                "fold": draw(st.booleans()),
                "complete": draw(st.integers(0, 9)) > 0,
                "tenant": draw(st.sampled_from(("acme", "globex"))),
            }
        )
    return moments


PARENT = {2: 1, 3: 2, 4: 3, 5: 1, 6: 5, 7: 1}


class _Host:
    """A kernel in miniature: own CPU per unit, hierarchical counters, read one after the other."""

    def __init__(self) -> None:
        self.own: dict[int, int] = {}
        self.ids: dict[int, int] = {}
        self.next_id = 100
        self.root_own = 0
        self.total_before_boots = 0
        self.boot = 0
        self.at = 100.0
        self.offset = 0
        self.dead = 0

    def alive(self, wanted: list[int]) -> list[int]:
        return sorted(u for u in wanted if PARENT[u] == 1 or (PARENT[u] in wanted and self._chain(u, wanted)))

    @staticmethod
    def _chain(unit: int, wanted: list[int]) -> bool:
        while unit != 1:
            if unit not in wanted:
                return False
            unit = PARENT[unit]
        return True

    def subtree(self, unit: int) -> int:
        return self.own[unit] + sum(self.subtree(u) for u in self.own if PARENT[u] == unit)

    def root_counter(self) -> int:
        return self.root_own + self.dead + sum(self.own.values())

    def live(self, moment: dict[str, object]) -> None:
        """Ten seconds: perhaps a reboot, then some end, some are born, and everybody uses what they use."""
        if moment["reboot"]:
            self.boot += 1
            self.own.clear()
            self.ids.clear()
            self.root_own = self.dead = 0
            self.at = 3.0
        alive = self.alive(moment["units"])  # type: ignore[arg-type]
        for unit in list(self.own):
            if unit not in alive:
                self.dead += self.own.pop(unit)
                self.ids.pop(unit)
        for unit in alive:
            if unit not in self.own:
                self.own[unit] = 0
                self.ids[unit] = self.next_id
                self.next_id += 1
        used: dict[int, int] = moment["used"]  # type: ignore[assignment]
        self.root_own += used[1]
        for unit in alive:
            self.own[unit] += used[unit]
        self.at += 10
        self.offset += int(moment["clock"])  # type: ignore[call-overload]

    def snapshot(self, moment: dict[str, object]) -> Snapshot:
        return snapshot(
            self.at,
            root(self.root_counter()),
            *(self._read(unit, moment) for unit in sorted(self.own)),
            boot=f"{self.boot:08x}-0000-4000-8000-000000000000",
            wall=WALL + round(self.at * SECOND) + self.offset * SECOND,
            complete=bool(moment["complete"]),
        )

    def _read(self, unit: int, moment: dict[str, object]) -> Reading:
        readable: dict[int, str] = moment["readable"]  # type: ignore[assignment]
        ahead: dict[int, int] = moment["ahead"]  # type: ignore[assignment]
        # Units are read before the root: what runs meanwhile shows in the outer counter only.
        cpu = max(0, self.subtree(unit) - ahead[unit])
        known = readable[unit] == "yes" and not moment["reboot"]
        around = self.ids.get(PARENT[unit], 1)
        taken = reading(self.ids[unit], cpu if known else None, around=around, path=f"/u{unit}")
        return msgspec.structs.replace(taken, counters=()) if readable[unit] == "short" else taken


@given(histories())
@settings(max_examples=300)
def test_every_nanosecond_is_billed_exactly_once(history: list[dict[str, object]]) -> None:
    host = _Host()
    tenant = {"now": "acme"}

    def tenant_of(r: Reading) -> str:
        return tenant["now"] if r.cgroup_id != 1 else "host"

    baseline = usage.begin(snapshot(host.at, root(0)), "test", tenant_of, [])
    billed = counted = 0
    last_end = baseline.end_unix_ns
    for moment in history:
        counted_before_boot = counted
        root_before = 0 if moment["reboot"] else baseline.root.reading.counters[0] or 0
        host.live(moment)
        tenant["now"] = str(moment["tenant"])
        outcome = usage.step(persisted(baseline), host.snapshot(moment), tenant_of, CADENCE)
        counted = counted_before_boot + host.root_counter() - root_before
        assert all(v >= 0 for u in outcome.usages for v in u.values)
        if moment["failed_commit"]:
            baseline = persisted(usage.hold(outcome, bool(moment["fold"])))
            continue
        for stretch in outcome.stretches:
            assert stretch.interval.start_unix_ns >= last_end
            assert stretch.interval.end_unix_ns > stretch.interval.start_unix_ns
            assert stretch.interval.duration_ns > 0
            last_end = stretch.interval.end_unix_ns
            billed += sum(u.values[CPU] for u in stretch.usages)
        assert billed == counted + deficit(outcome)
        baseline = outcome.baseline


@given(
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), min_size=1, max_size=20),
    st.integers(1, 50),
)
def test_memory_byte_seconds_add_up_over_rows_to_within_one(
    samples: list[tuple[int, int]], seconds: int
) -> None:
    """Remainders are carried, so any number of rows bills the whole integral but the last byte-second."""
    baseline = begin(reading(7, 0, memory_current_bytes=0, memory_inactive_file_bytes=0), at=0)
    exact = billed = last = 0
    at = 0.0
    for memory, _ in samples:
        at += seconds / 7
        taken = snapshot(
            at, root(0), reading(7, 0, memory_current_bytes=memory, memory_inactive_file_bytes=0)
        )
        dt = taken.boottime_ns - baseline.boottime_ns
        exact += (last + memory) * dt // 2
        last = memory
        outcome = step(baseline, taken)
        billed += row(outcome, 7).values[MEMORY]
        baseline = persisted(outcome.baseline)
    assert billed == exact // SECOND


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40)),
        min_size=1,
        max_size=20,
    )
)
def test_memory_of_all_rows_is_the_hosts_integral_also_between_readings(
    moments: list[tuple[bool, int, int, int]],
) -> None:
    """Host, unit 7 and unit 8 inside it, sampled or read: what is billed and what is carried is the whole."""

    def held(cgroup_id: int, current: int, around: int = 1) -> Reading:
        return reading(cgroup_id, 0, around=around, memory_current_bytes=current)

    baseline = begin(held(7, 0), held(8, 0, around=7), host=held(1, 0))
    exact = billed = last = 0
    for n, (read, host, outer, inner) in enumerate((*moments, (True, 0, 0, 0))):
        at = 101 + n
        exact += (last + host) * SECOND // 2
        last = host
        if not read:
            samples = {1: (host, None, None), 7: (outer, None, 1), 8: (inner, None, 1)}
            usage.observe(baseline, at * SECOND, samples, CADENCE)
            continue
        outcome = step(baseline, snapshot(at, held(1, host), held(7, outer), held(8, inner, around=7)))
        billed += sum(u.values[MEMORY] for u in outcome.usages)
        baseline = persisted(outcome.baseline)
    carried = sum(s.memory_carried_byte_ns()[0] for s in (baseline.root, *baseline.units.values()))
    # The halves of a byte-nanosecond that each trapezoid drops: three cgroups, at most one each a moment.
    assert abs(billed * SECOND + carried - exact) <= 3 * (len(moments) + 1)
