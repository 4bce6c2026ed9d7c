"""The ingest door: one coroutine per agent's stream, between gRPC and the pipeline.

A reader hands Deliveries to the pipeline while earlier ones wait for the disk; a writer sends the answers in
the same order. Unanswered items are bounded, and beyond it nothing is read, so that TCP pushes back. A long
Delivery is judged in parts, each when the one before it is answered; between them it is the others' turn. The parts are
small where a tenant is over its limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from collector.decide.occupancy import Full, Occupancy
from collector.door.authenticate import Authenticator, NotAuthenticated, Peer, Standing
from collector.door.noise import Heard, Noise
from collector.door.pressure import Pressure
from collector.job import Item
from collector.pipeline import Pipeline, TooManyEpochs
from collector.state.memory import MAX_EPOCHS_PER_AGENT
from wire.daemon.journal import Journal
from wire.limits import MAX_BATCH_BYTES, MAX_ITEMS_PER_DELIVERY, MAX_MESSAGE_BYTES, MAX_VALUE
from wire.statuses import Meter, Reason, Status
from wire.v1 import ingest_pb2 as pb

HELLO_SECONDS = 20.0
MAX_CONCURRENCY = "ERR_MAX_CONCURRENCY_REACHED"
GOODBYE = "shutting down; try another collector"

READ_AHEAD_PARTS = 8
"""Parts of Deliveries of one stream that are judged while earlier ones wait for the disk."""

PART_BYTES, HELD_PART_BYTES = 1 << 20, 8 << 10
"""What is judged at a time, of whoever is within its limit, and of whoever was held back last: some ten milliseconds at
most, and a fraction of one. Each part has its own way to the disk and back, so small ones cost more; the first is all that
an agent delivers at once."""

OTHERS_TURN_SECONDS = 0.002
"""Between two parts: others need several turns of the loop for one Delivery, from reading it to writing its answers, and a
sync of the disk that is theirs."""

CANCEL_SECONDS = 0.25

_NOBODY_COMES_IN = frozenset(
    (Reason.REASON_STORAGE_UNAVAILABLE, Reason.REASON_OVERLOADED, Reason.REASON_MEMORY)
)
_HELD_BACK = frozenset((Status.STATUS_PARKED, Status.STATUS_RETRY))

log = Journal("collector.door")

Context = grpc.aio.ServicerContext[Any, Any]


_Answers = asyncio.Queue[asyncio.Future[list[pb.Answer]] | None]


class _Cut(Exception):
    """The stream must end: a gRPC status and what to tell the agent."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


class _Session:
    """One connected agent."""

    __slots__ = ("cut", "heard", "held_back", "peer")

    def __init__(self, peer: Peer, heard: Heard) -> None:
        self.peer = peer
        self.heard = heard
        self.held_back = False
        """Whether some of its last answers were PARKED or RETRY."""
        self.cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, code: grpc.StatusCode, text: str) -> None:
        if not self.cut.done():
            self.cut.set_exception(_Cut(code, text))


