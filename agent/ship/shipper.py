"""Spool -> collector over one gRPC stream; the protocol is taught in ingest.proto.

One task writes, one reads. What is unanswered when a stream breaks is simply sent again: identities make
that harmless. Nothing here decides about usage; a batch leaves the spool only because a collector answered
that it is durable there, or refused it for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from agent.ship.backoff import Backoff
from agent.ship.spool import Aside, BatchKey, Spool
from agent.ship.spool_file import SpoolError
from wire.daemon.journal import Journal
from wire.statuses import Reason, Status
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub

MAX_ITEMS = 50
MAX_DELIVERY_BYTES = 1 << 20
WELCOME_SECONDS = 20.0
ANSWER_SECONDS = 60.0
FLUSH_SECONDS = 1.0
IDLE_SECONDS = 30.0
"""With nothing to send it looks up this often, to be seen alive."""
LEAST_RETRY_SECONDS = 0.1
BASE_SECONDS, CAP_SECONDS = 0.2, 60.0
PERSON_NEEDED_SECONDS = 30.0
"""Least wait after an answer that only a person can change (bad certificate, wrong version)."""

_PERSON_NEEDED = frozenset(
    (
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
    )
)
_SETTLED = frozenset(
    (Status.STATUS_ACCEPTED, Status.STATUS_DUPLICATE, Status.STATUS_PARKED, Status.STATUS_REJECTED)
)

log = Journal("agent.ship")

Connect = Callable[[str], grpc.aio.Channel]
OpenEpoch = Callable[[int, BatchKey | None], Awaitable[None]]
"""(latest epoch known, first batch to set aside or None): make the loop begin a new epoch."""


class StaleSpool(Exception):
    """The collector knows more of this epoch than the spool does: an older copy of the spool is in use."""


@dataclass(slots=True)
class ShipperState:
    """For status, metrics and readiness."""

    collector: str = ""
    connected_since: float | None = None
    last_answer: float | None = None
    last_turn_monotonic: float = 0.0
    """When it last came round its loop: for the watchdog."""
    in_flight: int = 0
    trouble: str = ""
    """Why there is no connection, or empty."""
    person_needed: bool = False
    answers: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    bytes_sent: int = 0
    connects: int = 0


class _Stream:
    """One welcomed stream."""

    def __init__(self, address: str, channel: grpc.aio.Channel, call: Any, welcome: pb.Welcome) -> None:
        self.address, self.channel, self.call, self.welcome = address, channel, call, welcome

    async def close(self) -> None:
        self.call.cancel()
        await self.channel.close(grace=0.5)


class Shipper:
    def __init__(
        self,
        spool: Spool,
        connect: Connect,
        collectors: Sequence[str],
        open_epoch: OpenEpoch,
        producer: str,
        rng: random.Random | None = None,
    ) -> None:
        self._spool = spool
        self._connect = connect
        self._collectors = list(collectors)
        self._open_epoch = open_epoch
        self._producer = producer
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, hides nothing
        self._rng.shuffle(self._collectors)
        self._wake = asyncio.Event()
        self._reconnect = False
        self._in_flight: dict[BatchKey, tuple[float, int]] = {}
        self._cursor: BatchKey | None = None
        self._resume_at = 0.0
        self.state = ShipperState()

    def notify(self) -> None:
        """New batches are in the spool."""
        self._wake.set()

    def reconnect(self) -> None:
        """Open a new stream (with the credentials of now) and then close the old one."""
        self._reconnect = True
        self._wake.set()

    async def run(self) -> None:
        """Ship until cancelled."""
        backoff = Backoff(BASE_SECONDS, CAP_SECONDS, self._rng)
        turn = 0
        while True:
            address = self._collectors[turn % len(self._collectors)]
            self.state.last_turn_monotonic = time.monotonic()
            try:
                stream = await self._open(address)
            except (
                grpc.aio.AioRpcError,
                OSError,
                TimeoutError,
                StaleSpool,
                SpoolError,
                asyncio.InvalidStateError,
            ) as error:
                turn += 1
                await asyncio.sleep(self._failed(address, error, backoff))
                continue
            before = self.state.answers.total()
            try:
                await self._pump(stream)
            except (
                grpc.aio.AioRpcError,
                TimeoutError,
                SpoolError,
                asyncio.InvalidStateError,
                EOFError,
            ) as error:
                if self.state.answers.total() > before:
                    backoff.succeeded()
                turn += 1
                await asyncio.sleep(self._failed(address, error, backoff))

    async def drain(self, seconds: float) -> bool:
        """Wait until nothing is pending; False when time ran out."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self._in_flight and not await asyncio.to_thread(self._spool.pending, None, 1, 1):
                return True
            await asyncio.sleep(0.05)
        return False

    def _failed(self, address: str, error: BaseException, backoff: Backoff) -> float:
        code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
        detail = (error.details() or "") if isinstance(error, grpc.aio.AioRpcError) else str(error)
        name = code.name if code is not None else type(error).__name__
        trouble = f"{address}: {name}: {detail}"[:500]
        if trouble != self.state.trouble:
            log.warning("collector_unavailable", collector=address, reason=name, detail=detail)
        self.state.trouble = trouble
        self.state.connected_since = None
        self.state.person_needed = code in _PERSON_NEEDED
        self._in_flight.clear()
        self.state.in_flight = 0
        self._cursor = None
        wait = backoff.next_seconds()
        return max(wait, PERSON_NEEDED_SECONDS) if self.state.person_needed else wait

    async def _open(self, address: str) -> _Stream:
        """Connect, say Hello, be welcomed."""
        epoch, next_seq = self._spool.epoch, self._spool.next_seq
        channel = self._connect(address)
        call = IngestStub(channel).Deliver()
        try:
            async with asyncio.timeout(WELCOME_SECONDS):
                held = await asyncio.to_thread(self._spool.held)
                hello = pb.Hello(
                    epoch=epoch,
                    next_seq=next_seq,
                    oldest_seq=held.pop(epoch, next_seq),
                    older=[pb.HeldEpoch(epoch=e, oldest_seq=seq) for e, seq in held.items()],
                    producer=self._producer,
                )
                await call.write(pb.DeliverRequest(hello=hello))
                first = await call.read()
            if first is grpc.aio.EOF or first.WhichOneof("kind") != "welcome":
                # The status says more than the missing message.
                await call.code()
                raise grpc.aio.AioRpcError(
                    await call.code(),
                    await call.initial_metadata(),
                    await call.trailing_metadata(),
                    await call.details(),
                )
            welcome = first.welcome
            if welcome.watermark >= next_seq and epoch == self._spool.epoch:
                log.error(
                    "spool_is_older_than_collector",
                    epoch=epoch,
                    next_seq=next_seq,
                    watermark=welcome.watermark,
                )
                await self._open_epoch(welcome.latest_epoch, None)
                raise StaleSpool("the spool is an older copy of itself; a new epoch was begun")
        except BaseException:
            call.cancel()
            await channel.close(grace=None)
            raise
        self.state.collector, self.state.trouble, self.state.person_needed = address, "", False
        self.state.connected_since = time.time()
        self.state.connects += 1
        log.info("collector_connected", collector=address, epoch=epoch, watermark=welcome.watermark)
        return _Stream(address, channel, call, welcome)

    async def _pump(self, stream: _Stream) -> None:
        """Send and take answers until the stream breaks; a rotation changes `stream` under way."""
        self._cursor, self._resume_at = None, 0.0
        self._in_flight.clear()
        reader = asyncio.create_task(self._read(stream))
        flushed = time.monotonic()
        try:
            while True:
                if self._reconnect:
                    self._reconnect = False
                    with contextlib.suppress(grpc.aio.AioRpcError, OSError, TimeoutError):
                        fresh = await self._open(stream.address)
                        reader.cancel()
                        old, stream = stream, fresh
                        await old.close()
                        self._in_flight.clear()
                        self._cursor = None
                        reader = asyncio.create_task(self._read(stream))
                self._wake.clear()
                sent = await self._send(stream)
                now = self.state.last_turn_monotonic = time.monotonic()
                if now - flushed >= FLUSH_SECONDS:
                    flushed = now
                    with contextlib.suppress(SpoolError):
                        await asyncio.to_thread(self._spool.flush)
                if self._in_flight and now - min(at for at, _ in self._in_flight.values()) > ANSWER_SECONDS:
                    raise TimeoutError(f"no answer for {ANSWER_SECONDS:.0f} s")
                if not sent:
                    wake = asyncio.create_task(self._wake.wait())
                    idle = FLUSH_SECONDS if self._in_flight or self._resume_at > now else IDLE_SECONDS
                    if self._resume_at > now:
                        idle = min(FLUSH_SECONDS, self._resume_at - now)
                    await asyncio.wait({wake, reader}, timeout=idle, return_when=asyncio.FIRST_COMPLETED)
                    wake.cancel()
                if reader.done():
                    reader.result()
                    raise EOFError("the collector ended the stream")
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await reader
            with contextlib.suppress(SpoolError):
                await asyncio.to_thread(self._spool.flush)
            await stream.close()

    async def _send(self, stream: _Stream) -> bool:
        """Send one Delivery if there is room and something to send."""
        room = stream.welcome.max_in_flight - len(self._in_flight)
        if room <= 0 or time.monotonic() < self._resume_at:
            return False
        limit = min(MAX_DELIVERY_BYTES, stream.welcome.max_message_bytes * 9 // 10)
        try:
            batches = await asyncio.to_thread(self._spool.pending, self._cursor, min(room, MAX_ITEMS), limit)
        except SpoolError as error:
            log.error("spool_unreadable", error=error)
            self._resume_at = time.monotonic() + 5.0
            return False
        if not batches:
            return False
        self._cursor = batches[-1].key
        fresh = [batch for batch in batches if batch.key not in self._in_flight]
        if not fresh:
            return True
        now = time.monotonic()
        delivery = pb.Delivery(
            items=[pb.Item(epoch=b.epoch, seq=b.seq, digest=b.digest, batch=b.body) for b in fresh]
        )
        for batch in fresh:
            self._in_flight[batch.key] = (now, batch.rows)
        self.state.in_flight = len(self._in_flight)
        await stream.call.write(pb.DeliverRequest(delivery=delivery))
        self.state.bytes_sent += sum(len(batch.body) for batch in fresh)
        return True

    async def _read(self, stream: _Stream) -> None:
        while True:
            message = await stream.call.read()
            if message is grpc.aio.EOF:
                code = await stream.call.code()
                if code is not grpc.StatusCode.OK:
                    raise grpc.aio.AioRpcError(
                        code, grpc.aio.Metadata(), grpc.aio.Metadata(), await stream.call.details()
                    )
                return
            await self._answers(message.answers.answers)
            self._wake.set()

    async def _answers(self, answers: Sequence[pb.Answer]) -> None:
        settled = []
        now = time.monotonic()
        self.state.last_answer = time.time()
        for answer in answers:
            key = BatchKey(answer.epoch, answer.seq)
            sent = self._in_flight.pop(key, None)
            if sent is None:
                # Only what this stream was sent may leave the spool.
                log.warning("answer_to_nothing_sent", epoch=key.epoch, seq=key.seq)
                continue
            rows = sent[1]
            self.state.answers[Status.Name(answer.status).removeprefix("STATUS_").lower()] += 1
            if answer.status == Status.STATUS_REJECTED:
                reason = Reason.Name(answer.reason).removeprefix("REASON_").lower()
                self.state.rejected[reason] += 1
                log.error("batch_rejected", epoch=key.epoch, seq=key.seq, reason=reason, detail=answer.detail)
                if answer.reason == Reason.REASON_IDENTITY_CONFLICT:
                    if key.epoch == self._spool.epoch:
                        await self._open_epoch(key.epoch, key)
                    else:
                        await asyncio.to_thread(self._spool.quarantine, key, Aside.CONFLICT)
                    self._cursor = None
                    continue
            if answer.status in _SETTLED and answer.reason != Reason.REASON_DIGEST_MISMATCH:
                settled.append(key)
                self.state.rows += rows
            else:
                if answer.reason == Reason.REASON_OUT_OF_WINDOW and not self._in_flight:
                    # Everything before it was answered, or never will be (damaged on disk): say so anew.
                    self._reconnect = True
                # From the oldest again when the collector is ready: order is kept, nothing is skipped.
                self._cursor = None
                wait = max(LEAST_RETRY_SECONDS, answer.retry_after_ms / 1_000)
                self._resume_at = max(self._resume_at, now + wait)
        self._spool.acknowledge(settled)
        self.state.in_flight = len(self._in_flight)
