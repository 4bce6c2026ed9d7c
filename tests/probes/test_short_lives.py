"""Ten thousand containers of a few milliseconds: each delivered exactly once, to the microsecond of the kernel's own file."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import probe_set, short_lives
from bench.cgroups import Cgroup
from bench.probe_set import ProbeSet
from bench.site import Site
from collector.handoff.log import Kind, Record, scan
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb

LIVES = 10_000
WORKERS = 4
KILLS = 20

pytestmark = [pytest.mark.chaos, pytest.mark.root, pytest.mark.timeout(900)]


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[ProbeSet]:
    with probe_set.loaded(tmp_path) as probes:
        yield probes


@pytest.fixture
def running(site: Site, loaded: ProbeSet) -> Site:
    site.prepare(agent={"read": {"probes_dir": str(loaded.directory)}})
    site.start_collector()
    site.enroll()
    site.start_agent()
    site.wait_metering()
    return site


class Lives:
    """Third after third of the short lives, and what the kernel's file said of each."""

    def __init__(self, program: Path, ours: Cgroup) -> None:
        self.said: dict[int, int] = {}
        self._program = program
        self._ours = ours
        self._made = 0

    def start(self, count: int) -> subprocess.Popen[str]:
        first, self._made = self._made, self._made + count
        return short_lives.start(self._program, self._ours, first, count, WORKERS)

    def finish(self, process: subprocess.Popen[str]) -> None:
        said = short_lives.usage_ns(process)
        assert not said.keys() & self.said.keys()
        self.said |= said

    def live(self, count: int) -> None:
        self.finish(self.start(count))


@pytest.fixture
def lives(tmp_path: Path, ours: Cgroup) -> Lives:
    return Lives(short_lives.build(tmp_path), ours)


def delivered(site: Site) -> tuple[dict[int, int], dict[int, int], set[int], int]:
    """(CPU ns by cgroup, last rows by cgroup, whose tail was unseen, Σ rows - host - deficit)."""
    # The release of a cgroup comes some time after its removal.
    time.sleep(4)
    assert site.stop("agent") == 0, site.journal("agent")[-2_000:]
    assert site.stop("collector") == 0, site.journal("collector")[-2_000:]
    cpu: dict[int, int] = defaultdict(int)
    last: dict[int, int] = defaultdict(int)
    unseen: set[int] = set()
    rows = host = deficit = 0
    for record in scan(site.directory / "collector" / "log"):
        assert isinstance(record, Record), record
        if record.kind is not Kind.ACCEPTED:
            continue
        batch = pb.UsageBatch.FromString(record.body)
        for row, cgroup_id in enumerate(table_of(batch).cgroup_id):
            cpu[cgroup_id] += batch.cpu_usage_ns[row] if batch.cpu_usage_ns else 0
            if batch.row_flags[row] & pb.ROW_FLAG_FINAL:
                last[cgroup_id] += 1
                if batch.row_flags[row] & pb.ROW_FLAG_TAIL_UNSEEN:
                    unseen.add(cgroup_id)
        rows += sum(batch.cpu_usage_ns)
        if batch.HasField("host_totals"):
            host += batch.host_totals.cpu_usage_ns
            deficit = batch.host_totals.cpu_deficit_ns
    return cpu, last, unseen, rows - host - deficit


def exactly_delivered(site: Site, lives: Lives) -> int:
    """How many lives came in once, ended, seen to their end, and to the microsecond of the kernel's file; prints the others."""
    cpu, last, unseen, left_over = delivered(site)
    exact = {
        i
        for i, said in lives.said.items()
        if i in cpu and abs(cpu[i] - said) <= 1_000 and last[i] == 1 and i not in unseen
    }
    for i in sorted(lives.said.keys() - exact)[:5]:
        print(f"{i}: {cpu.get(i)} delivered of {lives.said[i]}, {last[i]} last rows, unseen: {i in unseen}")
    assert left_over == 0, "the rows of the host are not what the host counted"
    return len(exact)


def nothing_left_over(loaded: ProbeSet) -> bool:
    """No map was full, and the agent emptied them but for what other cgroups of this machine left since its last reading."""
    status = loaded.status()
    print(status["overflow"], status["maps"]["tombstones"])
    return (
        not any(status["overflow"][kind] for kind in ("births", "tombstones", "network_skbs"))
        and status["maps"]["tombstones"]["elements"] < LIVES / 10
    )


def test_every_short_life_is_delivered_once_and_exactly(
    running: Site, lives: Lives, loaded: ProbeSet
) -> None:
    lives.live(LIVES)
    assert exactly_delivered(running, lives) == LIVES
    assert nothing_left_over(loaded)


def test_what_lived_while_no_agent_ran_is_delivered_too(
    running: Site, lives: Lives, loaded: ProbeSet
) -> None:
    lives.live(LIVES // 3)
    assert running.stop("agent") == 0
    lives.live(LIVES // 3)
    running.start_agent()
    lives.live(LIVES - LIVES // 3 * 2)
    assert exactly_delivered(running, lives) == LIVES
    assert nothing_left_over(loaded)


def test_kill_nine_loses_and_repeats_nothing(running: Site, lives: Lives, loaded: ProbeSet) -> None:
    rng = random.Random(7)
    process = lives.start(LIVES)
    for _ in range(KILLS):
        time.sleep(rng.uniform(0.2, 2.5))
        running.stop("agent", signal.SIGKILL)
        running.start_agent()
    running.wait_metering()
    lives.finish(process)
    assert exactly_delivered(running, lives) == LIVES
    assert nothing_left_over(loaded)
