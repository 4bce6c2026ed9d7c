"""The collector as a process: build the parts, open the doors, keep the checkpoint, end cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector import gauges
from collector.admission_answers import AdmissionAnswers
from collector.audit import Audit
from collector.config import Settings, read
from collector.decide.admission import Admission, View
from collector.decide.dedup import StreamState
from collector.decide.validate import Validator
from collector.door.ca import CertificateAuthority
from collector.door.importing import MAX_REQUEST_BYTES, Importer
from collector.door.listeners import Listeners
from collector.door.pressure import Pressure, available_bytes
from collector.errors import CollectorError
from collector.exporter import CollectorMetrics, Gauge
from collector.handoff.log import Damage, DamagedLog, DurableLog, Keep, Kind, Recent, damage_text, scan
from collector.handoff.park import Releaser, restore
from collector.handoff.receipts import Receipts
from collector.notices import EVENTS, Notices
from collector.pipeline import Pipeline
from collector.plans import Plans, load_overrides
from collector.state.memory import Streams
from collector.state.sqlite import CHECKPOINT_FILE, Checkpoint
from collector.tally import Tally
from collector.webhook import WebhookSender
from wire.daemon import journal
from wire.daemon.control_socket import ControlSocket
from wire.daemon.disk import wait_for_disk
from wire.daemon.files import replace_durably
from wire.daemon.local_port import LocalPort, new_registry
from wire.daemon.reload import Reload
from wire.daemon.settings import SettingsError
from wire.daemon.systemd import Supervision

if TYPE_CHECKING:
    from collector.handoff.kafka.publisher import Publisher
    from collector.state.redis import Settler
    from collector.state.redis_streams import RedisStreams

BEAT_SECONDS = 5.0
CHECKPOINT_SECONDS = 5.0
PRUNE_SECONDS = 5.0
STUCK_SECONDS = 60.0
LOG_STUCK_SECONDS = 120.0
"""A disk that is slow, or fails over, may need some time for one write; a restart would not make it faster."""
READING_LOG = "reading the log"
OVERRIDES_FILE = "plans.json"
ENDPOINTS_FILE = "endpoints.json"

RESTART_KEYS = ("state_dir", "tls", "log", "connections", "shared", "handoff", "webhook", "local_port")

log = journal.Journal("collector.server")


class Server:
    """One running collector. `run` returns when it was told to stop."""

    def __init__(self, settings: Settings, settings_file: Path | None) -> None:
        self._settings = settings
        self._file = settings_file
        self._tally = Tally()
        self._streams = Streams()
        self._plans = Plans(settings.admission, load_overrides(settings.state_dir / OVERRIDES_FILE))
        self._admission = Admission(self._plans.of, shared=bool(settings.shared.redis))
        self._audit = Audit(settings.audit_file, {"program": "weighbridge-collector run"})
        self._answers = AdmissionAnswers(
            self._admission, self._plans, settings.state_dir / OVERRIDES_FILE, self._audit
        )
        self._settler: Settler | None = None
        self._shared_streams: RedisStreams | None = None
        self._publisher: Publisher | None = None
        self._receipts: Receipts | None = None
        self._webhook: WebhookSender | None = None
        self._pressure = Pressure(memory_bound(settings))
        self._stop = asyncio.Event()
        self._asked_to_reload = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._beat = time.monotonic()
        self._starting = READING_LOG
        """What a start is at; empty when it is done."""
        self._supervision = Supervision(self._stuck, self._headline)
        self._reload = Reload(settings, RESTART_KEYS, self._supervision.report)

    async def run(self) -> None:
        settings = self._settings
        with contextlib.ExitStack() as closing:
            for keeping in (self._keep_beat(), self._supervision.run()):
                closing.callback(asyncio.create_task(keeping).cancel)
            await wait_for_disk(
                (settings.state_dir, settings.log_directory), self._await_disk, "log", CollectorError
            )
            self._starting = READING_LOG
            self._checkpoint = Checkpoint(settings.state_dir / CHECKPOINT_FILE)
            closing.callback(self._checkpoint.close)
            kafka = settings.handoff.kafka
            recent = Recent(kafka.in_flight) if kafka.brokers else None
            self._log = DurableLog(
                settings.log_directory,
                settings.log.segment_size,
                settings.log.min_free,
                synced_end=self._checkpoint.log_end(),
                recent=recent,
            )
            closing.callback(self._log.close)
            replayed = await asyncio.to_thread(
                load,
                self._streams,
                self._admission,
                self._checkpoint,
                settings.log_directory,
                self._log.begin,
                self._log.end,
            )
            if recent is not None:
                if settings.shared.redis:
                    self._share_streams(closing)
                self._begin_publishing(closing, recent)
            self._pipeline = Pipeline(
                self._streams,
                self._log,
                self._admission,
                Validator(settings.validation.bounds()),
                self._tally,
                settings.limits.queued,
                self._receipts,
                self._shared_streams,
            )
            self._notify(closing)
            self._releaser = Releaser(self._admission, self._log, self._tally, self._pipeline.covers)
            if settings.shared.redis:
                # One machine needs no Redis, and then does not load its client.
                from collector.state.redis import RedisBuckets, Settler

                buckets = RedisBuckets(settings.shared.redis, settings.shared.cluster)
                self._settler = Settler(self._admission, buckets)
            await self._serve(replayed)
            await self._save()

    def _share_streams(self, closing: contextlib.ExitStack) -> None:
        from collector.decide.claims import lease_ms
        from collector.state.owner import OWNER_FILE, owner_of
        from collector.state.redis_streams import RedisStreams

        shared, kafka = self._settings.shared, self._settings.handoff.kafka
        streams = RedisStreams(
            shared.redis,
            shared.cluster,
            kafka.topic,
            owner_of(self._settings.state_dir / OWNER_FILE),
            lease_ms(kafka.delivery_timeout),
        )
        closing.callback(streams.close)
        self._shared_streams = streams

    def _begin_publishing(self, closing: contextlib.ExitStack, recent: Recent) -> None:
        # One machine needs no Kafka, and then does not load its client.
        from collector.handoff.kafka.cursor import CURSOR_FILE, Cursor
        from collector.handoff.kafka.publisher import Publisher
        from collector.handoff.kafka.sharing import Sharing

        settings, loop = self._settings, asyncio.get_running_loop()
        cursor = Cursor(settings.state_dir / CURSOR_FILE, self._log.begin, self._log.end)
        closing.callback(cursor.close)

        def news(confirmed: int, trouble: str) -> None:
            loop.call_soon_threadsafe(receipts.update, confirmed, trouble)

        sharing = Sharing(self._shared_streams, self._log.end)
        publisher = Publisher(
            settings.handoff.kafka, settings.log_directory, recent, cursor, self._log.end, news, sharing
        )
        closing.callback(publisher.close)
        receipts = Receipts(cursor.offset, self._log.end, settings.handoff.kafka.in_flight, publisher.durable)
        self._publisher, self._receipts = publisher, receipts

    def _notify(self, closing: contextlib.ExitStack) -> None:
        """Tell the webhook, if there is one."""
        settings = self._settings.webhook
        if settings.url:
            self._pipeline.notices = Notices(settings.events or EVENTS, settings.waiting, settings.repeat.ns)
            self._webhook = WebhookSender(settings, self._pipeline.notices)
            self._webhook.start()
            closing.callback(self._webhook.close)

    async def _serve(self, replayed: int) -> None:
        settings = self._settings
        authority = None if settings.external_ca else CertificateAuthority(settings.ca_dir, self._audit)
        self._listeners = Listeners(settings, self._pipeline, authority, self._pressure)
        local = self._local_port()
        self._importer = Importer(self._pipeline, authority.registry if authority else None, self._audit)
        control = ControlSocket(settings.control_socket, self._answer, MAX_REQUEST_BYTES)
        try:
            local.start()
            self._local = local.port
            await control.start()
            await self._listeners.open()
            ports = self._write_endpoints()
            self._signals()
            log.info("listening", **ports, streams=len(self._streams), replayed_records=replayed)
            self._starting = ""
            self._supervision.ready()
            await self._until_stopped()
            log.info("stopping")
            self._supervision.stopping()
            await self._listeners.close()
        finally:
            await control.close()
            local.close()
            await self._listeners.close(0)

    def _write_endpoints(self) -> dict[str, int]:
        ports = {**self._listeners.ports, "local": self._local}
        found = {**ports, "pid": os.getpid(), "since": int(time.time())}
        replace_durably(self._settings.state_dir / ENDPOINTS_FILE, json.dumps(found).encode() + b"\n", 0o644)
        return ports

    def _local_port(self) -> LocalPort:
        registry = new_registry()
        registry.register(CollectorMetrics(self._tally, self._gauges, self._queues))
        where = self._settings.local_port
        return LocalPort(where.address, where.port, registry, self._stuck, self._unready)

    def _gauges(self) -> Iterator[Gauge]:
        yield from gauges.of_memory(self._pressure)
        yield from gauges.of_log(self._log, len(self._streams))
        yield from gauges.of_admission(self._admission, len(self._plans.overrides))
        yield from gauges.of_shared_buckets(self._settler, self._admission)
        yield from gauges.of_shared_streams(self._shared_streams)
        yield from gauges.of_kafka(self._publisher, self._receipts)
        yield from gauges.of_webhook(self._webhook, self._pipeline.notices)
        yield from gauges.of_certificates(self._settings)
        yield "reload_failed", "1 if the last reload kept the old settings.", float(bool(self._reload.error))

    def _queues(self) -> list[View]:
        return self._admission.views(time.monotonic_ns())

    def _stuck(self) -> dict[str, str]:
        """What only a restart can mend."""
        reasons = {}
        silent = time.monotonic() - self._beat
        if silent > STUCK_SECONDS:
            reasons["event_loop"] = f"the event loop has not run for {silent:.0f} s"
        if self._starting:
            return reasons
        if not self._log.alive:
            reasons["log_thread"] = "the thread that writes the log has ended; see the journal"
        elif self._log.busy_seconds > LOG_STUCK_SECONDS:
            reasons["log_thread"] = f"a write to the log has not come back for {self._log.busy_seconds:.0f} s"
        if self._publisher is not None and not self._publisher.alive:
            reasons["kafka_thread"] = "the thread that publishes to Kafka has ended; see the journal"
        if self._shared_streams is not None and not self._shared_streams.alive:
            reasons["shared_streams_thread"] = (
                "the thread that asks Redis about streams has ended; see the journal"
            )
        return reasons

    def _unready(self) -> dict[str, str]:
        reasons = {}
        if refusal := self._log.refusal:
            reasons["log_unavailable"] = f"METER-001: {refusal}"
        if self._settler is not None and self._settler.trouble:
            reasons["shared_buckets_away"] = f"METER-001: {self._settler.trouble}"
        if self._shared_streams is not None and self._shared_streams.trouble:
            reasons["shared_streams_away"] = f"METER-001: {self._shared_streams.trouble}"
        if self._receipts is not None and self._receipts.trouble:
            reasons["kafka_unavailable"] = f"METER-001: {self._receipts.trouble}"
        if self._pressure.high:
            reasons["memory_short"] = self._pressure.trouble
        if self._reload.error:
            reasons["reload_failed"] = self._reload.error
        return reasons

    def _headline(self) -> str:
        """For `systemctl status`."""
        if self._starting:
            return self._starting
        reasons = self._unready()
        if reasons:
            return "; ".join(reasons.values())
        return f"{self._tally.open_streams} agents connected, {len(self._streams)} streams known"

    def _await_disk(self, trouble: str) -> None:
        """`systemctl start` has nothing to wait for; agents keep what they have."""
        self._starting = f"METER-001: {trouble}"
        self._supervision.ready()

    async def _until_stopped(self) -> None:
        work: list[Coroutine[Any, Any, object]] = [
            self._listeners.watch(),
            self._listeners.end_noise(),
            self._pressure.watch(),
            self._reload_when_asked(),
            self._keep_checkpoint(),
            self._releaser.run(),
            self._stop.wait(),
        ]
        if self._settler is not None:
            work.append(self._settler.run())
        if self._receipts is not None:
            work.append(self._prune(self._receipts))
        tasks = [asyncio.create_task(one) for one in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _keep_beat(self) -> None:
        """Shows that the event loop runs."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)

    async def _keep_checkpoint(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            await self._save()

    async def _prune(self, receipts: Receipts) -> None:
        """Delete of the log what nobody needs: the brokers have it, and the checkpoint tells what it told."""
        bounds = self._settings.log
        keep = Keep(None if bounds.keep is None else bounds.keep.ns, bounds.max_size)

        def needed_from() -> int:
            return min(receipts.confirmed, self._checkpoint.needed_from())

        while True:
            try:
                await asyncio.to_thread(self._log.prune, keep, needed_from)
            except (OSError, sqlite3.Error) as error:
                log.warning("log_not_pruned", error=error)
            await asyncio.sleep(PRUNE_SECONDS)

    async def _save(self) -> None:
        """Offset, streams and queues in one turn of the loop: what is saved is never ahead of the log."""
        covered = self._pipeline.covered
        dirty = [
            (key, StreamState(s.watermark, s.last_digest, s.ring, dict(s.ahead)))
            for key, s in self._streams.take_dirty()
        ]
        now_unix_ns = time.time_ns()
        changes = self._admission.changes(time.monotonic_ns(), now_unix_ns)
        try:
            await asyncio.to_thread(self._checkpoint.save, covered, dirty, changes, now_unix_ns)
        except Exception as error:  # noqa: BLE001 - only an optimisation: the log is read instead
            log.warning("checkpoint_failed", error=error)
            self._admission.not_saved(changes)
            for key, _ in dirty:
                state = self._streams.get(*key)
                if state is not None:
                    state.dirty = True

    def _signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_reload.set)

    async def _reload_when_asked(self) -> None:
        """Being asked again meanwhile means once more."""
        while True:
            await self._asked_to_reload.wait()
            self._asked_to_reload.clear()
            await self.reload()

    async def reload(self) -> dict[str, Any]:
        """Take up what can change while running. A file that cannot be read, or an address that cannot be opened,
        changes nothing. One at a time, whoever asks.
        """
        async with self._reloading:
            return await self._take_up()

    async def _take_up(self) -> dict[str, Any]:
        try:
            fresh = read(self._file)
            await self._listeners.replace(fresh)
        except (SettingsError, CollectorError) as error:
            return self._reload.failed(error)
        old, self._settings = self._settings, fresh
        if old.listen != fresh.listen:
            try:
                self._write_endpoints()
            except OSError as error:
                log.warning("endpoints_not_written", error=error)
        self._pipeline.validator.bounds = fresh.validation.bounds()
        self._pipeline.max_queued_bytes = fresh.limits.queued
        self._pressure.bound_bytes = memory_bound(fresh)
        self._plans.settings = fresh.admission
        self._admission.reconsider(time.monotonic_ns())
        journal.configure(fresh.journal_level)
        return self._reload.done(fresh)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        command = request.get("command")
        known, brought = self._answers.commands, self._importer.commands
        try:
            if command in known:
                return known[command](request)
            if command in brought:
                return await brought[command](request)
        except CollectorError as error:
            return {"error": str(error)}
        if command == "reload":
            return await self.reload()
        if command != "status":
            return {"error": f"commands: status, reload, {', '.join((*known, *brought))}"}
        tally = self._tally
        return {
            "ready": self._unready(),
            "open_streams": tally.open_streams,
            "streams": len(self._streams),
            "agents": len(self._streams.agents()),
            "answers": dict(tally.answers),
            "refusals": {f"{code} {reason}": n for (code, reason), n in tally.refusals.items()},
            "log_begin_bytes": self._log.begin,
            "log_end_bytes": self._log.end,
            "tenants": {
                tenant: {"batches": t.batches, "rows": t.rows, "cpu_usage_ns": t.cpu_usage_ns}
                for tenant, t in sorted(tally.tenants.items())
            },
        }


