"""Edges: the spool is lost, corrupt, cloned, restored or full."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from pathlib import Path

import grpc

from agent.meter import usage
from agent.ship.enrol import Identity
from agent.ship.spool_file import Opened
from bench.fleet import Stream
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.handoff.log import Kind, Record, scan
from collector.log_commands import verify
from tests.agent.fakehost import CONTAINER, FakeHost
from tests.agent.metering import Metering, cpu_of, gaps_of, openings_of
from tests.agent.readings import CADENCE, SECOND, everybody, reading, root, snapshot
from tests.collector.door import Door, statuses
from tests.waiting import until
from wire.measures import BIT
from wire.statuses import Reason
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import ingest_pb2
from wire.v1 import usage_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub


def test_edge_spool_lost_opens_a_new_epoch_whose_openings_let_the_ledger_recover(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    fake.cpu(CONTAINER, 3_000)
    delivered = cpu_of(metering.tick(), CONTAINER)
    first_opening = 1_000_000
    assert delivered == 2_000_000
    metering.stop()
    shutil.rmtree(tmp_path / "state")
    fake.cpu(CONTAINER, 3_500)
    metering.start()
    fake.cpu(CONTAINER, 3_600)
    batches = metering.tick()
    opening = next(openings_of(b)[CONTAINER] for b in batches if CONTAINER in openings_of(b))
    # What lies between the last delivered total and the opening is what no batch carried.
    assert opening - (first_opening + delivered) == 500_000
    assert cpu_of(batches, CONTAINER) == 100_000
    metering.stop()


def test_edge_spool_corrupt_is_set_aside_reported_as_a_gap_and_metering_goes_on(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    metering.tick()
    old = metering.spool.epoch
    metering.stop()
    (tmp_path / "state" / "spool.db").write_bytes(b"no database" * 1_000)
    metering.start()
    assert metering.spool.opened is Opened.SET_ASIDE
    assert metering.spool.epoch > old
    (gap,) = gaps_of(metering.tick())
    assert gap.reason == pb.GAP_REASON_SPOOL_LOST
    assert "spool.corrupt-" in gap.detail
    metering.stop()


def test_edge_spool_that_breaks_under_a_running_agent_costs_no_nanosecond(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    metering.tick()
    path = tmp_path / "state" / "spool.db"
    metering.spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"x" * path.stat().st_size)
    metering.spool._db.execute("PRAGMA cache_size = 0")
    fake.cpu(CONTAINER, 5_000)
    metering.loop.tick()
    assert metering.spool.opened is Opened.SET_ASIDE
    fake.cpu(CONTAINER, 6_000)
    batches = metering.tick()
    assert cpu_of(batches, CONTAINER) == 5_000_000
    assert [g.reason for g in gaps_of(batches)] == [pb.GAP_REASON_SPOOL_LOST]
    assert any(CONTAINER in openings_of(b) for b in batches)
    metering.stop()


def test_edge_spool_restored_from_an_old_copy_begins_a_new_epoch_by_itself(site: Site) -> None:
    site.prepare()
    site.start_collector()
    site.enroll()
    site.start_agent()
    site.wait_metering()
    time.sleep(1.5)
    site.stop("agent", signal.SIGKILL)
    state = site.directory / "agent"
    shutil.copytree(state, site.directory / "copy")
    site.start_agent()
    until(lambda: _accepted(site) >= 4)
    site.stop("agent")
    shutil.rmtree(state)
    (site.directory / "copy").rename(state)
    before = _accepted(site)
    site.start_agent()
    site.wait_metering()
    until(lambda: _accepted(site) >= before + 2)
    epochs = {r.epoch for r in _records(site) if r.kind is Kind.ACCEPTED}
    assert len(epochs) == 2
    assert "spool_is_older_than_collector" in site.journal("agent")
    site.stop("agent")
    site.stop("collector")
    verdict = verify(site.directory / "collector" / "log")
    assert verdict.sound, verdict
    last = max((r.epoch, r.seq, r.body) for r in _records(site))[2]
    assert pb.UsageBatch.FromString(last).epoch == max(epochs)


def test_edge_spool_cloned_to_two_hosts_ends_in_a_conflict_that_opens_an_epoch(site: Site) -> None:
    """Another host with the same identity was faster: its batch has our number and other content."""
    site.prepare(agent={"meter": {"interval": "1s", "memory_sample": "1s"}})
    site.start_collector()
    agent_id = site.enroll()
    site.start_agent()
    site.wait_metering()
    until(lambda: _accepted(site) >= 1)
    site.stop("agent", signal.SIGKILL)
    with sqlite3.connect(site.directory / "agent" / "spool.db") as db:
        meta = dict(db.execute("SELECT key, value FROM meta WHERE key != 'baseline'"))
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    clone = Identity.load(site.directory / "agent")
    stream = Stream(agent_id, meta["epoch"], tenant="acme")  # type: ignore[arg-type]
    stream.seq, stream.last_digest = meta["next_seq"] - 1, meta["last_digest"]
    held = stream.next()
    hello = ingest_pb2.Hello(epoch=meta["epoch"], next_seq=held.seq, oldest_seq=1)
    _deliver_as(door, clone, hello, held)
    site.start_agent()
    site.wait_metering()
    until(lambda: '"epoch_opened"' in site.journal("agent"), 30)
    before = _accepted(site)
    until(lambda: _accepted(site) >= before + 2)
    site.stop("agent")
    site.stop("collector")
    log = site.directory / "collector" / "log"
    assert verify(log).sound, verify(log)
    epochs = {r.epoch for r in _records(site) if r.kind is Kind.ACCEPTED}
    assert len(epochs) == 2


def test_edge_spool_full_drops_no_batch_lengthens_intervals_and_loses_nothing(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state", spool={"max_bytes": 6_000})
    used = 1_000
    total = 1_000
    for _ in range(30):
        used += 100
        fake.cpu(CONTAINER, used)
        fake.cpu("/", 10_000 + used)
        metering.loop.tick()
        total = used
    assert metering.loop.tally.held_intervals > 5
    assert metering.loop.state.stretch > 1
    assert metering.loop.state.trouble["spool_full"].startswith("METER-002")
    waiting = metering.stored()
    assert [b.seq for b in waiting] == list(range(1, len(waiting) + 1))
    earlier = metering.batches()
    # A restart in that state goes on where the held rows are.
    metering.restart()
    metering.spool.acknowledge([b.key for b in waiting])
    metering.spool.flush()
    later = metering.tick()
    assert cpu_of(earlier, CONTAINER) + cpu_of(later, CONTAINER) == (total - 1_000) * 1_000
    assert all(b.flags & pb.BATCH_FLAG_LONG_INTERVAL or b.interval_duration_ns < 20 * SECOND for b in later)
    assert metering.loop.state.trouble == {}
    metering.stop()


def test_edge_spool_full_folds_ended_units_per_tenant_and_still_adds_up() -> None:
    units = [reading(n, 10 * n) for n in range(2, 40)]
    baseline = usage.begin(snapshot(100, root(0)), "t", everybody, [])
    born = usage.step(baseline, snapshot(110, root(8_000), *units), everybody, CADENCE)
    waiting = usage.hold(born, fold_ended=True)
    ended = usage.step(waiting, snapshot(120, root(9_000)), everybody, CADENCE)
    folded = usage.hold(ended, fold_ended=True)
    assert len(folded.held[0].usages) == 2, "the host and one lump"
    final = usage.step(folded, snapshot(130, root(9_500)), everybody, CADENCE)
    assert {u.cgroup_id for u in final.usages} == {0, 1}
    assert sum(u.values[BIT["cpu_usage_ns"]] for u in final.usages) == 9_500


def _accepted(site: Site) -> int:
    return int(site.ask("collector", "status")["answers"].get("accepted", 0))


def _records(site: Site) -> list[Record]:
    return [r for r in scan(site.directory / "collector" / "log") if isinstance(r, Record)]


def _deliver_as(door: Door, identity: Identity, hello: ingest_pb2.Hello, item: ingest_pb2.Item) -> None:
    requests = [
        ingest_pb2.DeliverRequest(hello=hello),
        ingest_pb2.DeliverRequest(delivery=ingest_pb2.Delivery(items=[item])),
    ]
    with grpc.secure_channel(door.address, identity.credentials(), CHANNEL_OPTIONS) as channel:
        responses = list(IngestStub(channel).Deliver(iter(requests), timeout=20))
    (answer,) = responses[1].answers.answers
    assert statuses([answer]) == ["ACCEPTED"], Reason.Name(answer.reason)
