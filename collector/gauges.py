"""What the collector measures at the moment of a scrape, part by part: (name, help, value)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from collector.config import Settings
from collector.decide.admission import Admission
from collector.decide.bucket import MICRO
from collector.door.expiry import expiries
from collector.door.pressure import Pressure
from collector.exporter import Gauge
from collector.handoff.log import DurableLog
from collector.handoff.receipts import Receipts
from collector.notices import Notices
from collector.webhook import WebhookSender

if TYPE_CHECKING:
    # Loaded only where they are used.
    from collector.handoff.kafka.publisher import Publisher
    from collector.state.redis import Settler
    from collector.state.redis_streams import RedisStreams


def of_memory(pressure: Pressure) -> Iterator[Gauge]:
    yield "memory_used_bytes", "Resident memory, as it was looked at last.", pressure.used_bytes
    bound = "Resident memory above which agents are told RETRY."
    yield "memory_bound_bytes", bound, pressure.bound_bytes
    yield "memory_short", "1 while that is exceeded.", float(pressure.high)


def of_log(log: DurableLog, streams: int) -> Iterator[Gauge]:
    yield "streams", "Streams known: one per agent and epoch.", streams
    begin = "Where the durable log begins, in bytes since its beginning: what was before has been pruned."
    yield "log_begin_bytes", begin, log.begin
    yield "log_end_bytes", "Length of the durable log since its beginning.", log.end
    with contextlib.suppress(OSError):
        yield "log_free_bytes", "Bytes left on its disk before appends are refused.", log.free_bytes
    yield "log_queued_bytes", "Bytes that wait for the disk.", log.queued_bytes
    yield "log_torn_bytes", "Bytes of an unfinished group cut off at this start.", log.torn_bytes


def of_admission(admission: Admission, overrides: int) -> Iterator[Gauge]:
    yield "tenants", "Tenants whose token bucket is remembered.", len(admission)
    forgotten = "Token buckets forgotten before they were full, since the start."
    yield "forgotten_tenants", forgotten, admission.forgotten
    yield "plan_overrides", "Tenants whose plan an operator has overridden.", overrides


def of_shared_buckets(settler: Settler | None, admission: Admission) -> Iterator[Gauge]:
    away = "1 while Redis does not answer and this collector judges alone."
    yield "shared_buckets_away", away, float(settler is not None and bool(settler.trouble))
    settlements = "Settlements with the other collectors since the start."
    yield "shared_settlements", settlements, settler.settlements if settler else 0
    failures = "Settlements that Redis did not answer, since the start."
    yield "shared_failures", failures, settler.failures if settler else 0
    unsettled = "Tokens charged here that no other collector knows of yet."
    yield "unsettled_tokens", unsettled, admission.unsettled_weight() / MICRO


def of_shared_streams(streams: RedisStreams | None) -> Iterator[Gauge]:
    away = "1 while Redis does not answer and batches are taken in unverified."
    yield "shared_streams_away", away, float(streams is not None and bool(streams.trouble))
    owed = "Batches delivered here that no other collector knows of, because Redis is away."
    yield "shared_owed_marks", owed, streams.owed if streams else 0
    not_kept = "Batches delivered here that no other collector will know of, since the start."
    yield "shared_lost_marks", not_kept, streams.not_kept if streams else 0


def of_kafka(publisher: Publisher | None, receipts: Receipts | None) -> Iterator[Gauge]:
    away = "1 while no broker confirms anything and agents are told RETRY."
    yield "kafka_away", away, float(receipts is not None and bool(receipts.trouble))
    unconfirmed = "Bytes of the log that the brokers have not confirmed."
    yield "kafka_unconfirmed_bytes", unconfirmed, receipts.log_end - receipts.confirmed if receipts else 0
    published = "Batches that the brokers have confirmed, since the start."
    yield "kafka_published_batches", published, publisher.published if publisher else 0
    unverified = "Batches published with the header dedup=unverified, since the start."
    yield "kafka_unverified_batches", unverified, publisher.unverified if publisher else 0
    skipped = "Batches of the log that were in the topics already, and not published again, since the start."
    yield "kafka_skipped_batches", skipped, publisher.sharing.skipped if publisher else 0
    broken = "Times that publishing broke off and began again at the cursor, since the start."
    yield "kafka_broken_sessions", broken, publisher.sessions_broken if publisher else 0


def of_webhook(sender: WebhookSender | None, notices: Notices) -> Iterator[Gauge]:
    yield "webhook_waiting_notices", "Notices that the webhook has not been told yet.", len(notices)
    delivered = sender.delivered if sender else 0
    yield "webhook_delivered_notices", "Notices taken, since the start.", delivered
    lost = "Notices that found no room or will never be taken, since the start."
    yield "webhook_lost_notices", lost, notices.not_fitted + (sender.given_up if sender else 0)
    failures = "Attempts to tell the webhook that failed, since the start."
    yield "webhook_failures", failures, sender.failures if sender else 0


def of_certificates(settings: Settings) -> Iterator[Gauge]:
    """Without a series for what cannot be read."""
    for name, until in expiries(settings):
        text = f"Unix time at which the certificate of the {name} ends."
        yield f"{name}_certificate_expiry_timestamp_seconds", text, until.timestamp()