class IngestService:
    """The RPC of one listener. Several share `occupancy` while one replaces another."""

    def __init__(
        self,
        pipeline: Pipeline,
        authenticator: Authenticator,
        occupancy: Occupancy,
        pressure: Pressure,
        noise: Noise,
        max_in_flight: Callable[[], int],
    ) -> None:
        self._pipeline = pipeline
        self._tally = pipeline.tally
        self._authenticator = authenticator
        self._occupancy = occupancy
        self._pressure = pressure
        self._noise = noise
        self._max_in_flight = max_in_flight
        self._sessions: set[_Session] = set()
        self._closing = False

    def handler(self) -> grpc.GenericRpcHandler:
        """The RPC. Requests stay bytes: what an agent may not send yet is not parsed either."""
        deliver: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            self.Deliver, response_serializer=pb.DeliverResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler("weighbridge.v1.Ingest", {"Deliver": deliver})

    async def Deliver(self, _requests: object, context: Context) -> None:
        try:
            await self._stream(context)
        except _Cut as cut:
            await context.abort(cut.code, cut.text)

    def cut_expired(self) -> None:
        for session in self._sessions:
            if self._authenticator.expired(session.peer):
                self._cut_off(session)

    async def recheck(self) -> None:
        """Cut whoever was revoked since it came in, or may report other tenants now."""
        sessions = list(self._sessions)
        standing = self._authenticator.standing
        # In a thread: each is a query, and twenty thousand of them would hold up everybody.
        standings = await asyncio.to_thread(lambda: [standing(session.peer) for session in sessions])
        for session, found in zip(sessions, standings, strict=True):
            if found is Standing.REVOKED:
                self._cut_off(session)
            elif found is Standing.CHANGED:
                log.info("agent_tenants_changed", agent_id=session.peer.agent_id)
                session.end(
                    grpc.StatusCode.UNAVAILABLE, "the tenants of this agent have changed; connect again"
                )

    def _cut_off(self, session: _Session) -> None:
        if session.cut.done():
            return
        log.warning("agent_cut_off", code=Meter.NOT_AUTHORISED, agent_id=session.peer.agent_id)
        self._refused(Meter.NOT_AUTHORISED, "revoked_or_expired")
        session.end(
            grpc.StatusCode.UNAUTHENTICATED,
            f"{Meter.NOT_AUTHORISED}: the certificate is revoked or has expired: enrol again",
        )

    def say_goodbye(self) -> None:
        """End every stream once what was received is answered; take no new one."""
        self._closing = True
        for session in self._sessions:
            if not session.cut.done():
                session.cut.set_result(None)

    async def _stream(self, context: Context) -> None:
        if self._closing:
            raise _Cut(grpc.StatusCode.UNAVAILABLE, GOODBYE)
        if self._pressure.high:
            self._refused(Meter.BUFFER_OVERFLOW, "memory")
            raise _Cut(grpc.StatusCode.RESOURCE_EXHAUSTED, self._pressure.trouble)
        if self._occupancy.streams >= self._occupancy.room.streams:
            # Before the certificate is read: nothing is cheaper to refuse.
            raise self._full(Full("too_many_streams", "streams"))
        try:
            peer = self._authenticator.peer(context.auth_context())
        except NotAuthenticated as error:
            self._refused(Meter.NOT_AUTHORISED, "not_authenticated")
            log.warning("agent_refused", code=Meter.NOT_AUTHORISED, peer=context.peer(), error=str(error))
            raise _Cut(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        address = context.peer().rpartition(":")[0]
        try:
            self._occupancy.enter(peer.agent_id, address)
        except Full as full:
            raise self._full(full) from None
        session = _Session(peer, self._noise.enter(context.peer()))
        self._sessions.add(session)
        self._tally.connections += 1
        self._tally.open_streams += 1
        try:
            await self._hello(context, session)
            await self._converse(context, session)
        except asyncio.CancelledError:
            # gRPC ends the call itself, with RESOURCE_EXHAUSTED, when a message is over the bound; a killed agent
            # and a cut network look the same from here.
            self._tally.broken_streams += 1
            raise
        finally:
            self._tally.open_streams -= 1
            self._sessions.discard(session)
            session.heard.streams -= 1
            self._occupancy.leave(peer.agent_id, address, time.monotonic_ns())
            session.cut.cancel()

    def _full(self, full: Full) -> _Cut:
        self._refused(Meter.BUFFER_OVERFLOW, full.reason)
        return _Cut(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_CONCURRENCY}: {full} is reached; try another collector"
        )

    async def _hello(self, context: Context, session: _Session) -> None:
        peer = session.peer
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                data = await context.read()
        except TimeoutError:
            raise _Cut(grpc.StatusCode.INVALID_ARGUMENT, f"no Hello within {HELLO_SECONDS:.0f} s") from None
        await self._pay(session, data)
        first = _parse(data)
        if first is None or first.WhichOneof("kind") != "hello":
            self._refused(Meter.INVALID_BATCH, "no_hello")
            raise _Cut(grpc.StatusCode.INVALID_ARGUMENT, f"{Meter.INVALID_BATCH}: a stream begins with Hello")
        epochs = [first.hello.epoch, *(old.epoch for old in first.hello.older)]
        if len(epochs) > MAX_EPOCHS_PER_AGENT or not all(0 < epoch < MAX_VALUE for epoch in epochs):
            self._refused(Meter.INVALID_BATCH, "bad_hello")
            raise _Cut(
                grpc.StatusCode.INVALID_ARGUMENT, f"{Meter.INVALID_BATCH}: Hello names an impossible epoch"
            )
        try:
            opened = self._pipeline.open(peer.agent_id, first.hello)
        except TooManyEpochs:
            self._refused(Meter.BUFFER_OVERFLOW, "too_many_epochs")
            raise _Cut(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{Meter.BUFFER_OVERFLOW}: this agent opened too many epochs: its spool does not last;"
                " mend its disk and enrol it anew",
            ) from None
        await context.write(
            pb.DeliverResponse(
                welcome=pb.Welcome(
                    max_in_flight=self._max_in_flight(),
                    max_message_bytes=MAX_MESSAGE_BYTES,
                    max_batch_bytes=MAX_BATCH_BYTES,
                    watermark=opened.watermark,
                    latest_epoch=opened.latest_epoch,
                )
            )
        )

    async def _converse(self, context: Context, session: _Session) -> None:
        waiting: _Answers = asyncio.Queue(READ_AHEAD_PARTS)
        reader = asyncio.ensure_future(self._read(context, session, waiting))
        writer = asyncio.ensure_future(self._write(context, session, waiting))
        try:
            await asyncio.wait({reader, writer, session.cut}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and reader.exception() is None:
                # The agent has said all; its answers are still on their way.
                await asyncio.wait({writer, session.cut}, return_when=asyncio.FIRST_COMPLETED)
            if session.cut.done():
                session.cut.result()
            if writer.done():
                writer.result()
                # A call that gRPC ended by itself looks like a half-close first, and is cancelled a moment later.
                await asyncio.sleep(CANCEL_SECONDS)
                return
            # A goodbye, or a message that ends the stream: what was read before it is still answered.
            trouble = reader.exception() if reader.done() else None
            reader.cancel()
            await waiting.put(None)
            await writer
            raise trouble or _Cut(grpc.StatusCode.UNAVAILABLE, GOODBYE)
        finally:
            for task in (reader, writer):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _read(self, context: Context, session: _Session, waiting: _Answers) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            await self._pay(session, data)
            items = self._items(data)
            # An agent that is silent from now on holds no memory but its stream's.
            del data
            while items:
                most_bytes = HELD_PART_BYTES if session.held_back else PART_BYTES
                answers = self._judge(session.peer, _part(items, most_bytes))
                await waiting.put(answers)
                if items:
                    await asyncio.sleep(OTHERS_TURN_SECONDS)
                    # In order, whatever becomes of a part. Waited for like this nobody's cancellation is the answers'.
                    await asyncio.wait({answers})
                    said = {answer.reason for answer in answers.result()}
                    for reason in said & _NOBODY_COMES_IN:
                        await waiting.put(self._pipeline.put_off(list(items), reason))
                        items.clear()
                        break
        await waiting.put(None)

    async def _pay(self, session: _Session, data: Any) -> None:
        """Wait until the rate of this agent allows its message."""
        if data is grpc.aio.EOF:
            return
        session.heard.message_bytes += len(data)
        wait_seconds = self._occupancy.charge(session.peer.agent_id, len(data), time.monotonic_ns())
        if wait_seconds:
            self._tally.slowed_messages += 1
            await asyncio.sleep(wait_seconds)

    def _items(self, data: bytes) -> deque[Item]:
        """What one message delivers."""
        message = _parse(data)
        if message is None or message.WhichOneof("kind") != "delivery":
            self._refused(Meter.INVALID_BATCH, "unreadable_message")
            raise _Cut(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{Meter.INVALID_BATCH}: not a Delivery; the two sides do not speak the same version",
            )
        items = message.delivery.items
        if len(items) > MAX_ITEMS_PER_DELIVERY:
            self._refused(Meter.INVALID_BATCH, "too_many_items")
            raise _Cut(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{Meter.INVALID_BATCH}: {len(items)} items in a Delivery, at most {MAX_ITEMS_PER_DELIVERY}",
            )
        return deque(map(Item.of, items))

    def _judge(self, peer: Peer, items: list[Item]) -> asyncio.Future[list[pb.Answer]]:
        """The answers to a part, as they will be."""
        if self._pressure.high:
            return self._pipeline.put_off(items, Reason.REASON_MEMORY)
        return self._pipeline.deliver(peer, items)

    async def _write(self, context: Context, session: _Session, waiting: _Answers) -> None:
        while (future := await waiting.get()) is not None:
            answers = await future
            session.held_back = any(answer.status in _HELD_BACK for answer in answers)
            await context.write(pb.DeliverResponse(answers=pb.Answers(answers=answers)))

    def _refused(self, code: Meter, reason: str) -> None:
        self._tally.refusals[code, reason] += 1


def _part(items: deque[Item], most_bytes: int) -> list[Item]:
    """The first of the items, taken out: one at least, and no more once they have `most_bytes`."""
    part: list[Item] = []
    size = 0
    while items and size < most_bytes:
        part.append(items.popleft())
        size += len(part[-1].batch)
    return part


def _parse(data: Any) -> pb.DeliverRequest | None:
    """None if it is no such message, or the end."""
    try:
        return None if data is grpc.aio.EOF else pb.DeliverRequest.FromString(data)
    except DecodeError:
        return None
