"""Edges: reboot, the last reading, clock steps, and memory while nobody looked."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.meter import usage
from bench.site import Site
from collector.log_commands import verify
from tests.agent.fakehost import CONTAINER, FakeHost
from tests.agent.metering import Metering, cpu_of, gaps_of, openings_of
from tests.agent.readings import BOOT_B, CADENCE, SECOND, WALL, everybody, reading, root, snapshot
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb


def test_edge_reboot_bills_the_new_boot_from_zero_and_bounds_what_the_reset_took(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    metering.tick()
    metering.stop()
    fake.boot("22222222-bbbb-4bbb-8bbb-222222222222")
    fake.cpu("/", 700)
    fake.cpu(CONTAINER, 300)
    metering.start()
    batches = metering.tick()
    (gap,) = gaps_of(batches)
    assert gap.reason == pb.GAP_REASON_REBOOT
    assert gap.start_unix_ns <= gap.end_unix_ns
    assert {b.boot_id for b in batches} == {"22222222-bbbb-4bbb-8bbb-222222222222"}
    assert all(b.flags & pb.BATCH_FLAG_AFTER_REBOOT for b in batches)
    assert cpu_of(batches, CONTAINER) == 300_000
    assert cpu_of(batches, "/") == 400_000
    metering.stop()


def test_edge_reboot_never_merges_rows_of_two_boots_that_could_not_be_committed() -> None:
    before = usage.begin(snapshot(100, root(0), reading(7, 0)), "t", everybody, [])
    held = usage.hold(
        usage.step(before, snapshot(110, root(9), reading(7, 9)), everybody, CADENCE), fold_ended=True
    )
    after = usage.step(
        held, snapshot(5, root(4), reading(7, 4), boot="other", wall=WALL + 200 * SECOND), everybody, CADENCE
    )
    assert [
        (s.boot_id[:5], [u.values[0] for u in s.usages if u.cgroup_id == 7]) for s in after.stretches
    ] == [
        ("aaaaa", [9]),
        ("other", [4]),
    ]


@pytest.mark.root
def test_edge_sigterm_takes_a_last_reading(site: Site) -> None:
    site.prepare(agent={"meter": {"interval": "1h", "memory_sample": "1h"}})
    site.start_collector()
    site.enroll()
    site.start_agent()
    site.wait_metering()
    time.sleep(0.5)
    site.stop("agent")
    site.stop("collector")
    assert verify(site.directory / "collector" / "log").batches >= 1


@pytest.mark.parametrize("step_seconds", [-86_400, -3_600, -5, 5, 3_600, 86_400 * 365])
def test_edge_clock_step_never_makes_intervals_overlap_and_durations_stay_true(step_seconds: int) -> None:
    baseline = usage.begin(snapshot(100, root(0)), "t", everybody, [])
    last_end = baseline.end_unix_ns
    stepped = []
    for n in range(1, 6):
        offset = step_seconds * SECOND if n >= 3 else 0
        taken = snapshot(100 + 10 * n, root(n), wall=WALL + (100 + 10 * n) * SECOND + offset)
        outcome = usage.step(baseline, taken, everybody, CADENCE)
        interval = outcome.interval
        assert interval.start_unix_ns == last_end
        assert interval.end_unix_ns > interval.start_unix_ns
        assert interval.duration_ns == 10 * SECOND
        last_end = interval.end_unix_ns
        stepped.append(
            interval.flags & (pb.BATCH_FLAG_CLOCK_STEPPED_BACK | pb.BATCH_FLAG_CLOCK_STEPPED_FORWARD)
        )
        baseline = outcome.baseline
    wanted = pb.BATCH_FLAG_CLOCK_STEPPED_FORWARD if step_seconds > 0 else pb.BATCH_FLAG_CLOCK_STEPPED_BACK
    assert stepped == [0, 0, wanted, 0, 0]


def test_edge_clock_boundaries_are_multiples_of_the_interval() -> None:
    baseline = usage.begin(snapshot(103.7, root(0)), "t", everybody, [])
    ends = []
    for late in (110.02, 120.4, 130.001):
        outcome = usage.step(baseline, snapshot(late, root(0)), everybody, CADENCE)
        ends.append(outcome.interval.end_unix_ns)
        baseline = outcome.baseline
    assert all(end % (10 * SECOND) == 0 for end in ends)


def test_edge_memory_while_the_agent_was_down_is_a_trapezoid_marked_and_bounded(
    fake: FakeHost, tmp_path: Path
) -> None:
    fake.memory(CONTAINER, 1_000_000)
    fake.write(CONTAINER, "memory.peak", "1000000\n")
    interval = {"interval": 1, "memory_sample": 0.1}
    metering = Metering(fake, tmp_path / "state", meter=interval)
    metering.stop()
    fake.memory(CONTAINER, 3_000_000)
    fake.write(CONTAINER, "memory.peak", "5000000\n")
    time.sleep(1.2)
    metering.start()
    batches = metering.tick()
    batch = next(b for b in batches if CONTAINER in table_of(b).cgroup_path)
    row = list(table_of(batch).cgroup_path).index(CONTAINER)
    seconds = batch.interval_duration_ns / SECOND
    assert batch.flags & pb.BATCH_FLAG_AGENT_WAS_DOWN
    assert batch.row_flags[row] & pb.ROW_FLAG_MEMORY_ESTIMATED
    assert batch.memory_byte_seconds[row] == pytest.approx(2_000_000 * seconds, rel=0.01)
    assert batch.memory_error_byte_seconds[row] == pytest.approx(1_000_000 * seconds, rel=0.01)
    assert batch.memory_peak_bytes[row] == 5_000_000
    assert batch.memory_byte_seconds[row] <= batch.memory_peak_bytes[row] * seconds
    metering.stop()


@pytest.mark.parametrize("step_seconds", [-86_400, -3_600, -61 - 10])
def test_edge_a_clock_set_far_back_begins_an_epoch_at_its_own_time(step_seconds: int) -> None:
    before = usage.begin(snapshot(100, root(0), reading(7, 3)), "t", everybody, [])
    taken = snapshot(110, root(9), reading(7, 5), wall=WALL + (110 + step_seconds) * SECOND)
    followed = usage.follow_clock(before, taken)
    assert followed is not None
    outcome = usage.step(followed, taken, everybody, CADENCE)
    assert outcome.interval.start_unix_ns == WALL + (100 + step_seconds) * SECOND
    assert outcome.interval.end_unix_ns == WALL + (110 + step_seconds) * SECOND
    assert outcome.interval.duration_ns == 10 * SECOND
    assert outcome.interval.flags & pb.BATCH_FLAG_CLOCK_STEPPED_BACK
    assert {u.cgroup_id: u.values[0] for u in outcome.usages} == {7: 2, 1: 7}
    assert all(u.opens for u in outcome.usages)


@pytest.mark.parametrize("step_seconds", [-70, -5, 0, 3_600])
def test_edge_a_clock_less_than_a_minute_behind_what_was_written_is_waited_for(step_seconds: int) -> None:
    before = usage.begin(snapshot(100, root(0)), "t", everybody, [])
    taken = snapshot(110, root(9), wall=WALL + (110 + step_seconds) * SECOND)
    assert usage.follow_clock(before, taken) is None


def test_edge_rows_that_wait_for_a_commit_go_before_the_clock_is_followed() -> None:
    before = usage.begin(snapshot(100, root(0)), "t", everybody, [])
    held = usage.hold(usage.step(before, snapshot(110, root(9)), everybody, CADENCE), fold_ended=True)
    assert usage.follow_clock(held, snapshot(120, root(10), wall=WALL - 3_600 * SECOND)) is None


def test_edge_a_reboot_with_a_clock_set_far_back_starts_at_the_boot_as_that_clock_has_it() -> None:
    before = usage.begin(snapshot(100, root(0), reading(7, 3)), "t", everybody, [])
    wall = WALL - 3_600 * SECOND
    taken = snapshot(5, root(4), boot=BOOT_B, wall=wall)
    followed = usage.follow_clock(before, taken)
    assert followed is not None
    outcome = usage.step(followed, taken, everybody, CADENCE)
    assert outcome.interval.start_unix_ns == wall - 5 * SECOND
    assert outcome.interval.end_unix_ns == wall
    assert [gap.reason for gap in outcome.gaps] == [pb.GAP_REASON_REBOOT]
    assert all(gap.start_unix_ns <= gap.end_unix_ns for gap in outcome.gaps)


class Clock:
    """The wall clock of a test: the true one, and what somebody has added to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        true = time.time_ns
        self.ahead_seconds = 0
        monkeypatch.setattr(time, "time_ns", lambda: true() + self.ahead_seconds * SECOND)


