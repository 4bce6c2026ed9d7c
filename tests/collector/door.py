"""A running collector and how to come in."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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


def statuses(answers: list[pb.Answer]) -> list[str]:
    return [Status.Name(a.status).removeprefix("STATUS_") for a in answers]
