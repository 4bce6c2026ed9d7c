"""A running collector and how to come in."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import grpc

from bench.fleet import SimulatedAgent, Stream, enrol
from bench.site import Site
from collector.door.ca import CertificateAuthority
from wire.statuses import Status
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub


@dataclass
class Door:
    """A running collector and how to come in."""

    site: Site
    authority: CertificateAuthority

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.site.ports['ingest']}"

    def agent(self, tenants: frozenset[str] | None = None) -> SimulatedAgent:
        return enrol(self.authority, tenants)

    def channel(self, agent: SimulatedAgent, **options: Any) -> grpc.Channel:
        extra = [(f"grpc.{name}", value) for name, value in options.items()]
        return grpc.secure_channel(self.address, agent.credentials, [*CHANNEL_OPTIONS, *extra])

    def deliver(
        self, agent: SimulatedAgent, stream: Stream, items: list[pb.Item], **more: Any
    ) -> list[pb.Answer]:
        """One Hello, one Delivery, its answers."""

        def requests() -> Iterator[pb.DeliverRequest]:
            yield stream.hello(more.get("oldest_seq", 1))
            yield pb.DeliverRequest(delivery=pb.Delivery(items=items))

        with self.channel(agent) as channel:
            responses = list(IngestStub(channel).Deliver(requests(), timeout=20))
        assert responses[0].WhichOneof("kind") == "welcome"
        return [a for r in responses[1:] for a in r.answers.answers]

    def open(self, agent: SimulatedAgent, epoch: int = 1) -> OpenStream:
        """A stream that stays open until it is closed; RpcError if it is not welcomed."""
        return OpenStream(self.channel(agent), Stream(agent.agent_id, epoch))

    def replay(self, *words: object) -> tuple[int, dict[str, Any], str]:
        """Run `usage-replay`: exit code, what became of the batches, standard error."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "collector.replay",
                "--config",
                self.site.collector_file,
                "--json",
                *map(str, words),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.site.ports['local']}/metrics", timeout=10
        ) as page:
            lines = page.read().decode().splitlines()
        return {
            k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))
        }

    def refusals(self, code: str, reason: str) -> float:
        key = f'weighbridge_collector_refusals_total{{code="{code}",reason="{reason}"}}'
        return self.metrics().get(key, 0.0)

    def log(self, *options: str) -> list[dict[str, Any]]:
        done = self.site.command("collector", "log", "cat", "--json", *options)
        return [json.loads(line) for line in done.stdout.splitlines()]


class OpenStream:
    """A welcomed stream."""

    def __init__(self, channel: grpc.Channel, stream: Stream) -> None:
        self.stream = stream
        self._channel = channel
        self.last: list[pb.Item] = []
        self._requests: queue.Queue[pb.DeliverRequest | None] = queue.Queue()
        self._requests.put(stream.hello())
        self._responses: Any = IngestStub(channel).Deliver(iter(self._requests.get, None), timeout=60)
        try:
            self.welcome = next(self._responses).welcome
        except BaseException:
            self.close()
            raise

    def deliver(self, count: int) -> list[pb.Answer]:
        """The answers to so many new batches."""
        self.last = [self.stream.next() for _ in range(count)]
        return self.again()

    def again(self) -> list[pb.Answer]:
        """The answers to the last batches, sent once more."""
        return [answer for part in self.again_in_parts() for answer in part]

    def again_in_parts(self) -> Iterator[list[pb.Answer]]:
        """The same, as they come."""
        self._requests.put(pb.DeliverRequest(delivery=pb.Delivery(items=self.last)))
        left = len(self.last)
        while left:
            part = list(next(self._responses).answers.answers)
            left -= len(part)
            yield part

    def send_rubbish(self, sizes: list[int]) -> None:
        """Deliveries of so many bytes whose one item is nothing; nobody waits for answers."""
        for size in sizes:
            item = pb.Item(epoch=self.stream.epoch, seq=1, batch=bytes(size))
            self._requests.put(pb.DeliverRequest(delivery=pb.Delivery(items=[item])))

    def end(self) -> grpc.RpcError:
        """How the other side ends it, once it does."""
        try:
            next(self._responses)
        except grpc.RpcError as error:
            return error
        raise AssertionError("it said something else")

    def close(self) -> None:
        self._requests.put(None)
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def statuses(answers: list[pb.Answer]) -> list[str]:
    return [Status.Name(a.status).removeprefix("STATUS_") for a in answers]
