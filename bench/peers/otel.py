"""An OpenTelemetry Collector beside ours: OTLP over gRPC with mutual TLS in, Kafka out.

Built from `otelcol/`, where go.mod and go.sum pin every module, the first time that a benchmark wants it, into
`${XDG_CACHE_HOME:-~/.cache}/weighbridge/peers`: ten minutes of two cores and 1.5 GB of Go's caches. Where Go or its
modules cannot be had, there is no comparison.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import yaml

from bench.fleet import SECOND_NS, SimulatedAgent
from bench.ports import free_port
from wire.containers import table_of
from wire.measures import MEASURES
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import usage_pb2

SOURCE = Path(__file__).with_name("otelcol")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weighbridge/peers"
BUILD_SECONDS = 3_600
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
MAX_EXPORT_MIB = 16


def missing() -> str:
    """Why there is none here, or empty. Builds it when this is the first time."""
    if shutil.which("go") is None:
        return "needs Go"
    try:
        _binary()
    except subprocess.SubprocessError as error:
        return f"cannot be built: {getattr(error, 'stderr', None) or error}"
    return ""


def _binary() -> Path:
    sources = sorted(SOURCE.iterdir())
    version = subprocess.run(["go", "version"], capture_output=True, check=True).stdout
    named = hashlib.sha256(version + b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    binary = CACHE / f"otelcol-{named}"
    if not binary.exists():
        print("building the OpenTelemetry Collector, once: this takes minutes", file=sys.stderr)
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = CACHE / f".{binary.name}.{os.getpid()}"
        command = ["go", "build", "-mod=readonly", "-trimpath", "-ldflags=-s -w", "-o", str(fresh), "."]
        try:
            subprocess.run(
                command, cwd=SOURCE, check=True, stderr=subprocess.PIPE, text=True, timeout=BUILD_SECONDS
            )
            fresh.rename(binary)
        finally:
            fresh.unlink(missing_ok=True)
    return binary


class OtelCollector:
    """A process with the certificate of our own collector, that takes the certificates of our agents.

    A request is answered when the brokers have confirmed it: no queue, in memory or on disk. acks=all, idempotence
    (franz-go's default), lz4. What came in one request goes out as one message.
    """

    def __init__(self, directory: Path, ca_directory: Path, broker: str, topic: str) -> None:
        directory.mkdir()
        self._port = free_port()
        self._directory = directory
        self._file = directory / "otelcol.yaml"
        self._file.write_text(yaml.safe_dump(_configuration(self._port, ca_directory, broker, topic)))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with (self._directory / "otelcol.log").open("wb") as log:
            words = [str(_binary()), "--config", str(self._file)]
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _wait(self, seconds: float = 60.0) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while True:
            said = (self._directory / "otelcol.log").read_text(errors="replace")[-2_000:]
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
                return
            time.sleep(0.1)

    def deliver(self, agents: Sequence[SimulatedAgent], request: bytes, each: int, in_flight: int) -> None:
        """Every agent sends `request` `each` times, with so many on their way."""

        async def one(agent: SimulatedAgent) -> None:
            room = asyncio.Semaphore(in_flight)
            address = f"127.0.0.1:{self._port}"
            async with grpc.aio.secure_channel(address, agent.credentials, CHANNEL_OPTIONS) as channel:
                export = channel.unary_unary(EXPORT, request_serializer=bytes, response_deserializer=bytes)

                async def send() -> None:
                    async with room:
                        await export(request, wait_for_ready=True, timeout=120)

                await asyncio.gather(*(send() for _ in range(each)))

        async def all_agents() -> None:
            await asyncio.gather(*map(one, agents))

        asyncio.run(all_agents())


def _configuration(port: int, ca_directory: Path, broker: str, topic: str) -> dict[str, Any]:
    pair = str(ca_directory / "server.pem")
    grpc_in = {
        "endpoint": f"127.0.0.1:{port}",
        "max_recv_msg_size_mib": MAX_EXPORT_MIB,
        "tls": {"cert_file": pair, "key_file": pair, "client_ca_file": str(ca_directory / "ca.crt")},
    }
    kafka = {
        "brokers": [broker],
        "metrics": {"topic": topic, "encoding": "otlp_proto"},
        "producer": {
            "required_acks": -1,
            "compression": "lz4",
            "max_message_bytes": MAX_EXPORT_MIB << 20,
            "allow_auto_topic_creation": False,
        },
        "timeout": "120s",
        "sending_queue": {"enabled": False},
    }
    return {
        "receivers": {"otlp": {"protocols": {"grpc": grpc_in}}},
        "exporters": {"kafka": kafka},
        "service": {
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "error"}},
            "pipelines": {"metrics": {"receivers": ["otlp"], "exporters": ["kafka"]}},
        },
    }


def request_of(batches: Sequence[usage_pb2.UsageBatch]) -> bytes:
    """The same rows as OTLP: a resource per container, as OpenTelemetry's own receivers for container runtimes lay it
    out, with a sum per measure."""
    otlp = grpc.protos("bench/peers/otlp.proto")
    request = otlp.ExportMetricsServiceRequest()
    for batch in batches:
        table = table_of(batch)
        for row, path in enumerate(table.cgroup_path):
            resource = request.resource_metrics.add()
            about = {
                "tenant": batch.tenant,
                "host.name": batch.host,
                "host.id": batch.agent_id,
                "cgroup.path": path,
                "container.id": table.container_id[row],
                "container.name": table.name[row],
                "container.runtime": table.runtime[row],
            }
            resource.resource.attributes.extend(
                otlp.KeyValue(key=key, value=otlp.AnyValue(string_value=text)) for key, text in about.items()
            )
            scope = resource.scope_metrics.add(scope=otlp.Scope(name="weighbridge"))
            for name in MEASURES[:13]:
                point = otlp.NumberDataPoint(
                    start_time_unix_nano=batch.interval_start_unix_ns,
                    time_unix_nano=batch.interval_start_unix_ns + SECOND_NS,
                    as_int=getattr(batch, name)[row],
                )
                total = otlp.Sum(data_points=[point], aggregation_temporality=1, is_monotonic=True)
                scope.metrics.add(name=f"container.{name}", unit="1", sum=total)
    encoded: bytes = request.SerializeToString()
    return encoded
