"""The spool: batches and baseline move together, whatever interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.meter.batch import Draft
from agent.ship import export
from agent.ship.spool import Aside, BatchKey, Spool
from agent.ship.spool_file import Opened, SpoolError, SpoolFull, SpoolUnavailable
from wire.identity import AgentId, BatchId, digest
from wire.v1 import usage_pb2 as pb

AGENT = AgentId("11111111-2222-4333-8444-555555555555")
MIB = 1 << 20


def draft(tenant: str = "acme", size: int = 10, end: int = 1_000) -> Draft:
    def seal(identity: BatchId, previous: bytes) -> bytes:
        return pb.UsageBatch(
            agent_id=identity.agent_id,
            epoch=identity.epoch,
            seq=identity.seq,
            previous_digest=previous,
            tenant=tenant,
            host="x" * size,
        ).SerializeToString()

    return Draft(tenant, 1, end - 10, end, seal)


def opened(directory: Path, max_bytes: int = 64 * MIB, now: int | None = None) -> Spool:
    return Spool.open(directory, AGENT, max_bytes, time.time_ns() if now is None else now)


def everything(spool: Spool) -> list[tuple[int, int]]:
    return [(b.epoch, b.seq) for b in spool.pending(None, 1_000_000, 1 << 40)]


def test_batches_are_numbered_chained_and_verbatim(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    first, second = spool.commit([draft("a"), draft("b")], b"one")
    (third,) = spool.commit([draft("c")], b"two")
    assert [b.seq for b in (first, second, third)] == [1, 2, 3]
    assert pb.UsageBatch.FromString(third.body).previous_digest == second.digest == digest(second.body)
    assert pb.UsageBatch.FromString(first.body).previous_digest == b""
    spool.close()
    again = opened(tmp_path)
    assert again.opened is Opened.ADOPTED
    assert again.load_baseline() == b"two"
    assert again.next_seq == 4
    assert [b.body for b in again.pending(None, 9, MIB)] == [first.body, second.body, third.body]
    again.close()


def test_only_an_answer_removes_a_batch(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    batches = spool.commit([draft(), draft(), draft()], b"")
    spool.acknowledge([batches[1].key])
    assert [seq for _, seq in everything(spool)] == [1, 3]
    assert spool.held() == {spool.epoch: 1}
    spool.flush()
    spool.acknowledge([batches[0].key, BatchKey(spool.epoch, 99)])
    spool.close()
    again = opened(tmp_path)
    assert [seq for _, seq in everything(again)] == [3]
    assert again.held() == {again.epoch: 3}
    assert again.fill().batches == 1
    again.close()


def test_a_full_spool_refuses_whole_and_changes_nothing(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_bytes=3_000)
    spool.commit([draft(size=2_000)], b"before")
    with pytest.raises(SpoolFull, match="spool.max_bytes"):
        spool.commit([draft(size=10), draft(size=2_000)], b"after")
    assert spool.next_seq == 2
    assert spool.load_baseline() == b"before"
    spool.commit([], b"held")
    assert spool.load_baseline() == b"held"
    spool.acknowledge([BatchKey(spool.epoch, 1)])
    spool.flush()
    assert spool.commit([draft(size=2_000)], b"after")[0].seq == 2
    spool.close()


def test_what_an_emergency_remount_made_read_only_is_refused_though_every_write_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for sysrq u, which is for all disks of a host; tests/acceptance has it in a machine."""
    spool = opened(tmp_path)
    spool.commit([draft()], b"before")
    with monkeypatch.context() as remounted:
        remounted.setattr("agent.ship.spool.is_read_only", lambda _: True)
        with pytest.raises(SpoolUnavailable, match="mount it writable"):
            spool.commit([draft()], b"after")
        assert spool.load_baseline() == b"before"
    assert spool.commit([draft()], b"after")[0].seq == 2
    spool.close()


def test_a_directory_that_is_gone_is_named_and_nothing_is_taken_for_durable(tmp_path: Path) -> None:
    spool = opened(tmp_path / "state")
    spool.commit([draft()], b"before")
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    with pytest.raises(SpoolUnavailable, match="No such file"):
        spool.commit([draft()], b"after")
    (tmp_path / "elsewhere").rename(tmp_path / "state")
    assert spool.load_baseline() == b"before"
    assert spool.commit([draft()], b"after")[0].seq == 2
    spool.close()


def test_a_batch_whose_bytes_changed_on_disk_goes_to_quarantine_and_is_never_sent(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft(), draft(), draft()], b"")
    spool._db.execute("UPDATE batch SET body = x'00' WHERE seq = 2")
    assert [seq for _, seq in everything(spool)] == [1, 3]
    assert spool.quarantined() == 1
    spool.close()


def test_the_gap_of_a_batch_set_aside_is_owed_until_the_batch_that_tells_it_is_committed(
    tmp_path: Path,
) -> None:
    spool = opened(tmp_path, max_bytes=3_000)
    spool.commit([draft(end=end) for end in (1_000, 1_010, 1_020)], b"")
    spool._db.execute("UPDATE batch SET body = x'00' WHERE seq = 2")
    everything(spool)
    spool.quarantine(BatchKey(spool.epoch, 3), Aside.CONFLICT)
    kill(spool)
    spool = opened(tmp_path, max_bytes=3_000)
    owed = spool.owed_gaps(9)
    assert [(g.start_unix_ns, g.end_unix_ns, g.reason, g.count) for g in owed.values()] == [
        (1_000, 1_010, pb.GAP_REASON_SPOOL_LOST, 1),
        (1_010, 1_020, pb.GAP_REASON_CONFLICT, 1),
    ]
    assert [f"{spool.epoch}/{n}" in g.detail for n, g in zip((2, 3), owed.values(), strict=True)] == [
        True
    ] * 2
    with pytest.raises(SpoolFull):
        spool.commit([draft(size=5_000)], b"", owed)
    assert spool.owed_gaps(9) == owed
    first = min(owed)
    assert spool.owed_gaps(1) == {first: owed[first]}
    spool.commit([draft()], b"", [first])
    kill(spool)
    spool = opened(tmp_path)
    assert list(spool.owed_gaps(9)) == [max(owed)]
    spool.close()


