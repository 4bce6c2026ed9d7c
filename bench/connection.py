"""One simulated agent with one open stream: Deliveries go out at a pace, answers are counted and timed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Self

import grpc.aio

from bench.fleet import SimulatedAgent
from wire.statuses import Status
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub


class Connection:
    """To be opened and closed, or used as a context."""

    def __init__(self, port: int, agent: SimulatedAgent, hello: pb.DeliverRequest) -> None:
        self.answers: Counter[int] = Counter()
        """By status."""
        self._hello = hello
        self._channel = grpc.aio.secure_channel(f"127.0.0.1:{port}", agent.credentials, CHANNEL_OPTIONS)
        self._stub = IngestStub(self._channel)

    @property
    def delivered(self) -> int:
        """Batches that the collector has answered for, other than with RETRY."""
        return self.answers.total() - self.answers[Status.STATUS_RETRY]

    async def open(self) -> None:
        self._call = self._stub.Deliver()
        await self._call.write(self._hello)
        assert (await self._call.read()).WhichOneof("kind") == "welcome"

    async def open_another(self, hello: pb.DeliverRequest) -> None:
        """End the stream and begin one over the same channel."""
        await self._call.done_writing()
        self._hello = hello
        await self.open()

    async def close(self) -> None:
        await self._call.done_writing()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def exchange(self, request: pb.DeliverRequest) -> set[int]:
        """Send one Delivery and take its answers; the numbers that are settled, which RETRY does not."""
        await self._call.write(request)
        return await self._settled(len(request.delivery.items))

    async def send(
        self,
        requests: Iterable[pb.DeliverRequest],
        latencies: list[float],
        begin: float = 0.0,
        pace: float = 0.0,
        in_flight: int = 1 << 30,
    ) -> None:
        """Send one request every `pace` seconds from `begin` on (of the loop's time), as fast as can be with 0, with
        `in_flight` unanswered at most; note how long each took until all of it was answered.
        """
        loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(in_flight)
        sent: asyncio.Queue[tuple[float, int] | None] = asyncio.Queue()

        async def answers() -> None:
            while (one := await sent.get()) is not None:
                at, count = one
                await self._settled(count)
                latencies.append(loop.time() - at)
                room.release()

        async with asyncio.TaskGroup() as both:
            both.create_task(answers())
            for index, request in enumerate(requests):
                await asyncio.sleep(max(0.0, begin + index * pace - loop.time()))
                await room.acquire()
                sent.put_nowait((loop.time(), len(request.delivery.items)))
                await self._call.write(request)
            sent.put_nowait(None)

    async def _settled(self, count: int) -> set[int]:
        """Take `count` answers."""
        settled = set()
        while count:
            message = await self._call.read()
            for answer in message.answers.answers:
                self.answers[answer.status] += 1
                if answer.status != Status.STATUS_RETRY:
                    settled.add(answer.seq)
            count -= len(message.answers.answers)
        assert count == 0
        return settled


def p99(latencies: list[float]) -> float:
    return sorted(latencies)[int(len(latencies) * 0.99)]