def memory_bound(settings: Settings) -> int:
    """Resident memory above which agents are told RETRY."""
    bound = settings.limits.memory
    return available_bytes() * 3 // 4 if bound is None else bound


def load(
    streams: Streams,
    admission: Admission,
    checkpoint: Checkpoint,
    directory: Path,
    log_begin: int,
    log_end: int,
) -> int:
    """Fill `streams` and `admission` from the checkpoint and the log behind it. Returns how many records were read."""
    covered, saved = checkpoint.load()
    now_ns, now_unix_ns = time.monotonic_ns(), time.time_ns()
    if covered > log_end:
        # The log is shorter than what the checkpoint has seen: it was replaced. The log is the truth.
        log.warning("checkpoint_ahead_of_log", covered=covered, log_end=log_end)
        checkpoint.clear()
        covered = 0
    else:
        if covered < log_begin:
            # It was lost, or restored from a backup: what lies between is learned from the agents.
            log.warning("checkpoint_behind_log", covered=covered, log_begin=log_begin)
        checkpoint.begins(log_begin)
        for (agent_id, epoch), state in saved:
            streams.put(agent_id, epoch, state)
        for bucket in checkpoint.buckets():
            # A clock that was set back meanwhile gives nothing, and takes nothing.
            away_ns = max(0, now_unix_ns - bucket.at_unix_ns)
            admission.restore_bucket(bucket.tenant, bucket.balance, bucket.remainder, now_ns - away_ns)
        for tenant, batch in checkpoint.parked():
            admission.restore_parked(tenant, batch, True, now_ns)
    count = 0
    for record in scan(directory, covered, log_end):
        if isinstance(record, Damage):
            raise DamagedLog(damage_text(directory / record.segment, record.offset))
        count += 1
        if record.kind in (Kind.PARKED, Kind.RELEASED):
            restore(admission, record, now_ns)
        if record.kind in (Kind.REFUSED, Kind.RELEASED):
            continue
        known = streams.get(record.agent_id, record.epoch)
        if known is None:
            known = StreamState()
            streams.put(record.agent_id, record.epoch, known)
        if record.kind is Kind.ADOPTED:
            known.adopt(record.seq)
        else:
            digest = record.note if record.kind is Kind.ELSEWHERE else record.digest
            known.recall(record.seq, digest)
    admission.restored(now_ns)
    return count
