"""kill -9 of agent and collector at random moments, over real burners in real cgroups: not a microsecond is lost or doubled."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from subprocess import Popen

import pytest

from bench.cgroups import Cgroup, burner, spawner
from bench.site import Site
from collector.handoff.log import Kind, Record, scan
from collector.log_commands import verify
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb

AGENT_KILLS, COLLECTOR_KILLS = 50, 20

pytestmark = [pytest.mark.chaos, pytest.mark.root, pytest.mark.timeout(600)]


@pytest.fixture
def workloads(ours: Cgroup) -> Iterator[dict[Cgroup, Popen[bytes]]]:
    """Burners and a spawner; more are born during the run."""
    running: dict[Cgroup, Popen[bytes]] = {}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


def test_delivered_cpu_equals_the_kernels_final_value_for_every_cgroup_that_lived(
    site: Site, ours: Cgroup, workloads: dict[Cgroup, Popen[bytes]]
) -> None:
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    print(f"seed {seed}")
    site.prepare()
    site.start_collector()
    site.enroll()
    site.start_agent()
    site.wait_metering()
    collector_kills = 0
    for kill in range(AGENT_KILLS):
        if kill % 10 == 0:
            born = ours.child(f"wb-chaos-{kill}.scope")
            workloads[born] = born.run(spawner(0.01) if kill == 20 else burner(0.1))
        time.sleep(rng.uniform(0.0, 1.8))
        if collector_kills < COLLECTOR_KILLS and kill % 2:
            site.stop("collector", signal.SIGKILL)
            collector_kills += 1
            if rng.random() < 0.5:
                site.stop("agent", signal.SIGKILL)
                site.start_collector()
                site.start_agent()
                continue
            site.start_collector()
            time.sleep(rng.uniform(0.0, 1.8))
        site.stop("agent", signal.SIGKILL)
        site.start_agent()
    site.wait_metering()
    final = {}
    for cgroup, process in workloads.items():
        for pid in cgroup.pids():
            os.kill(pid, signal.SIGKILL)
        process.wait()
        cgroup.wait_empty()
        final[cgroup.cgroup_id] = cgroup.cpu_usage_ns()
    time.sleep(2.5)
    assert site.stop("agent") == 0, site.journal("agent")[-2_000:]
    assert site.stop("collector") == 0, site.journal("collector")[-2_000:]

    delivered: dict[int, int] = defaultdict(int)
    seen: set[tuple[int, int]] = set()
    sum_of_rows = host = deficit = 0
    for record in scan(site.directory / "collector" / "log"):
        assert isinstance(record, Record), record
        if record.kind is not Kind.ACCEPTED:
            assert record.kind is Kind.ADOPTED, record
            continue
        assert (record.epoch, record.seq) not in seen
        seen.add((record.epoch, record.seq))
        batch = pb.UsageBatch.FromString(record.body)
        for row, cgroup_id in enumerate(table_of(batch).cgroup_id):
            delivered[cgroup_id] += batch.cpu_usage_ns[row] if batch.cpu_usage_ns else 0
        sum_of_rows += sum(batch.cpu_usage_ns)
        if batch.HasField("host_totals"):
            host += batch.host_totals.cpu_usage_ns
            deficit = batch.host_totals.cpu_deficit_ns
    verdict = verify(site.directory / "collector" / "log")
    assert verdict.sound, verdict
    assert verdict.batches == len(seen) >= 10, "hardly anything was delivered between the kills"
    assert verdict.streams == 1, "no crash may cost an epoch"
    assert collector_kills == COLLECTOR_KILLS
    assert len(final) == 5
    assert all(ns > 50_000_000 for ns in final.values()), "a workload did nothing, so nothing was compared"
    assert {cgroup_id: delivered[cgroup_id] for cgroup_id in final} == final
    assert sum_of_rows == host + deficit