def test_edge_what_is_used_while_the_clock_goes_ahead_and_back_is_written_once_at_the_time_it_says(
    fake: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    metering = Metering(fake, tmp_path / "state")
    used = 0
    epochs = []
    for ahead_seconds in (0, 10_800, 0, 0, 10_800, 0):
        clock.ahead_seconds = ahead_seconds
        used += 100
        fake.cpu("/", used + 10_000)
        fake.cpu(CONTAINER, used)
        batches = metering.tick()
        now = time.time_ns()
        epochs.append(batches[0].epoch)
        late = [batch.interval_end_unix_ns - now for batch in batches]
        # Once an hour a clock that was set back is followed; the second time, time stands still.
        assert all((abs(ns) < 60 * SECOND) == (len(epochs) < 6) for ns in late)
    first, second = epochs[0], epochs[2]
    assert epochs == [first, first, second, second, second, second]
    assert second > first
    written = metering.batches()
    metering.stop()
    assert cpu_of(written, CONTAINER) == used * 1_000
    reopened = next(b for b in written if b.epoch == second and openings_of(b))
    assert openings_of(reopened)[CONTAINER] == 200_000


def test_edge_a_kill_right_after_the_clock_was_followed_neither_loses_nor_repeats(
    fake: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    metering = Metering(fake, tmp_path / "state")
    clock.ahead_seconds = 10_800
    fake.cpu("/", 10_100)
    fake.cpu(CONTAINER, 100)
    metering.tick()
    clock.ahead_seconds = 0
    fake.cpu("/", 10_200)
    fake.cpu(CONTAINER, 200)
    monkeypatch.setattr(metering.loop, "_commit", lambda *_: False)
    metering.tick()
    metering.restart()
    batches = metering.tick()
    metering.stop()
    assert {b.seq for b in batches} >= {1}
    assert all(abs(b.interval_end_unix_ns - time.time_ns()) < 60 * SECOND for b in batches)
    assert cpu_of(batches, CONTAINER) == 100_000
