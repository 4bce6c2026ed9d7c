"""`check-config --online`: does what the settings name answer, and is it as it must be? Changes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from ledger.config import Server, Settings

TIMEOUT_SECONDS = 5
LOW_DISK_BYTES = 1 << 30


class Finding(NamedTuple):
    verdict: Literal["ok", "weak", "failed"]
    what: str
    text: str


def findings(settings: Settings) -> Iterator[Finding]:
    """One or more for each thing that is configured."""
    yield _directory(settings.state_dir)
    server = settings.store.server
    if server is not None:
        yield _server(server, settings.store.password_file)
    yield from _kafka(settings) if settings.source.kafka.brokers else _log(settings.source.log_directory)


def _directory(directory: Path) -> Finding:
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        return Finding("failed", "state_dir", f"{directory}: no directory that this user may write")
    free = shutil.disk_usage(directory).free
    text = f"{directory}: {free >> 20} MiB free"
    return Finding("ok" if free >= LOW_DISK_BYTES else "weak", "state_dir", text)


def _log(directory: Path) -> Iterator[Finding]:
    try:
        count = sum(1 for name in os.listdir(directory) if name.endswith(".log"))
        yield Finding("ok", "source", f"{directory}: {count} segments")
    except OSError as error:
        fix = "may this user read it, and is it the collector's `log.directory`?"
        yield Finding("failed", "source", f"{directory}: {error.strerror}; {fix}")


def _server(server: Server, password_file: Path | None) -> Finding:
    import clickhouse_connect
    from clickhouse_connect.driver.exceptions import ClickHouseError

    where = f"ClickHouse at {server.host}:{server.port}"
    try:
        password = password_file.read_text(encoding="utf-8").strip() if password_file else ""
        client = clickhouse_connect.get_client(
            host=server.host,
            port=server.port,
            username=server.user,
            password=password,
            secure=server.secure,
            connect_timeout=TIMEOUT_SECONDS,
            send_receive_timeout=TIMEOUT_SECONDS,
        )
        with contextlib.closing(client):
            version = client.command("SELECT version()")
    except (ClickHouseError, OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        fix = "is it up, and are `store.dsn` and `store.password_file` right?"
        return Finding("failed", "store", f"{where}: {said}; {fix}")
    return Finding("ok", "store", f"{where}: version {version}")


def _kafka(settings: Settings) -> Iterator[Finding]:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    kafka = settings.source.kafka
    where = ", ".join(kafka.brokers)
    try:
        client = AdminClient({"log_level": 0, **kafka.client, "bootstrap.servers": ",".join(kafka.brokers)})
        topics = client.list_topics(timeout=TIMEOUT_SECONDS).topics
    except (KafkaException, ValueError, TypeError) as error:
        said = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        fix = "are `source.kafka.brokers` up, and is `source.kafka.client` right?"
        yield Finding("failed", "source", f"{where}: {said}; {fix}")
        return
    for topic in (kafka.topic, f"{kafka.topic}.parked", f"{kafka.topic}.rejected"):
        if topic in topics:
            yield Finding("ok", "source", f"{topic}: {len(topics[topic].partitions)} partitions")
        else:
            yield Finding(
                "failed", "source", f"{topic}: no such topic; collectors make it, see `source.kafka.topic`"
            )
