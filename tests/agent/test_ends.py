"""Ends that the kernel probes recorded, and traffic: billed once, whatever is killed between reading, commit and deletion."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.meter import usage
from agent.meter.model import COUNTERS, NETWORK, End, Network, ProbeMark, Reading, Snapshot
from agent.meter.network import NETWORK_BITS, NETWORK_KNOWN
from agent.meter.rows import Usage
from agent.meter.usage import Baseline, Outcome
from tests.agent.readings import SECOND, WALL, everybody, reading, root, snapshot
from tests.agent.test_usage import CPU, MEMORY, begin, cpu, deficit, persisted, row, step
from wire.measures import BIT
from wire.v1 import usage_pb2 as pb

LOAD = 50 * SECOND
MARK = ProbeMark(LOAD, exits=True, network=True, lost={})


def end(cgroup_id: int, used: int | None, born_s: float = 105, released: bool = True, **more: object) -> End:
    seen = bool(more.pop("removal_seen", True))
    return End(
        reading(cgroup_id, used, **more),
        round(born_s * SECOND),
        round(108 * SECOND),
        released,
        LOAD,
        seen,
    )


def taken(at: float, host: Reading, *units: Reading, ends: tuple[End, ...] = (), **more: object) -> Snapshot:
    made = snapshot(at, host, *units)
    return msgspec.structs.replace(
        made, ends=list(ends), seen_boottime_ns=made.boottime_ns - SECOND // 100, **{"probes": MARK, **more}
    )


def watched(*units: Reading, host: Reading | None = None) -> Baseline:
    return usage.begin(taken(100, host or root(0), *units), "test", everybody, [])


def traffic(cgroup_id: int, unit_id: int | None, amount: int) -> tuple[int, int | None, tuple[int, ...]]:
    return cgroup_id, unit_id, tuple(amount * (slot + 1) for slot in range(len(NETWORK)))


def test_a_life_between_two_readings_is_one_final_row_from_zero() -> None:
    outcome = step(watched(), taken(110, root(900), ends=(end(7, 700),)))
    found = row(outcome, 7)
    assert found.values[CPU] == 700
    assert found.flags & pb.ROW_FLAG_FINAL
    assert found.flags & pb.ROW_FLAG_PARTIAL
    assert not found.flags & pb.ROW_FLAG_TAIL_UNSEEN
    assert found.opens
    assert cpu(outcome, 1) == 200
    assert 7 not in outcome.baseline.units
    assert outcome.baseline.closed == [7]


def test_the_tail_of_a_known_unit_is_in_its_own_last_row() -> None:
    outcome = step(watched(reading(7, 500)), taken(110, root(900), ends=(end(7, 1_300, born_s=60),)))
    assert cpu(outcome, 7) == 800
    assert cpu(outcome, 1) == 100
    assert not row(outcome, 7).flags & pb.ROW_FLAG_TAIL_UNSEEN


def test_an_end_shown_again_after_its_last_row_is_billed_nothing() -> None:
    first = step(watched(), taken(110, root(900), ends=(end(7, 700),)))
    again = step(persisted(first.baseline), taken(120, root(1_000), ends=(end(7, 700),)))
    assert [u.cgroup_id for u in again.usages] == [1]
    assert again.baseline.closed == [7]
    gone = step(again.baseline, taken(130, root(1_000)))
    assert gone.baseline.closed == []


def test_a_removed_unit_goes_on_until_it_is_released_and_says_nothing_meanwhile() -> None:
    removed = step(watched(reading(7, 0)), taken(110, root(500), ends=(end(7, 480, 60, released=False),)))
    assert cpu(removed, 7) == 480
    assert not row(removed, 7).flags & pb.ROW_FLAG_FINAL
    zombie = step(removed.baseline, taken(120, root(500), ends=(end(7, 480, 60, released=False),)))
    assert [u.cgroup_id for u in zombie.usages] == [1]
    assert zombie.baseline.closed == []
    released = step(zombie.baseline, taken(130, root(519), ends=(end(7, 499, 60),)))
    assert cpu(released, 7) == 19
    assert row(released, 7).flags & pb.ROW_FLAG_FINAL
    assert deficit(released) == 0


def test_a_unit_that_vanishes_without_a_record_has_its_tail_unseen_and_a_late_record_is_not_billed() -> None:
    vanished = step(watched(reading(7, 500)), taken(110, root(900)))
    assert row(vanished, 7).flags & pb.ROW_FLAG_TAIL_UNSEEN
    late = step(vanished.baseline, taken(120, root(900), ends=(end(7, 650, born_s=60),)))
    assert [u.cgroup_id for u in late.usages] == [1]
    assert late.baseline.closed == [7]


def test_a_release_whose_removal_nobody_saw_is_not_billed_from_zero() -> None:
    outcome = step(watched(), taken(110, root(900), ends=(end(7, 10**12, 0, removal_seen=False),)))
    assert [u.cgroup_id for u in outcome.usages] == [1]
    assert outcome.baseline.closed == [7]


def test_born_before_the_probes_which_came_after_the_last_reading_counts_from_zero() -> None:
    before = begin(host=root(0), at=40.0)
    outcome = step(before, taken(110, root(900), ends=(end(7, 700, born_s=0),)))
    assert cpu(outcome, 7) == 700
    known_load = step(watched(), taken(110, root(900), ends=(end(7, 700, born_s=0),)))
    assert [u.cgroup_id for u in known_load.usages] == [1]


def test_after_an_incomplete_reading_only_what_was_certainly_born_since_counts_from_zero() -> None:
    before = msgspec.structs.replace(watched(), complete=False)
    outcome = step(before, taken(110, root(900), ends=(end(7, 300), end(8, 400, born_s=99))))
    assert cpu(outcome, 7) == 300
    assert [u.cgroup_id for u in outcome.usages if u.cgroup_id == 8] == []


def test_a_new_spool_opens_ended_units_at_what_they_had_used() -> None:
    before = usage.begin(taken(100, root(0), ends=(end(7, 700, 60),)), "test", everybody, [])
    outcome = step(before, taken(110, root(0), ends=(end(7, 700, 60),)))
    found = row(outcome, 7)
    assert (found.values[CPU], found.opens, found.counters_before[0]) == (0, True, 700)
    assert found.flags & pb.ROW_FLAG_FINAL


def test_the_memory_of_a_unit_ends_with_it() -> None:
    mib = 1 << 20
    before = watched(reading(7, 0, memory_current_bytes=mib, memory_inactive_file_bytes=0))
    outcome = step(before, taken(110, root(0), ends=(end(7, 0, 60, memory_current_bytes=mib),)))
    # Removed at 108, and the reading was at 110.
    assert row(outcome, 7).values[MEMORY] == 8 * mib
    unknown = step(watched(), taken(110, root(0), ends=(end(7, 5),)))
    assert not row(unknown, 7).known >> MEMORY & 1


def test_what_an_inner_unit_used_to_its_end_is_taken_off_the_unit_around_it() -> None:
    before = watched(reading(7, 0), reading(8, 0, around=7))
    outcome = step(
        before, taken(110, root(100), reading(7, 90), ends=(end(8, 60, 60, around=7), end(9, 5, around=7)))
    )
    assert [cpu(outcome, i) for i in (1, 7, 8, 9)] == [10, 25, 60, 5]


def test_traffic_is_a_difference_and_goes_to_the_unit_or_the_host() -> None:
    before = watched(reading(7, 0))
    first = taken(
        110,
        root(0),
        reading(7, 0),
        networks=[Network(LOAD, [traffic(7, 7, 10), traffic(70, 7, 1), traffic(3, 1, 5)])],
    )
    one = step(before, first)
    assert row(one, 7).values[NETWORK_BITS[0]] == 11
    assert row(one, 1).values[NETWORK_BITS[0]] == 5
    assert row(one, 7).known & NETWORK_KNOWN == NETWORK_KNOWN
    second = taken(120, root(0), reading(7, 0), networks=[Network(LOAD, [traffic(7, 7, 12)])])
    two = step(persisted(one.baseline), second)
    assert row(two, 7).values[NETWORK_BITS[1]] == 4
    assert row(two, 1).values[NETWORK_BITS[0]] == 0


def test_without_probes_traffic_is_unknown_and_not_zero() -> None:
    outcome = step(begin(reading(7, 0)), snapshot(110, root(0), reading(7, 0)))
    assert row(outcome, 7).known & NETWORK_KNOWN == 0
    assert outcome.stretches[-1].coverage == 0


def test_traffic_whose_unit_is_not_known_yet_waits_whole() -> None:
    before = watched(reading(7, 0))
    waiting = step(
        before, taken(110, root(0), reading(7, 0), networks=[Network(LOAD, [traffic(80, None, 9)])])
    )
    assert all(u.values[NETWORK_BITS[0]] == 0 for u in waiting.usages)
    found = step(
        waiting.baseline, taken(120, root(0), reading(7, 0), networks=[Network(LOAD, [traffic(80, 7, 11)])])
    )
    assert row(found, 7).values[NETWORK_BITS[0]] == 11


def test_probes_loaded_anew_under_the_agent_cost_neither_a_byte_nor_a_gap() -> None:
    before = step(
        watched(reading(7, 0)),
        taken(110, root(0), reading(7, 0), networks=[Network(LOAD, [traffic(7, 7, 10)])]),
    )
    fresh = ProbeMark(LOAD + 1, exits=True, network=True, lost={})
    networks = [Network(LOAD, [traffic(7, 7, 14)], unloaded=True), Network(LOAD + 1, [traffic(7, 7, 3)])]
    after = step(
        before.baseline, taken(120, root(0), reading(7, 0), networks=networks, probes=fresh, unloaded=[MARK])
    )
    assert row(after, 7).values[NETWORK_BITS[0]] == 4 + 3
    assert after.gaps == []
    assert after.stretches[-1].coverage == 0
    whole = step(after.baseline, taken(130, root(0), reading(7, 0), networks=networks[1:], probes=fresh))
    assert whole.stretches[-1].coverage == pb.COVERAGE_EXITS | pb.COVERAGE_NETWORK


def test_pins_that_were_away_for_a_moment_are_not_counted_from_zero_again() -> None:
    gone = taken(
        110,
        root(0),
        reading(7, 0),
        networks=[Network(LOAD, [traffic(7, 7, 10)], unloaded=True)],
        probes=None,
        unloaded=[MARK],
    )
    before = step(watched(reading(7, 0)), gone)
    assert row(before, 7).values[NETWORK_BITS[0]] == 10
    nothing = step(persisted(before.baseline), taken(120, root(0), reading(7, 0), probes=None))
    back = taken(130, root(0), reading(7, 0), networks=[Network(LOAD, [traffic(7, 7, 12)])])
    after = step(nothing.baseline, back)
    assert row(after, 7).values[NETWORK_BITS[0]] == 2
    fresh = taken(130, root(0), reading(7, 0), networks=[Network(LOAD + 1, [traffic(7, 7, 12)])])
    loaded_anew = step(nothing.baseline, fresh)
    assert row(loaded_anew, 7).values[NETWORK_BITS[0]] == 12
    assert loaded_anew.gaps == []


def test_probes_loaded_anew_while_no_agent_ran_leave_a_gap_and_count_from_zero() -> None:
    before = step(
        watched(reading(7, 0)),
        taken(110, root(0), reading(7, 0), networks=[Network(LOAD, [traffic(7, 7, 10)])]),
    )
    fresh = ProbeMark(LOAD + 1, exits=True, network=True, lost={})
    networks = [Network(LOAD + 1, [traffic(7, 7, 3)])]
    after = step(
        persisted(before.baseline), taken(120, root(0), reading(7, 0), networks=networks, probes=fresh)
    )
    assert row(after, 7).values[NETWORK_BITS[0]] == 3
    (gap,) = after.gaps
    assert gap.reason == pb.GAP_REASON_SOURCE_CHANGED
    assert (gap.start_unix_ns, gap.end_unix_ns) == (WALL + 110 * SECOND, WALL + 120 * SECOND)


def test_probes_that_cannot_be_read_for_a_while_lose_nothing() -> None:
    before = step(
        watched(reading(7, 0)),
        taken(110, root(0), reading(7, 0), networks=[Network(LOAD, [traffic(7, 7, 10)])]),
    )
    blind = step(before.baseline, taken(120, root(0), reading(7, 0), probes=None))
    assert row(blind, 7).known & NETWORK_KNOWN == 0
    back = step(
        blind.baseline, taken(130, root(0), reading(7, 0), networks=[Network(LOAD, [traffic(7, 7, 18)])])
    )
    assert row(back, 7).values[NETWORK_BITS[0]] == 8
    assert back.gaps == []
    assert back.stretches[-1].coverage == 0


def test_what_the_kernel_side_had_no_room_for_is_a_gap_and_lowers_the_coverage_once() -> None:
    full = msgspec.structs.replace(MARK, lost={"tombstones": 3, "wakes": 9})
    outcome = step(watched(), taken(110, root(0), probes=full))
    (gap,) = outcome.gaps
    assert (gap.reason, gap.count) == (pb.GAP_REASON_KERNEL_OVERFLOW, 3)
    assert "tombstones" in gap.detail
    assert outcome.stretches[-1].coverage == pb.COVERAGE_NETWORK
    later = step(persisted(outcome.baseline), taken(120, root(0), probes=full))
    assert later.gaps == []
    assert later.stretches[-1].coverage == pb.COVERAGE_EXITS | pb.COVERAGE_NETWORK


def test_rows_that_wait_are_covered_only_if_all_their_intervals_were() -> None:
    held = usage.hold(step(watched(), taken(110, root(5), probes=None)), fold_ended=True)
    outcome = step(held, taken(120, root(9)))
    assert outcome.stretches[-1].coverage == 0


@dataclass
class _Life:
    used: int = 0
    sent: int = 0
    born_s: float = 0.0
    state: str = "living"


@dataclass
class _Host:
    """Cgroups that come, work and go; the probes' maps; and an agent that may die anywhere."""

    durable: bytes
    baseline: Baseline
    at: float = 100.0
    lives: dict[int, _Life] = field(default_factory=dict)
    ends: dict[int, End] = field(default_factory=dict)
    network: dict[int, int] = field(default_factory=dict)
    billed: list[Usage] = field(default_factory=list)
    root: int = 0

    def snapshot(self) -> Snapshot:
        self.at += 10
        living = [reading(i, life.used) for i, life in self.lives.items() if life.state == "living"]
        units = {i for i, life in self.lives.items() if life.state != "gone"} | self.ends.keys()
        entries = [traffic(i, i if i in units else 1, amount) for i, amount in self.network.items()]
        return taken(
            self.at,
            root(self.root),
            *living,
            ends=tuple(self.ends.values()),
            networks=[Network(LOAD, entries)],
        )

    def end(self, cgroup_id: int, released: bool) -> None:
        life = self.lives[cgroup_id]
        life.state = "gone" if released else "removed"
        self.ends[cgroup_id] = end(cgroup_id, life.used, life.born_s, released)

    def commit(self, outcome: Outcome) -> None:
        self.durable = msgspec.msgpack.encode(outcome.baseline)
        self.baseline = persisted(outcome.baseline)
        for stretch in outcome.stretches:
            self.billed += stretch.usages

    def restart(self) -> None:
        self.baseline = msgspec.msgpack.decode(self.durable, type=Baseline)

    def forget(self, share: float) -> None:
        """Traffic first, then ends; killed somewhere in between."""
        steps = [(self.network, i) for i in self.baseline.closed] + [
            (self.ends, i) for i in self.baseline.closed
        ]
        for where, cgroup_id in steps[: round(len(steps) * share)]:
            where.pop(cgroup_id, None)  # type: ignore[attr-defined]


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("born", "work", "send", "remove", "release", "read", "read", "read")),
        st.integers(2, 6),
        st.integers(0, 1_000),
        st.sampled_from(
            ("well", "well", "killed before the commit", "killed after it", "killed deleting", "disk full")
        ),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(_ACTIONS)
