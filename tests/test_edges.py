"""The edges of exactness (design): one test or more for each row that needs no kernel probes.

The rows about tombstones, rmdir and release, and full kernel maps come with the probes.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from agent.meter import usage
from agent.ship.spool_file import Opened
from bench.fleet import Stream, enrol
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.handoff.log import Kind, Record, scan
from collector.log_commands import verify
from tests.agent.fakehost import CONTAINER, FakeHost
from tests.agent.metering import Metering, cpu_of, gaps_of, openings_of
from tests.agent.readings import CADENCE, SECOND, WALL, everybody, reading, root, snapshot
from tests.collector.test_door import Door, statuses
from wire.limits import WINDOW
from wire.measures import BIT
from wire.statuses import Reason
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import ingest_pb2
from wire.v1 import usage_pb2 as pb

OTHER = "/system.slice/nginx.service"


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    host = FakeHost(tmp_path / "host")
    host.cpu("/", 10_000)
    host.cpu(CONTAINER, 1_000)
    return host


# reboot


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


# spool lost, corrupt, cloned or restored


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
    _until(lambda: _accepted(site) >= 4)
    site.stop("agent")
    shutil.rmtree(state)
    (site.directory / "copy").rename(state)
    before = _accepted(site)
    site.start_agent()
    site.wait_metering()
    _until(lambda: _accepted(site) >= before + 2)
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
    _until(lambda: _accepted(site) >= 1)
    site.stop("agent", signal.SIGKILL)
    with sqlite3.connect(site.directory / "agent" / "spool.db") as db:
        meta = dict(db.execute("SELECT key, value FROM meta WHERE key != 'baseline'"))
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    clone = _identity_of(site)
    stream = Stream(agent_id, meta["epoch"], tenant="acme")  # type: ignore[arg-type]
    stream.seq, stream.last_digest = meta["next_seq"] - 1, meta["last_digest"]
    held = stream.next()
    hello = ingest_pb2.Hello(epoch=meta["epoch"], next_seq=held.seq, oldest_seq=1)
    _deliver_as(door, clone, hello, held)
    site.start_agent()
    site.wait_metering()
    _until(lambda: '"epoch_opened"' in site.journal("agent"), 30)
    before = _accepted(site)
    _until(lambda: _accepted(site) >= before + 2)
    site.stop("agent")
    site.stop("collector")
    log = site.directory / "collector" / "log"
    assert verify(log).sound, verify(log)
    epochs = {r.epoch for r in _records(site) if r.kind is Kind.ACCEPTED}
    assert len(epochs) == 2


# nested cgroups


def test_edge_nested_cgroups_are_billed_at_exactly_one_level(fake: FakeHost, tmp_path: Path) -> None:
    inner = f"{OTHER}/inner.service"
    for path in (OTHER, inner):
        fake.cpu(path, 0)
    metering = Metering(fake, tmp_path / "state")
    fake.cpu("/", 20_000)
    fake.cpu(CONTAINER, 2_000)
    fake.cpu(OTHER, 5_000)
    fake.cpu(inner, 3_000)
    fake.cpu(f"{CONTAINER}/system.slice/nested.service", 900)
    batches = metering.tick()
    found = {path: cpu_of(batches, path) for path in ("/", CONTAINER, OTHER, inner)}
    assert found == {"/": 4_000_000, CONTAINER: 1_000_000, OTHER: 2_000_000, inner: 3_000_000}
    assert sum(found.values()) == 10_000_000
    metering.stop()


def test_edge_nested_a_change_of_source_reads_both_once_and_bills_nothing_twice(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "host", v1=True)
    host.write("/", "cgroup.controllers", "", "unified")
    host.write("/", "cgroup.procs", "", "unified")

    def both(path: str, v1_ns: int, v2_us: int) -> None:
        host.write(path, "cpuacct.usage", f"{v1_ns}\n", "cpuacct")
        host.write(path, "cpu.stat", f"usage_usec {v2_us}\n", "unified")

    both("/", 10_000_000, 99)
    both(OTHER, 4_000_000, 70)
    read = {"cgroup_root": str(host.cgroup_root), "proc_root": str(host.proc_root)}
    metering = Metering(host, tmp_path / "state", read={**read, "hierarchy": "v1"})
    both("/", 11_000_000, 199)
    both(OTHER, 4_500_000, 170)
    metering.stop()
    metering = Metering(host, tmp_path / "state", read={**read, "hierarchy": "v2"})
    old = metering.batches()
    assert cpu_of(old, OTHER) == 500_000
    both(OTHER, 4_700_000, 180)
    both("/", 11_500_000, 250)
    assert cpu_of(metering.tick(), OTHER) == 10_000
    metering.stop()


# spool full


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


# tenant changes mid-life


def test_edge_tenant_change_cuts_the_interval_and_each_row_has_one_tenant(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    fake.cpu(CONTAINER, 2_000)
    metering.tick()
    metering.stop()
    rules = {"host": "host", "default": "acme", "rules": [{"path": "**", "tenant": "globex"}]}
    changed = Metering(
        fake,
        tmp_path / "state",
        owners=rules,
        read={"cgroup_root": str(fake.cgroup_root), "proc_root": str(fake.proc_root)},
    )
    fake.cpu(CONTAINER, 5_000)
    first = changed.tick()
    fake.cpu(CONTAINER, 9_000)
    second = changed.tick()

    def tenants(batches: list[pb.UsageBatch]) -> dict[str, int]:
        return {b.tenant: cpu_of([b], CONTAINER) for b in batches if CONTAINER in b.containers.cgroup_path}

    assert tenants(first) == {"acme": 3_000_000}, (
        "the interval in which the owner changed is still the old one's"
    )
    assert tenants(second) == {"globex": 4_000_000}
    changed.stop()


# in flight, retry, order


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


# collector dies between hand-off and mark


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


# one stream, many tenants and partitions


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


# clock steps


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


# memory while the agent was down


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


# TLS: tests/collector/test_door.py::test_openssl_negotiates_tls_1_3_and_gets_no_cbc


def _until(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _accepted(site: Site) -> int:
    return int(site.ask("collector", "status")["answers"].get("accepted", 0))


def _records(site: Site) -> list[Record]:
    return [r for r in scan(site.directory / "collector" / "log") if isinstance(r, Record)]


def _identity_of(site: Site) -> object:
    from agent.ship.enrol import Identity

    return Identity.load(site.directory / "agent")


def _deliver_as(door: Door, identity: object, hello: ingest_pb2.Hello, item: ingest_pb2.Item) -> None:
    import grpc

    from wire.v1.ingest_pb2_grpc import IngestStub

    requests = [
        ingest_pb2.DeliverRequest(hello=hello),
        ingest_pb2.DeliverRequest(delivery=ingest_pb2.Delivery(items=[item])),
    ]
    with grpc.secure_channel(door.address, identity.credentials(), CHANNEL_OPTIONS) as channel:  # type: ignore[attr-defined]
        responses = list(IngestStub(channel).Deliver(iter(requests), timeout=20))
    (answer,) = responses[1].answers.answers
    assert statuses([answer]) == ["ACCEPTED"], Reason.Name(answer.reason)
