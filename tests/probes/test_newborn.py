"""A container that ends before its first reading still has the name its runtime gave it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec
import pytest

from agent.config import Settings
from agent.daemon import _catalogue
from agent.loop import MeterLoop
from agent.ship.spool import Spool
from agent.tally import Tally
from bench import probe_set
from bench.cgroups import Cgroup
from tests.agent.metering import AGENT
from tests.agent.test_labels import ID, containers, docker
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb


@pytest.mark.root
@pytest.mark.timeout(60)
def test_labels_are_learned_while_a_short_container_lives(tmp_path: Path, ours: Cgroup) -> None:
    answer = containers({"Id": ID, "Names": ["/nightly"], "Labels": {"customer": "globex"}})
    raw = {
        "labels": {"docker_socket": str(tmp_path / "docker.sock")},
        "owners": {"rules": [{"label": {"customer": "*"}, "tenant_from": {"label": "customer"}}]},
    }
    with probe_set.loaded(tmp_path) as probes, contextlib.ExitStack() as stack:
        raw["read"] = {"probes_dir": str(probes.directory)}
        settings = msgspec.convert(raw, Settings, dec_hook=lambda kind, value: kind(value))
        spool = Spool.open(tmp_path / "spool", AGENT, settings.spool.max_bytes, time.time_ns())
        loop = MeterLoop(settings, spool, _catalogue(settings), Tally())
        try:
            assert loop.start()
            asked = stack.enter_context(docker(tmp_path / "docker.sock", answer))
            short = ours.child(f"docker-{ID}.scope")
            loop.meet_newborn()
            assert len(asked) == 1
            loop.meet_newborn()
            assert len(asked) == 1, "nobody new, and asked again"
            short.remove()
            while (found := loop.probes.tombstone(short.cgroup_id)) is None or not found.released_boottime_ns:
                time.sleep(0.02)
            loop.tick()
            rows = [
                (batch.tenant, table.name[row], batch.row_flags[row] & pb.ROW_FLAG_FINAL)
                for stored in spool.pending(None, 1_000, 1 << 30)
                for batch in [pb.UsageBatch.FromString(stored.body)]
                for table in [table_of(batch)]
                for row, cgroup_id in enumerate(table.cgroup_id)
                if cgroup_id == short.cgroup_id
            ]
            assert rows == [("globex", "nightly", pb.ROW_FLAG_FINAL)]
            assert loop.tally.ends >= 1
            assert loop.tally.ends_forgotten >= 1
        finally:
            loop.close()
            spool.close()
