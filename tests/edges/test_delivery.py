"""Edges: in flight, dying between hand-off and mark, one stream over many tenants."""

from __future__ import annotations

import signal
from pathlib import Path

from bench.fleet import Stream, enrol
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.log_commands import verify
from tests.agent.fakehost import FakeHost
from tests.agent.metering import Metering
from tests.collector.door import Door, statuses
from wire.limits import WINDOW
from wire.v1 import usage_pb2 as pb


def test_edge_in_flight_the_agents_window_is_never_wider_than_the_collectors(site: Site) -> None:
    site.prepare()
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    agent = enrol(door.authority)
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(WINDOW + 1)]
    # The whole window backwards, and one more: only the one beyond is asked to wait.
    beyond = door.deliver(agent, stream, [items[WINDOW]])
    assert statuses(beyond) == ["RETRY"]
    backwards = list(reversed(items[:WINDOW]))
    answers = door.deliver(agent, stream, backwards)
    assert statuses(answers) == ["ACCEPTED"] * WINDOW
    assert statuses(door.deliver(agent, stream, [items[WINDOW]])) == ["ACCEPTED"]
    assert verify(site.directory / "collector" / "log").sound


def test_edge_collector_dies_between_hand_off_and_mark_and_the_batch_is_there_once(site: Site) -> None:
    site.prepare()
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    agent = enrol(door.authority)
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(40)]
    door.deliver(agent, stream, items)
    # Killed before the checkpoint: the mark exists nowhere but in the log itself.
    site.stop("collector", signal.SIGKILL)
    site.start_collector()
    assert statuses(door.deliver(agent, stream, items)) == ["DUPLICATE"] * 40
    site.stop("collector")
    verdict = verify(site.directory / "collector" / "log")
    assert (verdict.batches, verdict.duplicates) == (40, [])


def test_edge_one_stream_over_many_tenants_is_contiguous_and_chained_as_a_whole(
    fake: FakeHost, tmp_path: Path
) -> None:
    rules = [{"path": f"**/s{n}.service", "tenant": f"tenant-{n}"} for n in range(5)]
    for n in range(5):
        fake.cpu(f"/system.slice/s{n}.service", n)
    metering = Metering(fake, tmp_path / "state", owners={"host": "host", "rules": rules})
    for n in range(4):
        fake.cpu("/system.slice/s1.service", 100 + n)
        metering.tick()
    stored = metering.stored()
    assert [b.seq for b in stored] == list(range(1, len(stored) + 1))
    assert len({b.tenant for b in stored}) == 7
    previous = b""
    for batch in stored:
        assert pb.UsageBatch.FromString(batch.body).previous_digest == previous
        previous = batch.digest
    metering.stop()
