"""`check-config --online`: does what the settings name answer, and is it as it must be? Changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from collector.config import Settings
from collector.door.expiry import certificate_files, ends
from collector.errors import CollectorError

EXPIRES_SOON_DAYS = 14


class Finding(NamedTuple):
    verdict: Literal["ok", "weak", "failed"]
    what: str
    text: str


def findings(settings: Settings) -> Iterator[Finding]:
    """One or more for each thing that is configured."""
    yield from _certificate(settings)
    if settings.shared.redis:
        yield _redis(settings)
    if settings.handoff.kafka.brokers:
        yield from _kafka(settings)


def _certificate(settings: Settings) -> Iterator[Finding]:
    try:
        until = ends(certificate_files(settings)["server"])
    except CollectorError as error:
        yield Finding("failed", "certificate", str(error))
        return
    left = until - datetime.now(UTC)
    verdict: Literal["ok", "weak", "failed"] = "ok" if left.days >= EXPIRES_SOON_DAYS else "weak"
    renew = "" if verdict == "ok" else "; renew it: `weighbridge-collector ca issue --server`"
    yield Finding(
        verdict if left.total_seconds() > 0 else "failed", "certificate", f"good until {until:%F}{renew}"
    )


def _redis(settings: Settings) -> Finding:
    from collector.state.redis import RedisBuckets, SharedAway

    async def ask() -> None:
        buckets = RedisBuckets(settings.shared.redis, settings.shared.cluster)
        try:
            await buckets.ask()
        finally:
            await buckets.close()

    try:
        asyncio.run(ask())
    except (SharedAway, CollectorError) as error:
        return Finding("failed", "redis", f"{error}; is `shared.redis` right, and is it up?")
    return Finding("ok", "redis", "answers")


def _kafka(settings: Settings) -> Iterator[Finding]:
    from collector.handoff.kafka.client import Client
    from collector.handoff.kafka.topics import TopicCheck

    kafka = settings.handoff.kafka
    try:
        with contextlib.closing(Client(kafka)) as client:
            found = TopicCheck(client, kafka).findings(make=False)
    except CollectorError as error:
        yield Finding("failed", "kafka", str(error))
        return
    for finding in found:
        yield Finding("failed" if finding.stops else "weak", "kafka", finding.text)
    if not any(finding.stops for finding in found):
        yield Finding(
            "ok", "kafka", f"the brokers answer; {kafka.topic} and its two others are or can be made"
        )