def test_a_batch_that_is_not_there_leaves_no_gap_when_it_is_set_aside(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    (stored,) = spool.commit([draft()], b"")
    spool.acknowledge([stored.key])
    spool.quarantine(stored.key, Aside.CONFLICT)
    assert spool.owed_gaps(9) == {}
    assert spool.quarantined() == 0
    spool.close()


def kill(spool: Spool) -> None:
    """As SIGKILL leaves it: nothing remembered is written, the lock falls with the process."""
    spool._db.close()
    os.close(spool._lock_fd)


def test_a_conflict_sets_batches_aside_in_the_step_that_opens_the_epoch(tmp_path: Path) -> None:
    spool = opened(tmp_path, now=5_000)
    old = spool.epoch
    spool.commit([draft(), draft(), draft()], b"")
    spool.open_epoch(old + 10, 5_000, BatchKey(old, 2), b"reopened")
    assert spool.epoch > old + 10
    assert everything(spool) == [(old, 1)]
    assert spool.quarantined() == 2
    (gap,) = spool.owed_gaps(9).values()
    assert (gap.reason, gap.count, gap.start_unix_ns, gap.end_unix_ns) == (
        pb.GAP_REASON_CONFLICT,
        2,
        990,
        1_000,
    )
    assert spool.held() == {old: 1, spool.epoch: 1}
    assert spool.commit([draft()], b"")[0].seq == 1
    spool.close()


def test_one_agent_at_a_time(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    with pytest.raises(SpoolError, match="in use by another"):
        opened(tmp_path)
    spool.close()


@pytest.mark.root
def test_a_full_disk_refuses_and_loses_nothing(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=2m")
    spool = opened(disk)
    spool.commit([draft(size=100)], b"before")
    with pytest.raises(OSError, match="space"), (disk / "filler").open("wb") as filler:
        while True:
            filler.write(b"\0" * 4_096)
            filler.flush()
    with pytest.raises(SpoolUnavailable, match="free space"):
        spool.commit([draft(size=200_000)], b"after")
    assert spool.load_baseline() == b"before"
    assert everything(spool) == [(spool.epoch, 1)]
    (disk / "filler").unlink()
    assert spool.commit([draft(size=200_000)], b"after")[0].seq == 2
    spool.close()


def test_kill_nine_at_any_moment_leaves_batches_and_baseline_in_step(tmp_path: Path) -> None:
    """A child commits and acknowledges as fast as it can; what it leaves must always fit together."""
    child = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {os.getcwd()!r})
        from pathlib import Path
        from tests.agent.test_spool import draft, opened
        spool = opened(Path({str(tmp_path)!r}))
        n = int(spool.load_baseline() or b"0")
        print("up", flush=True)
        while True:
            n += 1
            stored = spool.commit([draft(str(n)), draft(str(n))], str(n).encode())
            if n % 3 == 0:
                spool.acknowledge([stored[0].key, stored[1].key])
            if n % 7 == 0:
                spool.flush()
        """
    )
    last = 0
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        time.sleep(0.02 * (attempt % 5) + 0.003)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        spool = opened(tmp_path)
        committed = int(spool.load_baseline() or b"0")
        assert committed >= last
        assert spool.next_seq == 2 * committed + 1
        assert spool.opened is not Opened.SET_ASIDE
        for batch in spool.pending(None, 1_000_000, 1 << 40):
            # Batch k was made by commit (k + 1) // 2, and its tenant says which commit made it.
            assert batch.tenant == str((batch.seq + 1) // 2)
        spool.close()
        last = committed
    assert last > 20, "the child hardly ran: nothing was tested"
    assert export.verify(tmp_path).damaged == []


def test_an_export_reads_back_as_it_was(tmp_path: Path) -> None:
    spool = opened(tmp_path / "a")
    stored = spool.commit([draft(size=n * 40) for n in range(20)], b"")
    with (tmp_path / "out").open("wb") as out:
        assert export.export(tmp_path / "a", out) == 20
    with (tmp_path / "out").open("rb") as source:
        assert list(export.read_export(source)) == [b.body for b in stored]
    data = (tmp_path / "out").read_bytes()
    for cut in (1, 5, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(SpoolError), (tmp_path / "cut").open("rb") as source:
            list(export.read_export(source))
    verdict = export.verify(tmp_path / "a")
    assert verdict.sound
    assert verdict.batches == 20
    spool._db.execute("DELETE FROM batch WHERE seq = 5")
    spool._db.execute("UPDATE batch SET digest = x'00' WHERE seq = 9")
    verdict = export.verify(tmp_path / "a")
    assert not verdict.sound
    assert verdict.missing == [f"{spool.epoch}/5..5"]
    assert f"{spool.epoch}/9" in verdict.damaged
    spool.close()
