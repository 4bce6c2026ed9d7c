"""Simulated agents: real certificates of a throw-away CA, and streams of well-formed, chained batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from hashlib import sha256

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from collector.door.ca import CertificateAuthority
from wire.containers import put_table
from wire.identity import AgentId, digest, new_agent_id
from wire.measures import MEASURES
from wire.tls import client_credentials
from wire.v1 import ingest_pb2 as pb
from wire.v1 import usage_pb2

BOOT_ID = "6f1b7e9e-0f5c-4c0e-9d57-0d4a1c5d9a11"
KNOWN = (1 << 22) - 1
"""Everything but the network."""
SECOND_NS = 1_000_000_000


@dataclass(slots=True)
class Stream:
    """One (agent, epoch): makes its batches in order, each naming the one before it."""

    agent_id: AgentId
    epoch: int
    rows: int = 3
    tenant: str = "acme"
    seq: int = 0
    last_digest: bytes = b""
    start_unix_ns: int = field(default_factory=lambda: time.time_ns() - 30 * 86_400 * SECOND_NS)
    interval_ns: int = SECOND_NS

    def message(self) -> usage_pb2.UsageBatch:
        """The next batch as a message, for tests that want to spoil it; `seal` numbers it for good."""
        batch = self.plain_message()
        put_table(batch, batch.containers)
        return batch

    def plain_message(self) -> usage_pb2.UsageBatch:
        """The same with its container table open."""
        rows, seq = self.rows, self.seq + 1
        start = self.start_unix_ns + seq * self.interval_ns
        batch = usage_pb2.UsageBatch(
            schema_version=1,
            agent_id=self.agent_id,
            epoch=self.epoch,
            seq=seq,
            previous_digest=self.last_digest,
            tenant=self.tenant,
            interval_start_unix_ns=start,
            interval_end_unix_ns=start + self.interval_ns,
            interval_duration_ns=self.interval_ns,
            boot_id=BOOT_ID,
            host="bench",
            producer="bench",
            cpus=64,
            coverage=0xFF,
            containers=_table(rows),
            row_flags=[0] * rows,
            known=[KNOWN] * rows,
        )
        for bit, name in enumerate(MEASURES[:13]):
            getattr(batch, name).extend([1_000_003 * (bit + 1) + seq + row for row in range(rows)])
        return batch

    def seal(self, batch: usage_pb2.UsageBatch) -> pb.Item:
        """Use the next number up for this batch."""
        body = batch.SerializeToString(deterministic=True)
        self.seq += 1
        self.last_digest = digest(body)
        return pb.Item(epoch=self.epoch, seq=self.seq, digest=self.last_digest, batch=body)

    def next(self) -> pb.Item:
        return self.seal(self.message())

    def hello(self, oldest_seq: int | None = None) -> pb.DeliverRequest:
        hello = pb.Hello(
            epoch=self.epoch,
            next_seq=self.seq + 1,
            oldest_seq=self.seq + 1 if oldest_seq is None else oldest_seq,
            producer="bench",
        )
        return pb.DeliverRequest(hello=hello)


@lru_cache(64)
def _table(rows: int) -> usage_pb2.ContainerTable:
    """With ids as random as those of a runtime: zeros would be packed to nothing."""
    ids = [sha256(f"{row}".encode()).hexdigest() for row in range(rows)]
    return usage_pb2.ContainerTable(
        cgroup_id=range(1_000, 1_000 + rows),
        cgroup_path=[f"/system.slice/docker-{one}.scope" for one in ids],
        kind=[usage_pb2.UNIT_KIND_CONTAINER] * rows,
        runtime=["docker"] * rows,
        container_id=ids,
        pod_uid=[""] * rows,
        name=[f"container-{row}" for row in range(rows)],
    )


@dataclass(frozen=True, slots=True)
class SimulatedAgent:
    """An enrolled agent without a host."""

    agent_id: AgentId
    credentials: grpc.ChannelCredentials
    certificate_pem: bytes
    key_pem: bytes


def enrol(authority: CertificateAuthority, tenants: frozenset[str] | None = None) -> SimulatedAgent:
    """What `enroll` does, without the network."""
    agent_id = new_agent_id()
    key, csr = key_and_request()
    certificate = authority.issue_agent(csr, agent_id, timedelta(hours=1))
    authority.registry.add_agent(agent_id, "bench", tenants)
    return SimulatedAgent(agent_id, client_credentials(authority.ca_pem, certificate, key), certificate, key)


def key_and_request() -> tuple[bytes, bytes]:
    """(private key PEM, signing request DER)."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, csr.public_bytes(serialization.Encoding.DER)


def deliveries(items: list[pb.Item], size: int) -> Iterator[pb.DeliverRequest]:
    for start in range(0, len(items), size):
        yield pb.DeliverRequest(delivery=pb.Delivery(items=items[start : start + size]))
