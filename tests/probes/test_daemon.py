"""The daemon with the kernel probes: what it says of them, and what its batches say."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import probe_set
from bench.cgroups import Cgroup, burner
from bench.probe_set import ProbeSet
from bench.site import Site
from collector.handoff.log import Kind, Record, scan
from wire.measures import BIT
from wire.v1 import usage_pb2 as pb

pytestmark = pytest.mark.root

SEEN = pb.COVERAGE_EXITS | pb.COVERAGE_NETWORK


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[ProbeSet]:
    with probe_set.loaded(tmp_path) as probes:
        yield probes


def start(site: Site, loaded: ProbeSet) -> None:
    site.prepare(agent={"read": {"probes_dir": str(loaded.directory)}})
    site.start_collector()
    site.enroll()
    site.start_agent()
    site.wait_metering()


def finding(site: Site, check: str) -> dict[str, str]:
    lines = site.command("agent", "doctor", "--json", check=False).stdout.splitlines()
    found: dict[str, str] = next(f for line in lines if (f := json.loads(line))["check"] == check)
    return found


def metrics(site: Site) -> list[str]:
    started = next(
        e for line in site.journal("agent").splitlines() if (e := json.loads(line))["event"] == "started"
    )
    with urllib.request.urlopen(f"http://127.0.0.1:{started['local_port']}/metrics", timeout=10) as answer:
        return [line for line in answer.read().decode().splitlines() if "_probe" in line and line[0] != "#"]


def test_status_doctor_metrics_and_batches_say_whether_the_probes_are_there(
    site: Site, loaded: ProbeSet, ours: Cgroup
) -> None:
    unit = ours.child("wb-busy.scope")
    process = unit.run(burner(0.1))
    try:
        start(site, loaded)
        time.sleep(3)
        status = site.ask("agent", "status")
        assert status["probes"] == "attached"
        assert status["probes_walk"] in ("css", "cgroup_iterator", "table")
        assert not [sentence for sentence in status["unseen"] if "probes" in sentence]
        assert finding(site, "probes")["level"] == "ok"
        assert any('state="attached"' in line and line.endswith(" 1.0") for line in metrics(site))
        assert any('map="tombstones"' in line for line in metrics(site))
        (explained,) = site.ask("agent", "explain", container=unit.name)["found"]
        assert "net_rx_loopback_bytes" not in explained["unknown"]

        loaded.run("unload")
        time.sleep(2.5)
        status = site.ask("agent", "status")
        assert status["probes"] == "absent"
        found = finding(site, "probes")
        assert found["level"] == "warning"
        assert "weighbridge-probes load" in found["text"]
        assert '"probes_unavailable"' in site.journal("agent")
        assert site.ask("agent", "explain", container=unit.name)["found"]

        loaded.load()
        time.sleep(2.5)
        assert site.ask("agent", "status")["probes"] == "attached"
        assert site.stop("agent") == 0
        assert site.stop("collector") == 0
    finally:
        process.kill()
        process.wait()
    covered = []
    for record in scan(site.directory / "collector" / "log"):
        if isinstance(record, Record) and record.kind is Kind.ACCEPTED:
            batch = pb.UsageBatch.FromString(record.body)
            known = all(row >> BIT["net_tx_external_bytes"] & 1 for row in batch.known)
            covered.append((bool(batch.coverage & SEEN == SEEN), known))
            assert batch.coverage & SEEN in (0, SEEN)
    assert (True, True) in covered
    assert (False, False) in covered
    assert (True, False) not in covered
    assert covered[0] == covered[-1] == (True, True)
