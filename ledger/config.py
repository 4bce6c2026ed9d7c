"""The ledger's settings. Every key has its default here; an empty file is valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from wire.daemon.settings import Bytes, Seconds, SettingsError, load

DEFAULT_FILE = Path("/etc/weighbridge/ledger.yaml")
DEFAULT_STATE_DIR = Path("/var/lib/weighbridge-ledger")
COLLECTORS_LOG = Path("/var/lib/weighbridge-collector/log")
HTTP_PORT, HTTPS_PORT = 8_123, 8_443
"""ClickHouse's own."""

D = msgspec.Meta

_TOPIC = re.compile("[A-Za-z0-9._-]{1,200}")
_DATABASE = re.compile("[A-Za-z_][A-Za-z0-9_]{0,63}")


class Kafka(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The topics that collectors publish to. With `brokers` the ledger reads them, and no log."""

    brokers: Annotated[
        list[str], D(description="HOST:PORT of some brokers; the others are found through them")
    ] = []
    topic: Annotated[
        str,
        D(description="the collectors' `handoff.kafka.topic`; TOPIC.parked and TOPIC.rejected are beside it"),
    ] = "usage-metering"
    timeout: Annotated[
        Seconds, D(description="a broker that does not answer for so long is given up and asked anew")
    ] = Seconds(15)
    client: Annotated[
        dict[str, str | int | bool],
        D(description="passed through to librdkafka: security.protocol, sasl.*, ssl.*, …"),
    ] = {}


class Source(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where batches come from: the log of a collector on this machine, or Kafka."""

    log_directory: Annotated[
        Path, D(description="the collector's durable log; read while the collector writes it")
    ] = COLLECTORS_LOG
    kafka: Kafka = Kafka()


class Server(NamedTuple):
    """A ClickHouse server as `store.dsn` names it."""

    secure: bool
    host: str
    port: int
    user: str
    database: str


class Store(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where usage is kept: ClickHouse inside this program (chDB, at STATE_DIR/db), or a server."""

    dsn: Annotated[
        str,
        D(description="http://USER@HOST:8123/DATABASE or https://…:8443; empty: inside this program"),
    ] = ""
    password_file: Annotated[
        Path | None, D(description="the server's password for that user, one line; read at the start")
    ] = None
    database: Annotated[str, D(description="made if it is missing; one that `dsn` names counts instead")] = (
        "weighbridge"
    )
    memory: Annotated[
        Bytes,
        D(description="256MiB or more: what ClickHouse inside this program may take; queries beyond it fail"),
    ] = Bytes(1 << 30)

    @property
    def server(self) -> Server | None:
        """What `dsn` says; None: ClickHouse inside this program. ValueError says what is wrong with it."""
        return split_dsn(self.dsn, self.database) if self.dsn else None


class Rollup(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Hours and days, added up from what is booked. Usage that comes later is added to them again."""

    settle: Annotated[
        Seconds, D(description="an hour is added up for the first time so long after its end")
    ] = Seconds(300)
    every: Annotated[Seconds, D(description="1s to 1h: between two looks at what has to be added up")] = (
        Seconds(60)
    )


class Periods(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Billing periods, in UTC. A closed one never changes: usage that comes later is an adjustment in the next."""

    length: Annotated[
        Literal["month", "day"],
        D(description="of a period; only a ledger without closed periods may change it"),
    ] = "month"
    close_after: Annotated[
        Seconds | None,
        D(
            description="a period that is complete is closed so long after its end;"
            " null: only `weighbridge-ledger close` closes one"
        ),
    ] = None


class Port(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """/metrics, /livez, /readyz."""

    address: Annotated[str, D(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, D(description="0 takes a free one", ge=0, le=65_535)] = 9466


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    state_dir: Annotated[Path, D(description="where the ledger keeps what is its own")] = DEFAULT_STATE_DIR
    source: Source = Source()
    store: Store = Store()
    rollup: Rollup = Rollup()
    periods: Periods = Periods()
    local_port: Port = Port()
    journal_level: Annotated[
        Literal["debug", "info", "warning", "error"], D(description="lowest level written to the journal")
    ] = "info"

    @property
    def database_directory(self) -> Path:
        """Of ClickHouse inside this program."""
        return self.state_dir / "db"

    @property
    def lock_file(self) -> Path:
        """Held with flock(2) by whoever has the ledger open."""
        return self.state_dir / "lock"

    @property
    def control_socket(self) -> Path:
        return self.state_dir / "ledger.sock"


def read(path: Path | None) -> Settings:
    """Settings of a file and its drop-ins; if none is named, the default one need not be there."""
    required = path is not None
    path = path or DEFAULT_FILE
    settings = load(path, Settings, required)
    trouble = _trouble(settings)
    if trouble:
        raise SettingsError(f"{path}: {trouble}")
    return settings


def _trouble(settings: Settings) -> str:
    """What bounds on single keys cannot say."""
    store, rollup = settings.store, settings.rollup
    if not _TOPIC.fullmatch(settings.source.kafka.topic):
        return "source.kafka.topic: up to 200 letters, digits, dots, dashes and underscores"
    if not _DATABASE.fullmatch(store.database):
        return "store.database: up to 64 letters, digits and underscores, not beginning with a digit"
    try:
        server = store.server
    except ValueError as error:
        return f"store.dsn: {error}"
    if store.password_file is not None and server is None:
        return "store.password_file: only a server has a password; set `store.dsn`, or take this out"
    if store.memory < 256 << 20:
        return "store.memory: 256MiB or more; ClickHouse takes half of that for itself"
    if not 1 <= rollup.every <= 3_600:
        return "rollup.every: 1s to 1h"
    return ""


def split_dsn(dsn: str, database: str) -> Server:
    """The server that a DSN names; `database` if it names none. ValueError, without the DSN's words: it may hold a
    password."""
    example = "such as http://default@127.0.0.1:8123 or https://weighbridge@clickhouse.example:8443/billing"
    try:
        parts = urlsplit(dsn)
        port = parts.port
    except ValueError:
        raise ValueError(f"no URL; write one {example}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"ClickHouse is spoken to over HTTP; write a URL {example}")
    if not parts.hostname:
        raise ValueError(f"names no host; write one {example}")
    if parts.password is not None:
        raise ValueError(
            "a password does not belong here; put it into a file and name that in `store.password_file`"
        )
    if parts.query or parts.fragment:
        raise ValueError("takes neither ?options nor #fragment; take them out")
    named = parts.path.strip("/")
    if named and not _DATABASE.fullmatch(named):
        raise ValueError("a database has up to 64 letters, digits and underscores, and no digit first")
    secure = parts.scheme == "https"
    return Server(
        secure,
        parts.hostname,
        port or (HTTPS_PORT if secure else HTTP_PORT),
        unquote(parts.username or "default"),
        named or database,
    )
