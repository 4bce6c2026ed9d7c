"""Readings -> usage: conservation to the nanosecond, whatever the readings are."""

from __future__ import annotations

import msgspec

from agent.meter import usage
from agent.meter.model import Reading, Snapshot
from agent.meter.rows import Usage
from agent.meter.usage import Baseline, Gap, Outcome
from tests.agent.readings import (
    CADENCE,
    SECOND,
    WALL,
    everybody,
    reading,
    root,
    snapshot,
)
from wire.measures import BIT
from wire.v1 import usage_pb2 as pb

CPU = BIT["cpu_usage_ns"]
MEMORY = BIT["memory_byte_seconds"]
READ = BIT["io_read_bytes"]


def begin(*units: Reading, host: Reading | None = None, at: float = 100.0) -> Baseline:
    return usage.begin(snapshot(at, host or root(0), *units), "test", everybody, [])


def step(baseline: Baseline, taken: Snapshot) -> Outcome:
    return usage.step(baseline, taken, everybody, CADENCE)


def row(outcome: Outcome, cgroup_id: int) -> Usage:
    (found,) = [u for u in outcome.usages if u.cgroup_id == cgroup_id]
    return found


def cpu(outcome: Outcome, cgroup_id: int) -> int:
    return row(outcome, cgroup_id).values[CPU]


def deficit(outcome: Outcome) -> int:
    return outcome.stretches[-1].cpu_deficit_ns