def test_every_nanosecond_and_byte_is_billed_once_wherever_the_agent_is_killed(
    actions: list[tuple[str, int, int, str]],
) -> None:
    first = usage.begin(taken(100, root(0), networks=[Network(LOAD, [])]), "test", everybody, [])
    host = _Host(msgspec.msgpack.encode(first), first)
    serial: dict[int, int] = {}
    made = 100
    for action, who, amount, fate in (*actions, *[("read", 0, 0, "well")] * 3):
        cgroup_id = serial.get(who, 0)
        life = host.lives.get(cgroup_id)
        host.at += 0.1
        if action == "born" and (life is None or life.state == "gone"):
            made += 1
            serial[who] = made
            host.lives[made] = _Life(born_s=host.at)
        elif action == "work" and life is not None and life.state == "living":
            life.used += amount
            host.root += amount
        elif action == "send" and life is not None and life.state != "gone":
            life.sent += amount
            host.network[cgroup_id] = life.sent
        elif action == "remove" and life is not None and life.state == "living":
            host.end(cgroup_id, released=False)
        elif action == "release" and life is not None and life.state != "gone":
            host.end(cgroup_id, released=True)
        elif action == "read":
            outcome = step(host.baseline, host.snapshot())
            if fate == "killed before the commit":
                host.restart()
            elif fate == "disk full":
                host.baseline = usage.hold(outcome, fold_ended=False)
            else:
                host.commit(outcome)
                host.forget({"well": 1.0, "killed after it": 0.0, "killed deleting": amount / 1_000}[fate])
                if fate != "well":
                    host.restart()
    for cgroup_id, life in host.lives.items():
        rows = [u for u in host.billed if u.cgroup_id == cgroup_id]
        assert sum(u.values[CPU] for u in rows) == life.used
        assert sum(u.values[NETWORK_BITS[0]] for u in rows) == life.sent
        assert sum(bool(u.flags & pb.ROW_FLAG_FINAL) for u in rows) == (life.state == "gone")
        assert not any(u.flags & pb.ROW_FLAG_TAIL_UNSEEN for u in rows)
    assert sum(u.values[CPU] for u in host.billed) == host.root
    assert host.ends.keys() == {i for i, life in host.lives.items() if life.state == "removed"}
    assert host.baseline.closed == []
    assert set(host.baseline.network.entries if host.baseline.network else ()) == set(host.network)


def test_counters_of_traffic_are_no_counters_of_a_reading() -> None:
    assert not set(NETWORK) & set(COUNTERS)
    assert [BIT[name] for name in NETWORK] == list(NETWORK_BITS)
