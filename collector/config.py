"""The collector's settings. Every key has its default here; an empty file is valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from collector.decide.validate import Bounds
from collector.errors import CollectorError
from wire.daemon.settings import Bytes, Seconds, SettingsError, load
from wire.limits import MAX_BATCH_BYTES, MAX_MESSAGE_BYTES

DEFAULT_FILE = Path("/etc/weighbridge/collector.yaml")
DEFAULT_STATE_DIR = Path("/var/lib/weighbridge-collector")
SETTING_REASONS = ("REASON_UNKNOWN_TENANT", "REASON_TENANT_NOT_PERMITTED", "REASON_CLOCK_SKEW")
"""Rejections that other settings would not have made: `log readmit` lets in what they concern."""

D = msgspec.Meta

_TOPIC = re.compile("[A-Za-z0-9._-]{1,200}")
_URL = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+(?:/[!-~]*)?")
_PORT = re.compile("[0-9]{1,5}")


class Listen(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where agents come in. `HOST:PORT`; port 0 takes a free one and writes it to `endpoints.json`."""

    ingest: Annotated[str, D(description="batches, mutual TLS")] = "0.0.0.0:9460"
    enrolment: Annotated[str, D(description="join tokens, server certificate only; empty closes it")] = (
        "0.0.0.0:9461"
    )
    advertise: Annotated[
        list[str],
        D(
            description="ingest addresses told to agents that enrol; empty: this port of the host they reached"
        ),
    ] = []