def persisted(baseline: Baseline) -> Baseline:
    """As it comes back from the spool."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(baseline), type=Baseline)


def test_a_unit_is_billed_what_its_counter_rose_by() -> None:
    outcome = step(begin(reading(7, 500)), snapshot(110, root(2_000), reading(7, 1_500)))
    assert cpu(outcome, 7) == 1_000
    assert cpu(outcome, 1) == 1_000
    assert outcome.stretches[-1].host_cpu_usage_ns == 2_000


def test_a_controller_enabled_after_the_birth_counts_from_the_birth() -> None:
    """A runtime makes the cgroup first; a reading in between finds only some of its files."""
    outcome = step(begin(), snapshot(110, root(10), reading(7, 5)))
    assert not row(outcome, 7).known >> READ & 1
    gone = step(persisted(outcome.baseline), snapshot(120, root(20)))
    assert not row(gone, 7).known >> READ & 1, "what was never known is not a known zero at the end either"
    full = reading(7, 8, io={"8:0": (4096, 0, 1, 0)}, counters={"cpu_throttled_ns": 30, "oom_kills": 2})
    outcome = step(persisted(outcome.baseline), snapshot(120, root(20), full))
    values = {
        name: row(outcome, 7).values[BIT[name]] for name in ("cpu_usage_ns", "cpu_throttled_ns", "oom_kills")
    }
    assert values == {"cpu_usage_ns": 3, "cpu_throttled_ns": 30, "oom_kills": 2}
    assert row(outcome, 7).values[READ] == 4096
    assert row(outcome, 7).known >> READ & 1


def test_a_unit_born_within_the_interval_is_counted_from_zero() -> None:
    outcome = step(begin(), snapshot(110, root(900), reading(7, 900)))
    assert cpu(outcome, 7) == 900
    assert row(outcome, 7).flags & pb.ROW_FLAG_PARTIAL
    assert row(outcome, 7).opens
    assert row(outcome, 7).counters_before[0] == 0


def test_a_recreated_cgroup_under_the_same_path_is_another_unit() -> None:
    before = begin(reading(7, 5_000, path="/a"), host=root(5_000))
    outcome = step(before, snapshot(110, root(5_300), reading(8, 300, path="/a")))
    assert cpu(outcome, 8) == 300
    assert cpu(outcome, 7) == 0
    assert row(outcome, 7).flags & pb.ROW_FLAG_FINAL


def test_what_nested_units_used_is_taken_off_the_unit_around_them() -> None:
    before = begin(reading(7, 0), reading(8, 0, around=7), reading(9, 0, around=8))
    taken = snapshot(110, root(100), reading(7, 90), reading(8, 60, around=7), reading(9, 25, around=8))
    outcome = step(before, taken)
    assert [cpu(outcome, i) for i in (1, 7, 8, 9)] == [10, 30, 35, 25]


def test_oom_kills_are_taken_off_the_outer_unit_only_where_the_kernel_counts_them_there_too() -> None:
    def kills(cgroup_id: int, count: int, around: int = 1) -> Reading:
        return reading(cgroup_id, 0, around=around, counters={"oom_kills": count})

    bit = BIT["oom_kills"]
    before = begin(kills(7, 0), kills(8, 0, around=7))
    v2 = step(before, snapshot(110, root(0), kills(7, 3), kills(8, 2, around=7)))
    assert [row(v2, i).values[bit] for i in (7, 8)] == [1, 2]
    before = begin(kills(7, 0), kills(8, 0, around=7))
    taken = snapshot(110, root(0), kills(7, 3), kills(8, 2, around=7))
    v1 = step(before, msgspec.structs.replace(taken, nested_oom_kills=False))
    assert [row(v1, i).values[bit] for i in (7, 8)] == [3, 2]


def test_an_inner_unit_counted_ahead_of_the_outer_one_leaves_a_deficit_and_no_negative_row() -> None:
    outcome = step(begin(reading(7, 0)), snapshot(110, root(80), reading(7, 100)))
    assert [cpu(outcome, i) for i in (1, 7)] == [0, 100]
    assert deficit(outcome) == 20
    later = step(outcome.baseline, snapshot(120, root(200), reading(7, 100)))
    assert cpu(later, 1) == 100
    assert deficit(later) == 0


def test_the_deficit_of_a_unit_that_ends_goes_to_the_unit_around_it() -> None:
    before = begin(reading(7, 0), reading(8, 0, around=7))
    ahead = step(before, snapshot(110, root(50), reading(7, 50), reading(8, 70, around=7)))
    assert deficit(ahead) == 20
    ended = step(ahead.baseline, snapshot(120, root(90)))
    later = step(ended.baseline, snapshot(130, root(130)))
    assert deficit(later) == 0
    assert sum(u.values[CPU] for o in (ahead, ended, later) for u in o.usages) == 130


def test_a_counter_that_falls_was_reset_and_counts_from_zero() -> None:
    outcome = step(begin(reading(7, 900)), snapshot(110, root(1_000), reading(7, 30)))
    assert cpu(outcome, 7) == 30
    assert row(outcome, 7).flags & pb.ROW_FLAG_COUNTER_RESET


def test_scaled_user_time_may_step_back_and_catch_up_without_being_counted_twice() -> None:
    def user(value: int) -> Reading:
        return reading(7, 1_000, counters={"cpu_user_ns": value})

    first = step(begin(user(500)), snapshot(110, root(0), user(490)))
    second = step(first.baseline, snapshot(120, root(0), user(505)))
    bit = BIT["cpu_user_ns"]
    assert [row(o, 7).values[bit] for o in (first, second)] == [0, 5]
    assert not row(first, 7).flags & pb.ROW_FLAG_COUNTER_RESET


def test_a_counter_unreadable_once_is_unknown_then_and_whole_later() -> None:
    first = step(begin(reading(7, 100)), snapshot(110, root(1_000), reading(7, None)))
    assert not row(first, 7).known >> CPU & 1
    second = step(first.baseline, snapshot(120, root(2_000), reading(7, 450)))
    assert cpu(second, 7) == 350
    assert sum(u.values[CPU] for o in (first, second) for u in o.usages) == 2_000


def test_counters_missing_at_the_end_of_a_reading_are_unknown_then_and_whole_later() -> None:
    """As when a source that gave more counters than another is away for one reading."""
    whole = reading(7, 100, counters={"psi_io_full_ns": 500})
    short = msgspec.structs.replace(reading(7, 150), counters=(150,))
    back = reading(7, 180, counters={"psi_io_full_ns": 700})
    bit = BIT["psi_io_full_ns"]
    first = step(begin(whole), snapshot(110, root(0), short))
    assert not row(first, 7).known >> bit & 1
    second = step(persisted(first.baseline), snapshot(120, root(0), back))
    third = step(second.baseline, snapshot(130, root(0), back))
    assert [row(o, 7).values[bit] for o in (first, second, third)] == [0, 200, 0]
    assert [cpu(o, 7) for o in (first, second, third)] == [50, 30, 0]


def test_an_outer_counter_unreadable_once_does_not_bill_the_inner_unit_twice() -> None:
    before = begin(reading(7, 0), reading(8, 0, around=7))
    first = step(before, snapshot(110, root(100), reading(7, None), reading(8, 40, around=7)))
    second = step(first.baseline, snapshot(120, root(200), reading(7, 90), reading(8, 70, around=7)))
    assert cpu(first, 7) == 0
    assert cpu(first, 8) + cpu(second, 8) == 70
    assert cpu(second, 7) == 20
    assert sum(u.values[CPU] for o in (first, second) for u in o.usages) == 200 + deficit(second)


def test_unknown_is_never_zero() -> None:
    outcome = step(begin(reading(7, 0)), snapshot(110, root(10), reading(7, 10)))
    known = row(outcome, 7).known
    for name in (
        "memory_byte_seconds",
        "io_read_bytes",
        "pids_peak",
        "psi_io_some_ns",
        "net_rx_external_bytes",
    ):
        assert not known >> BIT[name] & 1, name


def test_a_unit_not_seen_in_an_incomplete_reading_goes_on_where_it_was() -> None:
    hidden = step(begin(reading(7, 100)), snapshot(110, root(50), complete=False))
    assert [u.cgroup_id for u in hidden.usages] == [1]
    back = step(hidden.baseline, snapshot(120, root(500), reading(7, 400)))
    assert cpu(back, 7) == 300
    assert not row(back, 7).flags & pb.ROW_FLAG_PARTIAL


def test_a_unit_that_an_incomplete_reading_missed_is_not_billed_for_its_whole_life() -> None:
    before = usage.begin(snapshot(100, root(10_000), complete=False), "test", everybody, [])
    found = step(before, snapshot(110, root(10_500), reading(7, 9_000)))
    assert [cpu(found, i) for i in (1, 7)] == [500, 0]
    assert row(found, 7).opens
    assert row(found, 7).counters_before[0] == 9_000
    later = step(found.baseline, snapshot(120, root(10_800), reading(7, 9_200)))
    assert [cpu(later, i) for i in (1, 7)] == [100, 200]


def test_a_reading_right_after_a_boundary_ends_when_it_was_taken() -> None:
    first = step(begin(at=100), snapshot(110.02, root(0)))
    second = step(first.baseline, snapshot(110.5, root(0)))
    assert first.interval.end_unix_ns == WALL + 110 * SECOND
    assert second.interval.end_unix_ns == WALL + round(110.5 * SECOND)


def test_io_is_counted_per_device_and_taken_off_the_unit_around() -> None:
    before = begin(
        reading(7, 0, io={"8:0": (100, 0, 1, 0)}),
        reading(8, 0, around=7, io={}),
        host=root(0, io={"8:0": (100, 0, 1, 0)}),
    )
    taken = snapshot(
        110,
        root(0, io={"8:0": (1_100, 50, 11, 5)}),
        reading(7, 0, io={"8:0": (900, 50, 9, 5)}),
        reading(8, 0, around=7, io={"8:0": (600, 0, 6, 0)}),
    )
    outcome = step(before, taken)
    assert [row(outcome, i).values[READ] for i in (1, 7, 8)] == [200, 200, 600]
    assert row(outcome, 8).devices == {"8:0": (600, 0, 6, 0)}


def test_a_device_that_disappears_and_returns_is_not_counted_twice() -> None:
    first = step(
        begin(reading(7, 0, io={"8:0": (100, 0, 1, 0)})), snapshot(110, root(0), reading(7, 0, io={}))
    )
    second = step(first.baseline, snapshot(120, root(0), reading(7, 0, io={"8:0": (150, 0, 2, 0)})))
    assert row(second, 7).values[READ] == 50


def test_the_interval_ends_at_the_boundary_it_was_meant_for() -> None:
    outcome = step(begin(at=100), snapshot(110.3, root(0)))
    assert outcome.interval.end_unix_ns == WALL + 110 * SECOND
    assert outcome.interval.duration_ns == round(10.3 * SECOND)


def test_a_tenant_that_changes_pays_from_the_cut_on() -> None:
    owner = {"name": "acme"}

    def tenant_of(r: Reading) -> str:
        return owner["name"] if r.cgroup_id != 1 else "host"

    before = usage.begin(snapshot(100, root(0), reading(7, 0)), "test", tenant_of, [])
    owner["name"] = "globex"
    first = usage.step(before, snapshot(110, root(10), reading(7, 10)), tenant_of, CADENCE)
    second = usage.step(first.baseline, snapshot(120, root(30), reading(7, 30)), tenant_of, CADENCE)
    assert (row(first, 7).tenant, cpu(first, 7)) == ("acme", 10)
    assert (row(second, 7).tenant, cpu(second, 7)) == ("globex", 20)


def test_memory_is_the_integral_of_its_samples_with_the_error_bound_beside_it() -> None:
    before = begin(reading(7, 0, memory_current_bytes=100, memory_inactive_file_bytes=40))
    usage.observe(before, 105 * SECOND, {7: (300, 100, 4)}, CADENCE)
    taken = snapshot(110, root(0), reading(7, 0, memory_current_bytes=300, memory_inactive_file_bytes=100))
    unit = row(step(before, taken), 7)
    assert unit.values[MEMORY] == (100 + 300) * 5 // 2 + 300 * 5
    assert unit.values[BIT["memory_working_set_byte_seconds"]] == (60 + 200) * 5 // 2 + 200 * 5
    assert unit.values[BIT["memory_error_byte_seconds"]] == 200 * 5 // 2
    assert unit.values[BIT["memory_peak_bytes"]] == 300
    assert unit.values[BIT["pids_peak"]] == 4
    assert unit.flags & pb.ROW_FLAG_MEMORY_ESTIMATED


def test_memory_of_the_host_is_sampled_like_any_units_and_what_units_held_is_taken_off() -> None:
    def held(cgroup_id: int, current: int) -> Reading:
        return reading(cgroup_id, 0, memory_current_bytes=current, memory_inactive_file_bytes=0)

    before = begin(held(7, 100), host=held(1, 500))
    for at, host, unit in ((103, 900, 300), (106, 700, 300)):
        usage.observe(before, at * SECOND, {1: (host, 0, None), 7: (unit, 0, 2)}, CADENCE)
    outcome = step(before, snapshot(110, held(1, 700), held(7, 200)))
    whole = (500 + 900) * 3 // 2 + (900 + 700) * 3 // 2 + 700 * 4
    of_unit = (100 + 300) * 3 // 2 + 300 * 3 + (300 + 200) * 4 // 2
    assert [row(outcome, i).values[MEMORY] for i in (7, 1)] == [of_unit, whole - of_unit]
    assert not row(outcome, 1).flags & pb.ROW_FLAG_MEMORY_ESTIMATED
    assert row(outcome, 1).values[BIT["memory_peak_bytes"]] == 900


def test_more_than_sixty_four_gaps_become_one_that_spans_the_rest() -> None:
    gaps = [Gap(n, n + 1, int(pb.GAP_REASON_SPOOL_LOST), 2, str(n)) for n in range(100)]
    before = usage.begin(snapshot(100, root(0)), "test", everybody, gaps)
    found = step(before, snapshot(110, root(0))).gaps
    assert len(found) == usage.MAX_GAPS
    assert (found[-1].start_unix_ns, found[-1].end_unix_ns, found[-1].count) == (63, 100, 74)


def test_rows_held_back_are_merged_into_the_next_interval() -> None:
    first = step(begin(reading(7, 0)), snapshot(110, root(100), reading(7, 60)))
    held = persisted(usage.hold(first, fold_ended=False))
    second = step(held, snapshot(120, root(300), reading(7, 90)))
    assert (cpu(second, 7), cpu(second, 1)) == (90, 210)
    assert second.interval.start_unix_ns == WALL + 100 * SECOND
    assert second.interval.duration_ns == 20 * SECOND
    assert second.interval.flags & pb.BATCH_FLAG_LONG_INTERVAL
    assert row(second, 7).opens


def test_a_new_epoch_opens_every_unit_at_its_counters_also_rows_that_wait() -> None:
    first = step(begin(reading(7, 1_000)), snapshot(110, root(0), reading(7, 1_600)))
    second = step(first.baseline, snapshot(120, root(0), reading(7, 1_700)))
    again = usage.reopen(usage.hold(second, fold_ended=False))
    third = step(persisted(again), snapshot(130, root(0), reading(7, 1_800)))
    assert row(third, 7).opens
    assert row(third, 7).counters_before[0] == 1_600
    assert cpu(third, 7) == 200
    assert not row(step(third.baseline, snapshot(140, root(0), reading(7, 1_800))), 7).opens


def test_sources_may_change_at_one_instant_without_losing_what_is_owed() -> None:
    ahead = step(begin(reading(7, 0)), snapshot(110, root(60), reading(7, 100)))
    assert deficit(ahead) == 40
    changed = usage.rebase(ahead.baseline, snapshot(110, root(9_000), reading(7, 5_000)), "other", everybody)
    later = step(changed, snapshot(120, root(9_500), reading(7, 5_100)))
    assert changed.sources == "other"
    assert cpu(later, 7) == 100
    assert cpu(later, 1) == 400 - 40


def test_a_baseline_with_a_sample_of_a_terabyte_in_it_can_be_persisted() -> None:
    """As when an epoch is opened between two readings."""
    tera = 1 << 40
    held = reading(7, 0, memory_current_bytes=tera, memory_inactive_file_bytes=0)
    baseline = begin(held, host=root(0, memory_current_bytes=0))
    usage.observe(baseline, 104 * SECOND, {7: (tera, 0, 1)}, CADENCE)
    outcome = step(persisted(baseline), snapshot(110, root(0, memory_current_bytes=0), held))
    assert row(outcome, 7).values[MEMORY] == tera * 10
    # The root has not counted it: what it owes is a terabyte for ten seconds.
    later = step(persisted(outcome.baseline), snapshot(120, root(0, memory_current_bytes=2 * tera), held))
    last = step(persisted(later.baseline), snapshot(130, root(0, memory_current_bytes=2 * tera), held))
    assert [row(o, 1).values[MEMORY] for o in (outcome, later, last)] == [0, 0, 0]
