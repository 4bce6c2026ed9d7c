"""Ten thousand containers of a few milliseconds: each delivered exactly once, to the microsecond of the kernel's own file."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
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
WORKERS = 32
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


@dataclass
class Delivered:
    """What the collector's log holds of one host."""

    rows: dict[int, list[tuple[int, int]]]
    """Cgroup id -> (CPU ns, flags) of each row."""
    left_over_ns: int
    """Sum of the rows, less what the host counted and the deficit that its agent says."""

    @classmethod
    def of(cls, site: Site) -> Delivered:
        """Everything, once the agent has seen the last release, which comes some time after the removal."""
        time.sleep(4)
        assert site.stop("agent") == 0, site.journal("agent")[-2_000:]
        assert site.stop("collector") == 0, site.journal("collector")[-2_000:]
        rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
        host_ns = deficit_ns = 0
        for record in scan(site.directory / "collector" / "log"):
            assert isinstance(record, Record), record
            if record.kind is not Kind.ACCEPTED:
                continue
            batch = pb.UsageBatch.FromString(record.body)
            cgroup_ids = table_of(batch).cgroup_id
            cpu_ns = batch.cpu_usage_ns or [0] * len(cgroup_ids)
            for cgroup_id, ns, flags in zip(cgroup_ids, cpu_ns, batch.row_flags, strict=True):
                rows[cgroup_id].append((ns, flags))
            if batch.HasField("host_totals"):
                host_ns += batch.host_totals.cpu_usage_ns
                deficit_ns = batch.host_totals.cpu_deficit_ns
        total_ns = sum(ns for of_one in rows.values() for ns, _ in of_one)
        return cls(rows, total_ns - host_ns - deficit_ns)

    def exactly(self, cgroup_id: int, said_ns: int) -> bool:
        """Whether it came in once, ended, seen to its end, and to the microsecond of the kernel's file."""
        rows = self.rows.get(cgroup_id, [])
        flags = [flags for _, flags in rows]
        return (
            abs(sum(ns for ns, _ in rows) - said_ns) <= 1_000
            and sum(bool(f & pb.ROW_FLAG_FINAL) for f in flags) == 1
            and not any(f & (pb.ROW_FLAG_TAIL_UNSEEN | pb.ROW_FLAG_COUNTER_RESET) for f in flags)
        )


def exactly_delivered(site: Site, lives: Lives) -> int:
    """How many lives came in exactly; prints the others."""
    delivered = Delivered.of(site)
    others = [i for i, said in lives.said.items() if not delivered.exactly(i, said)]
    for i in sorted(others)[:5]:
        print(f"{i}: {lives.said[i]} ns said, (ns, flags) of its rows: {delivered.rows.get(i)}")
    assert delivered.left_over_ns == 0, "the rows of the host are not what the host counted"
    return len(lives.said) - len(others)


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
