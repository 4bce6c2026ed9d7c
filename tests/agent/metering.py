"""The metering loop over a fake host, ticked by hand; what it committed, decoded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from agent.config import Settings
from agent.daemon import _catalogue
from agent.loop import MeterLoop
from agent.ship.spool import Spool, StoredBatch
from agent.tally import Tally
from tests.agent.fakehost import FakeHost
from wire.containers import table_of
from wire.identity import AgentId
from wire.v1 import usage_pb2 as pb

AGENT = AgentId("11111111-2222-4333-8444-555555555555")


class Metering:
    """A spool and a loop that may be stopped, killed and started again over the same directory."""

    def __init__(self, fake: FakeHost, directory: Path, **settings: Any) -> None:
        base = {
            "read": {"cgroup_root": str(fake.cgroup_root), "proc_root": str(fake.proc_root)},
            "owners": {"host": "host", "default": "acme"},
        }
        self.settings = msgspec.convert(
            {**base, **settings}, Settings, dec_hook=lambda kind, value: kind(value)
        )
        self.directory = directory
        self.spool: Spool
        self.loop: MeterLoop
        self.start()

    def start(self, start_loop: bool = True) -> None:
        self.spool = Spool.open(self.directory, AGENT, self.settings.spool.max_bytes, time.time_ns())
        self.loop = MeterLoop(self.settings, self.spool, _catalogue(self.settings), Tally())
        if start_loop:
            self.loop.start()

    def tick(self) -> list[pb.UsageBatch]:
        """One interval; the batches it put into the spool."""
        before = {b.key for b in self.stored()}
        self.loop.tick()
        return [pb.UsageBatch.FromString(b.body) for b in self.stored() if b.key not in before]

    def stored(self) -> list[StoredBatch]:
        return self.spool.pending(None, 1_000_000, 1 << 40)

    def batches(self) -> list[pb.UsageBatch]:
        return [pb.UsageBatch.FromString(b.body) for b in self.stored()]

    def stop(self) -> None:
        self.loop.close()
        self.spool.close()

    def restart(self) -> None:
        self.stop()
        self.start()


def cpu_of(batches: list[pb.UsageBatch], path: str) -> int:
    """CPU time billed to a path, over all rows."""
    return sum(
        batch.cpu_usage_ns[row] if batch.cpu_usage_ns else 0
        for batch in batches
        for row, found in enumerate(table_of(batch).cgroup_path)
        if found == path
    )


def openings_of(batch: pb.UsageBatch) -> dict[str, int]:
    """Path -> cumulative CPU time at the start of its first row."""
    paths = table_of(batch).cgroup_path
    return {paths[o.row]: o.cpu_usage_ns for o in batch.openings}


def gaps_of(batches: list[pb.UsageBatch]) -> list[pb.Gap]:
    return [gap for batch in batches for gap in batch.gaps]