class Tls(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The collector's own CA, or an external one by four files' worth of settings."""

    ca_dir: Annotated[
        Path | None, D(description="directory of `weighbridge-collector ca init`; default STATE_DIR/ca")
    ] = None
    certificate_life: Annotated[
        Seconds, D(description="of an agent's certificate; agents renew at half of it")
    ] = Seconds(86_400)
    certificate_file: Annotated[
        Path | None, D(description="external CA: the collector's chain, PEM; re-read at each handshake")
    ] = None
    key_file: Annotated[Path | None, D(description="external CA: its key, PEM")] = None
    client_ca_file: Annotated[Path | None, D(description="external CA: who signs agents, PEM")] = None
    trust_domain: Annotated[str, D(description="external CA: the DOMAIN of spiffe://DOMAIN/agent/ID")] = ""


class Log(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The durable local log."""

    directory: Annotated[Path | None, D(description="default STATE_DIR/log")] = None
    segment_size: Annotated[Bytes, D(description="a new file is begun beyond this")] = Bytes(256 << 20)
    min_free: Annotated[
        Bytes, D(description="with less free space agents are told RETRY (METER-001) and keep their batches")
    ] = Bytes(256 << 20)
    keep: Annotated[
        Seconds | None,
        D(
            description="with Kafka: files written before are deleted, once the brokers have it all and none of it is parked;"
            " null: kept for ever"
        ),
    ] = None
    max_size: Annotated[
        Bytes | None,
        D(
            description="with Kafka: so are the oldest files while the log is larger; null: no matter how large"
        ),
    ] = None


class Connections(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What one connection may cost, whoever it is: bounds of the gRPC library, set when a door is opened."""

    most: Annotated[
        int,
        D(
            description="at the ingest door, those in the TLS handshake too; further ones are hung up on. Each may cost 60 KiB",
            ge=1,
            le=1_000_000,
        ),
    ] = 20_512
    handshake: Annotated[Seconds, D(description="1s to 1m: from connect to the end of the TLS handshake")] = (
        Seconds(10)
    )
    idle: Annotated[Seconds, D(description="1s or more: a connection without a stream is closed")] = Seconds(
        300
    )
    age: Annotated[
        Seconds,
        D(
            description="10s or more: then an agent has to connect again; agents renew their certificate sooner"
        ),
    ] = Seconds(86_400)


class Limits(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Bounds. What hits one is counted, and answered with RETRY."""

    streams: Annotated[int, D(description="agents connected at once", ge=1, le=1_000_000)] = 20_000
    streams_per_agent: Annotated[
        int, D(description="of one agent; it needs two while it renews its certificate", ge=2, le=1_000)
    ] = 4
    streams_per_address: Annotated[
        int, D(description="from one address; agents behind one NAT share it", ge=2, le=1_000_000)
    ] = 20_000
    bytes_per_second: Annotated[
        Bytes,
        D(
            description="of one agent, before anything is parsed; above it the agent is read more slowly. 1MiB or more"
        ),
    ] = Bytes(32 << 20)
    burst: Annotated[Bytes, D(description="bytes of one agent that may come at once, 4MiB or more")] = Bytes(
        128 << 20
    )
    memory: Annotated[
        Bytes | None,
        D(
            description="with more resident memory than this agents are told RETRY and new ones are turned away;"
            " null: three quarters of what the cgroup or the host has"
        ),
    ] = None
    queued: Annotated[Bytes, D(description="batches in memory that wait for the disk")] = Bytes(64 << 20)
    in_flight: Annotated[
        int, D(description="unanswered batches of one agent; at most the window of 256", ge=1, le=256)
    ] = 256


class Validation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a batch may say."""

    tenants: Annotated[
        list[str] | None, D(description="tenants that exist; others are rejected. null: any name is good")
    ] = None
    clock_ahead: Annotated[
        Seconds, D(description="how far a batch may end in the future of this host's clock")
    ] = Seconds(600)
    clock_behind: Annotated[
        Seconds, D(description="how long ago a batch may have ended; spools may be weeks old")
    ] = Seconds(400 * 86_400)

    def bounds(self) -> Bounds:
        """As the validator takes them."""
        return Bounds(
            tenants=None if self.tenants is None else frozenset(self.tenants),
            future_ns=self.clock_ahead.ns,
            past_ns=self.clock_behind.ns,
        )


Rate = Annotated[float, D(ge=0.001, le=1_000_000)] | Literal["unlimited"]
Burst = Annotated[float, D(ge=62, le=1_000_000_000)]
"""At least a token more than the heaviest batch weighs, so that each one can go on some day."""
_MOST_PARKED = 10_000_000
_ParkBatches = Annotated[int, D(ge=0, le=_MOST_PARKED)]


class TenantPlan(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One tenant's plan, by the tenant's name. What it leaves out is as in `admission`."""

    rate: Annotated[Rate | None, D(description="tokens a second")] = None
    burst: Annotated[Burst | None, D(description="tokens; null with a `rate`: what it gives in a minute")] = (
        None
    )
    park: Annotated[Bytes | None, D(description="bytes that may wait")] = None
    park_batches: Annotated[_ParkBatches | None, D(description="batches that may wait")] = None


class AdmissionSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How much of each tenant goes on at once. A batch weighs 0.1 tokens, 0.01 a row and 0.05 a KiB; what is over
    the rate is parked, durably, and released in order as tokens come in."""

    rate: Annotated[
        Rate, D(description="tokens a second of a tenant without a plan of its own, 0.001 to 1000000")
    ] = "unlimited"
    burst: Annotated[
        Burst | None,
        D(description="tokens that may be used at once, 62 or more; null: what the rate gives in a minute"),
    ] = None
    park: Annotated[
        Bytes,
        D(
            description="bytes of a tenant that may wait, 1MiB or more; beyond it RETRY, and agents keep them. 0: no parking"
        ),
    ] = Bytes(1 << 30)
    park_batches: Annotated[
        int,
        D(
            description="batches of a tenant that may wait; each takes 200 bytes of memory",
            ge=0,
            le=_MOST_PARKED,
        ),
    ] = 100_000
    tenants: Annotated[dict[str, TenantPlan], D(description="plans by tenant")] = {}


class Shared(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What several collectors have in common."""

    redis: Annotated[
        str,
        D(
            description="token buckets, and with Kafka what was delivered: redis://HOST:PORT/0, rediss://…, unix://PATH"
        ),
    ] = ""
    cluster: Annotated[bool, D(description="whether that is a Redis Cluster")] = False


class Kafka(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Every record of the local log goes on to Kafka, and an agent is answered when the brokers have it. Without
    `brokers` the local log is all there is."""

    brokers: Annotated[
        list[str], D(description="HOST:PORT of some brokers; the others are found through them")
    ] = []
    topic: Annotated[
        str,
        D(description="where usage goes; TOPIC.parked and TOPIC.rejected are beside it"),
    ] = "usage-metering"
    create_topics: Annotated[bool, D(description="make topics that are missing")] = True
    partitions: Annotated[int, D(description="of topics made here", ge=1, le=10_000)] = 12
    replication: Annotated[
        int | None, D(description="copies of topics made here, 1 to 100; null: the brokers' default")
    ] = None
    retention: Annotated[Seconds, D(description="how long topics made here keep a record")] = Seconds(
        7 * 86_400
    )
    delivery_timeout: Annotated[
        Seconds,
        D(description="1s to 45s: with no delivery report for so long agents are told RETRY (METER-001)"),
    ] = Seconds(15)
    in_flight: Annotated[
        Bytes,
        D(description="8MiB or more: bytes no broker has confirmed yet; beyond it agents are told RETRY"),
    ] = Bytes(32 << 20)
    giants: Annotated[
        dict[str, int],
        D(
            description="tenants too large for one partition, and over how many keys (2 to 1000) their agents are spread"
        ),
    ] = {}
    client: Annotated[
        dict[str, str | int | bool],
        D(description="passed through to librdkafka: security.protocol, sasl.*, ssl.*, compression.type, …"),
    ] = {}


class Handoff(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where batches go from here."""

    kafka: Kafka = Kafka()


class WebhookSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Whom to tell of rejections, conflicts, gaps and quotas, by signed HTTP POST."""

    url: Annotated[str, D(description="https://HOST/PATH, or http:// within the host; empty: nobody")] = ""
    secret_file: Annotated[
        Path | None, D(description="the key of the signature, 16 bytes or more; needed with `url`")
    ] = None
    events: Annotated[
        list[Literal["rejection", "conflict", "gap", "quota"]],
        D(description="what to tell of; empty: of all of these"),
    ] = []
    waiting: Annotated[
        int, D(description="notices that may wait; further ones are counted", ge=1, le=100_000)
    ] = 1_000
    repeat: Annotated[
        Seconds, D(description="a notice of the same reason, agent and tenant comes no sooner again")
    ] = Seconds(60)
    timeout: Annotated[Seconds, D(description="of one attempt")] = Seconds(10)


class Port(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """/metrics, /livez, /readyz."""

    address: Annotated[str, D(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, D(description="0 takes a free one", ge=0, le=65_535)] = 9464


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    state_dir: Annotated[
        Path, D(description="where the log, the CA and the deduplication checkpoint live")
    ] = DEFAULT_STATE_DIR
    listen: Listen = Listen()
    tls: Tls = Tls()
    log: Log = Log()
    connections: Connections = Connections()
    limits: Limits = Limits()
    validation: Validation = Validation()
    admission: AdmissionSettings = AdmissionSettings()
    shared: Shared = Shared()
    handoff: Handoff = Handoff()
    webhook: WebhookSettings = WebhookSettings()
    local_port: Port = Port()
    journal_level: Annotated[
        Literal["debug", "info", "warning", "error"], D(description="lowest level written to the journal")
    ] = "info"

    @property
    def ca_dir(self) -> Path:
        return self.tls.ca_dir or self.state_dir / "ca"

    @property
    def log_directory(self) -> Path:
        return self.log.directory or self.state_dir / "log"

    @property
    def audit_file(self) -> Path:
        return self.state_dir / "audit.log"

    @property
    def control_socket(self) -> Path:
        return self.state_dir / "collector.sock"

    @property
    def external_ca(self) -> bool:
        return self.tls.certificate_file is not None


def read(path: Path | None) -> Settings:
    """Settings of a file and its drop-ins; if none is named, the default one need not be there."""
    required = path is not None
    path = path or DEFAULT_FILE
    settings = load(path, Settings, required)
    tls = settings.tls
    files = (tls.certificate_file, tls.key_file, tls.client_ca_file)
    if any(files) and not (all(files) and tls.trust_domain):
        raise SettingsError(
            f"{path}: tls: an external CA needs certificate_file, key_file, client_ca_file and trust_domain together"
        )
    webhook = settings.webhook
    if webhook.url:
        if not _URL.fullmatch(webhook.url):
            raise SettingsError(f"{path}: webhook.url: https://HOST/PATH, or http://")
        if webhook.secret_file is None:
            raise SettingsError(
                f"{path}: webhook.secret_file: needed with `url`; `openssl rand -hex 32` makes one"
            )
    parks = {"park": settings.admission.park}
    parks |= {
        f"tenants.{n}.park": p.park for n, p in settings.admission.tenants.items() if p.park is not None
    }
    for key, park in parks.items():
        if 0 < park < MAX_BATCH_BYTES:
            raise SettingsError(
                f"{path}: admission.{key}: 0, or at least {MAX_BATCH_BYTES} bytes, so that a batch of any size fits"
            )
    for key, bound in (("keep", settings.log.keep), ("max_size", settings.log.max_size)):
        if bound is not None and not settings.handoff.kafka.brokers:
            raise SettingsError(
                f"{path}: log.{key}: only with handoff.kafka.brokers; without Kafka this log is the only copy until"
                " the ledger has read it"
            )
    trouble = _kafka_trouble(settings.handoff.kafka)
    if trouble:
        raise SettingsError(f"{path}: handoff.kafka.{trouble}")
    trouble = _door_trouble(settings)
    if trouble:
        raise SettingsError(f"{path}: {trouble}")
    for key, address in (
        ("listen.ingest", settings.listen.ingest),
        ("listen.enrolment", settings.listen.enrolment),
    ):
        if address or key == "listen.ingest":
            try:
                split_address(address)
            except CollectorError as error:
                raise SettingsError(f"{path}: {key}: {error}") from None
    return settings


def _door_trouble(settings: Settings) -> str:
    """What bounds on single keys cannot say."""
    connections, limits = settings.connections, settings.limits
    if not 1 <= connections.handshake <= 60:
        return "connections.handshake: 1s to 1m"
    if connections.idle < 1:
        return "connections.idle: 1s or more"
    if connections.age < 10:
        return "connections.age: 10s or more"
    if limits.bytes_per_second < 1 << 20:
        return "limits.bytes_per_second: 1MiB or more; an agent waits 60s for its answers"
    if limits.burst < MAX_MESSAGE_BYTES:
        return "limits.burst: 4MiB or more, so that one message of any size fits"
    if limits.memory is not None and limits.memory < 128 << 20:
        return "limits.memory: 128MiB or more; an idle collector uses half of that"
    return ""


def _kafka_trouble(kafka: Kafka) -> str:
    """What bounds on single keys cannot say."""
    if not 1 <= kafka.delivery_timeout <= 45:
        return "delivery_timeout: 1s to 45s; an agent waits 60s for its answers"
    if kafka.in_flight < 8 << 20:
        return "in_flight: 8MiB or more, so that the largest records fit"
    if kafka.replication is not None and not 1 <= kafka.replication <= 100:
        return "replication: 1 to 100, or null for the brokers' default"
    if not _TOPIC.fullmatch(kafka.topic):
        return "topic: up to 200 letters, digits, dots, dashes and underscores"
    spread = next((name for name, keys in kafka.giants.items() if not 2 <= keys <= 1_000), None)
    if spread is not None:
        return f"giants.{spread}: 2 to 1000 keys"
    return ""


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of HOST:PORT. CollectorError if it is not one."""
    host, colon, port = address.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or int(port) > 65_535:
        raise CollectorError(f"`{address}` is no HOST:PORT such as 0.0.0.0:9460 or [::]:9460")
    return host, int(port)
