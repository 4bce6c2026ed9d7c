"""The shipper against a collector that misbehaves: a real gRPC server with a script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from agent.ship.shipper import Shipper
from agent.ship.spool import BatchKey, Spool
from tests.agent.test_spool import draft, opened
from wire.statuses import Reason, Status
from wire.v1 import ingest_pb2 as pb
from wire.v1 import usage_pb2
from wire.v1.ingest_pb2_grpc import IngestServicer, add_IngestServicer_to_server

Script = Callable[[pb.Item], pb.Answer | None]
"""The answer to an item; None breaks the stream instead."""


def accept(item: pb.Item) -> pb.Answer:
    return pb.Answer(epoch=item.epoch, seq=item.seq, status=Status.STATUS_ACCEPTED)


class Scripted(IngestServicer):
    def __init__(self, script: Script, in_flight: int = 256) -> None:
        self.script = script
        self.in_flight = in_flight
        self.hellos: list[pb.Hello] = []
        self.items: list[tuple[int, int]] = []
        self.watermark = 0

    async def Deliver(self, _requests: object, context: Any) -> None:
        first = await context.read()
        self.hellos.append(first.hello)
        welcome = pb.Welcome(
            max_in_flight=self.in_flight,
            max_message_bytes=4 << 20,
            max_batch_bytes=1 << 20,
            watermark=self.watermark,
            latest_epoch=first.hello.epoch,
        )
        await context.write(pb.DeliverResponse(welcome=welcome))
        while (message := await context.read()) is not grpc.aio.EOF:
            answers = []
            for item in message.delivery.items:
                self.items.append((item.epoch, item.seq))
                answer = self.script(item)
                if answer is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
                answers.append(answer)
            await context.write(pb.DeliverResponse(answers=pb.Answers(answers=answers)))


@asynccontextmanager
async def shipping(
    spool: Spool, service: Scripted, open_epoch: Any = None
) -> AsyncIterator[tuple[Shipper, asyncio.Task[None]]]:
    server = grpc.aio.server()
    add_IngestServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def no_epoch(at_least: int, aside_from: BatchKey | None) -> None:
        raise AssertionError("nobody asked for a new epoch")

    shipper = Shipper(
        spool,
        lambda address: grpc.aio.insecure_channel(address),
        [f"127.0.0.1:{port}"],
        open_epoch or no_epoch,
        "t",
    )
    task = asyncio.create_task(shipper.run())
    try:
        yield shipper, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0)


async def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_everything_is_sent_in_order_and_leaves_the_spool(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft() for _ in range(300)], b"")
    service = Scripted(accept)
    async with shipping(spool, service) as (shipper, _):
        assert await shipper.drain(15)
        spool.commit([draft()], b"")
        shipper.notify()
        assert await shipper.drain(15)
    assert service.items == [(spool.epoch, seq) for seq in range(1, 302)]
    assert spool.fill().batches == 0
    assert shipper.state.answers == {"accepted": 301}
    spool.close()


async def test_retry_is_obeyed_and_nothing_is_skipped(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft() for _ in range(10)], b"")
    seen: dict[int, int] = {}
    asked: list[float] = []

    def script(item: pb.Item) -> pb.Answer:
        seen[item.seq] = seen.get(item.seq, 0) + 1
        if item.seq >= 4 and seen[item.seq] == 1:
            asked.append(time.monotonic())
            return pb.Answer(epoch=item.epoch, seq=item.seq, status=Status.STATUS_RETRY, retry_after_ms=400)
        if item.seq == 4:
            asked.append(time.monotonic())
        return accept(item)

    async with shipping(spool, Scripted(script)) as (shipper, _):
        assert await shipper.drain(15)
    assert seen == {**dict.fromkeys((1, 2, 3), 1), **dict.fromkeys(range(4, 11), 2)}
    assert asked[-1] - asked[0] >= 0.4
    spool.close()


async def test_a_stream_that_breaks_leaves_every_unanswered_batch_for_the_next(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft() for _ in range(120)], b"")
    broken: list[int] = []

    def script(item: pb.Item) -> pb.Answer | None:
        if item.seq in (30, 70) and item.seq not in broken:
            broken.append(item.seq)
            return None
        return accept(item)

    service = Scripted(script)
    async with shipping(spool, service) as (shipper, _):
        assert await shipper.drain(20)
    assert broken == [30, 70]
    assert len(service.hellos) == 3
    assert {seq for _, seq in service.items} == set(range(1, 121))
    assert [h.oldest_seq for h in service.hellos] == [1, 1, 51]
    spool.close()


async def test_no_more_is_in_flight_than_the_collector_allows(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft() for _ in range(200)], b"")
    held: list[pb.Item] = []

    def script(item: pb.Item) -> pb.Answer:
        held.append(item)
        return accept(item)

    service = Scripted(script, in_flight=7)
    async with shipping(spool, service) as (shipper, _):
        most = 0
        while shipper.state.answers.total() < 200:
            most = max(most, shipper.state.in_flight)
            await asyncio.sleep(0)
    assert 0 < most <= 7
    spool.close()


async def test_a_digest_mismatch_is_sent_again_since_the_spools_copy_is_sound(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft()], b"")
    tries: list[bytes] = []

    def script(item: pb.Item) -> pb.Answer:
        tries.append(item.batch)
        if len(tries) == 1:
            return pb.Answer(
                epoch=item.epoch,
                seq=item.seq,
                status=Status.STATUS_REJECTED,
                reason=Reason.REASON_DIGEST_MISMATCH,
            )
        return accept(item)

    async with shipping(spool, Scripted(script)) as (shipper, _):
        assert await shipper.drain(15)
    assert len(tries) == 2
    assert tries[0] == tries[1]
    spool.close()


async def test_a_rejected_batch_is_not_sent_again(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft(), draft()], b"")

    def script(item: pb.Item) -> pb.Answer:
        if item.seq == 1:
            return pb.Answer(
                epoch=item.epoch,
                seq=1,
                status=Status.STATUS_REJECTED,
                reason=Reason.REASON_IMPLAUSIBLE,
                detail="x",
            )
        return accept(item)

    service = Scripted(script)
    async with shipping(spool, service) as (shipper, _):
        assert await shipper.drain(15)
    assert service.items == [(spool.epoch, 1), (spool.epoch, 2)]
    assert shipper.state.rejected == {"implausible": 1}
    spool.close()


async def test_a_conflict_sets_the_rest_aside_and_asks_for_a_new_epoch(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft() for _ in range(5)], b"")
    old = spool.epoch

    async def open_epoch(at_least: int, aside_from: BatchKey | None) -> None:
        spool.open_epoch(at_least, time.time_ns(), aside_from, b"")
        spool.commit([draft()], b"")

    def script(item: pb.Item) -> pb.Answer:
        if item.epoch == old and item.seq >= 3:
            return pb.Answer(
                epoch=item.epoch,
                seq=item.seq,
                status=Status.STATUS_REJECTED,
                reason=Reason.REASON_IDENTITY_CONFLICT,
            )
        return accept(item)

    service = Scripted(script)
    async with shipping(spool, service, open_epoch) as (shipper, _):
        await until(lambda: (spool.epoch, 1) in service.items and spool.epoch != old)
        assert await shipper.drain(15)
    assert spool.quarantined() == 3
    spool.close()


async def test_a_conflict_over_a_batch_of_an_older_epoch_leaves_a_gap_for_it_and_begins_nothing_new(
    tmp_path: Path,
) -> None:
    spool = opened(tmp_path)
    spool.commit([draft(end=500), draft(end=510)], b"")
    old = spool.epoch
    spool.open_epoch(old, time.time_ns(), None, b"")
    spool.commit([draft()], b"")

    def script(item: pb.Item) -> pb.Answer:
        if (item.epoch, item.seq) == (old, 2):
            return pb.Answer(
                epoch=old, seq=2, status=Status.STATUS_REJECTED, reason=Reason.REASON_IDENTITY_CONFLICT
            )
        return accept(item)

    async with shipping(spool, Scripted(script)) as (shipper, _):
        assert await shipper.drain(15)
    spool.close()
    spool = opened(tmp_path)
    (gap,) = spool.owed_gaps(9).values()
    assert (gap.start_unix_ns, gap.end_unix_ns, gap.reason) == (500, 510, usage_pb2.GAP_REASON_CONFLICT)
    assert f"{old}/2" in gap.detail
    assert spool.quarantined() == 1
    spool.close()


async def test_an_old_copy_of_the_spool_asks_for_a_new_epoch_before_it_sends_anything(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft()], b"")
    old = spool.epoch
    service = Scripted(accept)
    service.watermark = 40

    async def open_epoch(at_least: int, aside_from: BatchKey | None) -> None:
        assert aside_from is None
        spool.open_epoch(at_least, time.time_ns(), None, b"")
        service.watermark = 0

    async with shipping(spool, service, open_epoch) as (shipper, _):
        assert await shipper.drain(15)
    assert spool.epoch > old
    assert [old_.epoch for old_ in service.hellos[-1].older] == [old]
    spool.close()


async def test_beyond_the_window_a_hole_is_said_anew_with_hello(tmp_path: Path) -> None:
    """Batch 1 is damaged on disk, so the collector would wait for it for ever."""
    spool = opened(tmp_path)
    spool.commit([draft() for _ in range(3)], b"")
    spool._db.execute("UPDATE batch SET body = x'00' WHERE seq = 1")

    def script(item: pb.Item) -> pb.Answer:
        if service.hellos[-1].oldest_seq < 2:
            return pb.Answer(
                epoch=item.epoch, seq=item.seq, status=Status.STATUS_RETRY, reason=Reason.REASON_OUT_OF_WINDOW
            )
        return accept(item)

    service = Scripted(script)
    async with shipping(spool, service) as (shipper, _):
        await until(lambda: len(service.hellos) == 2)
        assert await shipper.drain(15)
    assert [h.oldest_seq for h in service.hellos] == [1, 2]
    spool.close()


async def test_a_certificate_change_opens_the_new_stream_before_it_closes_the_old_one(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    service = Scripted(accept)
    async with shipping(spool, service) as (shipper, _):
        for n in range(40):
            spool.commit([draft()], b"")
            shipper.notify()
            if n % 10 == 5:
                shipper.reconnect()
            await asyncio.sleep(0.01)
        assert await shipper.drain(15)
    assert len(service.hellos) >= 3
    assert {seq for _, seq in service.items} == set(range(1, 41))
    assert shipper.state.trouble == ""
    spool.close()


async def test_a_shipper_with_nothing_to_send_is_seen_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.ship.shipper.IDLE_SECONDS", 0.02)
    spool = opened(tmp_path)
    async with shipping(spool, Scripted(accept)) as (shipper, _):
        await until(lambda: shipper.state.connected_since is not None)
        turns = [shipper.state.last_turn_monotonic]
        for _ in range(3):
            await until(lambda: shipper.state.last_turn_monotonic != turns[-1])
            turns.append(shipper.state.last_turn_monotonic)
        assert turns == sorted(set(turns)), "each later than the one before"
        assert shipper.state.trouble == ""
    spool.close()
