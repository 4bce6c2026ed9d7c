"""Edges: reboot, the last reading, clock steps, and memory while nobody looked."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.meter import usage
from bench.site import Site
from collector.log_commands import verify
from tests.agent.fakehost import CONTAINER, FakeHost
from tests.agent.metering import Metering, cpu_of, gaps_of
from tests.agent.readings import CADENCE, SECOND, WALL, everybody, reading, root, snapshot
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
    batch = next(b for b in batches if CONTAINER in b.containers.cgroup_path)
    row = list(batch.containers.cgroup_path).index(CONTAINER)
    seconds = batch.interval_duration_ns / SECOND
    assert batch.flags & pb.BATCH_FLAG_AGENT_WAS_DOWN
    assert batch.row_flags[row] & pb.ROW_FLAG_MEMORY_ESTIMATED
    assert batch.memory_byte_seconds[row] == pytest.approx(2_000_000 * seconds, rel=0.01)
    assert batch.memory_error_byte_seconds[row] == pytest.approx(1_000_000 * seconds, rel=0.01)
    assert batch.memory_peak_bytes[row] == 5_000_000
    assert batch.memory_byte_seconds[row] <= batch.memory_peak_bytes[row] * seconds
    metering.stop()
