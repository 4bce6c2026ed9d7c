"""The metering loop over a fake host: what it remembers and what the disk remembers agree, whatever fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.loop import _encode
from agent.ship import spool_file
from agent.ship.spool import BatchKey
from agent.ship.spool_file import Opened, SpoolUnavailable
from tests.agent.fakehost import CONTAINER, FakeHost
from tests.agent.metering import Metering, cpu_of, gaps_of, openings_of
from tests.agent.test_spool import kill as kill_spool
from tests.agent.test_spool_machine import failing
from wire.v1 import usage_pb2 as pb

OTHER, HIDDEN = "/system.slice/other.service", "/system.slice/hidden.service"


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    host = FakeHost(tmp_path / "host")
    host.cpu("/", 10_000)
    host.cpu(CONTAINER, 1_000)
    return host


def kill(metering: Metering) -> None:
    """As SIGKILL leaves it."""
    metering.loop.close()
    kill_spool(metering.spool)


def test_a_batch_found_damaged_is_told_of_once_also_when_the_agent_is_killed_in_between(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    (made, *_) = metering.tick()
    metering.spool._db.execute("UPDATE batch SET body = x'00' WHERE seq = ?", (made.seq,))
    assert made.seq not in [b.seq for b in metering.stored()]
    kill(metering)
    metering.start()
    (gap,) = gaps_of(metering.tick())
    assert gap.reason == pb.GAP_REASON_SPOOL_LOST
    assert (gap.start_unix_ns, gap.end_unix_ns) == (made.interval_start_unix_ns, made.interval_end_unix_ns)
    assert f"{made.epoch}/{made.seq}" in gap.detail
    metering.restart()
    assert gaps_of(metering.tick()) == []
    metering.stop()


def test_a_damaged_spool_is_told_of_once_also_when_the_agent_is_killed_before_its_first_commit(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    metering.tick()
    metering.stop()
    (tmp_path / "state" / "spool.db").write_bytes(b"no database" * 1_000)
    metering.start(start_loop=False)
    assert metering.spool.opened is Opened.SET_ASIDE
    kill(metering)
    metering.start()
    (gap,) = gaps_of(metering.tick())
    assert gap.reason == pb.GAP_REASON_SPOOL_LOST
    assert "spool.corrupt-" in gap.detail
    assert gaps_of(metering.tick()) == []
    metering.stop()


@pytest.mark.parametrize("sqlite_sees_it", [True, False])
def test_a_baseline_that_cannot_be_read_sets_the_spool_aside_and_metering_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sqlite_sees_it: bool
) -> None:
    fake = FakeHost(tmp_path / "host")
    for n in range(200):
        fake.cpu(f"/system.slice/s{n}.service", n)
    metering = Metering(fake, tmp_path / "state")
    metering.spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if not sqlite_sees_it:
        metering.spool._db.execute("UPDATE meta SET value = zeroblob(9000) WHERE key = 'baseline'")
    metering.stop()
    if sqlite_sees_it:
        # As in a spool that is too large to be checked as a whole.
        monkeypatch.setattr(spool_file, "QUICK_CHECK_BELOW_BYTES", 0)
        path = tmp_path / "state" / "spool.db"
        data = path.read_bytes()
        at = data.index(b"/system.slice/s150.service")
        path.write_bytes(data[: at - 6_000] + b"\xff" * 12_000 + data[at + 6_000 :])
    metering = Metering(fake, tmp_path / "state")
    assert metering.spool.opened is Opened.SET_ASIDE
    assert ("malformed" in metering.spool.damage) == sqlite_sees_it
    assert "header" not in metering.spool.damage
    fake.cpu("/system.slice/s7.service", 1_007)
    batches = metering.tick()
    assert cpu_of(batches, "/system.slice/s7.service") == 1_000_000
    assert [g.reason for g in gaps_of(batches)] == [pb.GAP_REASON_SPOOL_LOST]
    metering.stop()


def test_a_new_epoch_that_cannot_be_stored_leaves_memory_as_the_disk_has_it(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    metering.tick()
    loop, spool = metering.loop, metering.spool
    epoch, at = spool.epoch, 0
    while spool.epoch == epoch:
        before = _encode(loop.baseline)
        try:
            with failing(spool, at):
                loop.open_epoch(epoch, BatchKey(epoch, 1))
        except SpoolUnavailable:
            assert _encode(loop.baseline) == before == spool.load_baseline()
            assert spool.owed_gaps(9) == {}
            fake.cpu(CONTAINER, 2_000 + at)
            batches = metering.tick()
            assert {b.epoch for b in batches} == {epoch}
            assert [openings_of(b) for b in batches] == [{}] * len(batches)
        at += 1
    assert at > 5, "hardly a statement failed"
    assert _encode(loop.baseline) == spool.load_baseline()
    fake.cpu(CONTAINER, 9_000)
    batches = metering.tick()
    assert {b.epoch for b in batches} == {spool.epoch}
    assert any(CONTAINER in openings_of(b) for b in batches)
    (gap,) = gaps_of(batches)
    assert gap.reason == pb.GAP_REASON_CONFLICT
    assert gap.count > 0
    assert gap.end_unix_ns <= batches[0].interval_start_unix_ns, "the gap is where the refused batches lay"
    metering.stop()


def test_a_damaged_spool_that_cannot_be_set_aside_yet_is_tried_again_and_costs_no_nanosecond(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    metering.tick()
    state = tmp_path / "state"
    for n in range(3):
        (state / f"spool.corrupt-{n}.db").write_bytes(b"")
    metering.spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (state / "spool.db").write_bytes(b"x" * (state / "spool.db").stat().st_size)
    metering.spool._db.execute("PRAGMA cache_size = 0")
    for used in (3_000, 4_000):
        fake.cpu(CONTAINER, used)
        assert not metering.loop.tick()
        assert "check the disk" in metering.loop.state.trouble["spool_unavailable"]
    for earlier in state.glob("spool.corrupt-*.db"):
        earlier.unlink()
    fake.cpu(CONTAINER, 5_000)
    metering.loop.tick()
    assert metering.spool.opened is Opened.SET_ASIDE
    fake.cpu(CONTAINER, 6_000)
    batches = metering.tick()
    assert metering.loop.state.trouble == {}
    assert cpu_of(batches, CONTAINER) == 5_000_000
    assert [g.reason for g in gaps_of(batches)] == [pb.GAP_REASON_SPOOL_LOST]
    metering.stop()


@pytest.mark.parametrize("unreadable", ["cpuacct/cpuacct.usage_user", "unified/cpu.stat"])
def test_an_incomplete_reading_at_a_change_of_sources_is_said_and_bills_no_whole_life_later(
    tmp_path: Path, unreadable: str
) -> None:
    host = FakeHost(tmp_path / "host", v1=True)
    host.write("/", "cgroup.controllers", "", "unified")
    host.write("/", "cgroup.procs", "", "unified")

    def both(path: str, used_us: int) -> None:
        host.write(path, "cpuacct.usage", f"{used_us * 1_000}\n", "cpuacct")
        host.write(path, "cpu.stat", f"usage_usec {used_us}\n", "unified")

    for path in ("/", CONTAINER, OTHER, HIDDEN):
        both(path, 9_000)
    read = {"cgroup_root": str(host.cgroup_root), "proc_root": str(host.proc_root)}
    metering = Metering(host, tmp_path / "state", read={**read, "hierarchy": "v1"})
    assert all(b.coverage & pb.COVERAGE_WHOLE_HOST for b in metering.tick())
    before = len(metering.batches())
    metering.stop()
    # A loop of symbolic links is what root cannot read either.
    tree, _, name = unreadable.partition("/")
    file = host.cgroup_root / tree / OTHER.lstrip("/") / name
    file.unlink(missing_ok=True)
    file.symlink_to(name)
    seen = host.cgroup_root / "unified" / HIDDEN.lstrip("/")
    seen.rename(tmp_path / "away")
    metering = Metering(host, tmp_path / "state", read={**read, "hierarchy": "v2"})
    last_of_the_old = metering.batches()[before:]
    assert last_of_the_old
    by_the_old_complete = tree == "unified"
    assert {bool(b.coverage & pb.COVERAGE_WHOLE_HOST) for b in last_of_the_old} == {by_the_old_complete}
    (tmp_path / "away").rename(seen)
    file.unlink()
    both(OTHER, 9_000)
    found = cpu_of(metering.tick(), HIDDEN)
    # Not there in a complete reading is born since; in an incomplete one it may be as old as the host.
    assert found == (0 if tree == "unified" else 9_000_000)
    metering.stop()


def test_a_cgroup_whose_name_is_not_utf_8_is_metered_and_survives_a_restart(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    name = "/system.slice/\udcff\udc80.service"
    fake.cpu(name, 1)
    metering = Metering(fake, tmp_path / "spool")
    fake.cpu(name, 5)
    batches = metering.tick()
    assert cpu_of(batches, "/system.slice/\\xff\\x80.service") == 4_000
    metering.restart()
    fake.cpu(name, 9)
    assert cpu_of(metering.tick(), "/system.slice/\\xff\\x80.service") == 4_000
    metering.stop()
