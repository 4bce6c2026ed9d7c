"""The collector as a process: build the parts, open the doors, keep the checkpoint, end cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from collector import gauges
from collector.admission_answers import AdmissionAnswers
from collector.audit import Audit
from collector.config import Settings, read, split_address
from collector.decide.admission import Admission, View
from collector.decide.dedup import StreamState
from collector.decide.validate import Validator
from collector.door.authenticate import Authenticator
from collector.door.ca import CertificateAuthority
from collector.door.enrolment import EnrolmentService
from collector.door.importing import MAX_REQUEST_BYTES, Importer
from collector.door.service import IngestService
from collector.errors import CollectorError
from collector.exporter import CollectorMetrics, Gauge
from collector.handoff.log import Damage, DamagedLog, DurableLog, Kind, damage_text, scan
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
from wire.daemon.control import ControlSocket
from wire.daemon.files import replace_durably
from wire.daemon.local_port import LocalPort, new_registry
from wire.daemon.settings import SettingsError
from wire.tls import SERVER_OPTIONS, PemPair, server_credentials
from wire.v1.ingest_pb2_grpc import add_EnrolmentServicer_to_server

if TYPE_CHECKING:
    from collector.handoff.kafka.publisher import Publisher
    from collector.state.redis import Settler
    from collector.state.redis_streams import RedisStreams

CHECKPOINT_SECONDS = 5.0
DRAIN_SECONDS = 20.0
STUCK_SECONDS = 60.0
OVERRIDES_FILE = "plans.json"
ENDPOINTS_FILE = "endpoints.json"

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
        self._stop = asyncio.Event()
        self._reload_error = ""
        self._beat = time.monotonic()

    async def run(self) -> None:
        settings = self._settings
        with contextlib.ExitStack() as closing:
            self._checkpoint = Checkpoint(settings.state_dir / CHECKPOINT_FILE)
            closing.callback(self._checkpoint.close)
            self._log = DurableLog(
                settings.log_directory,
                settings.log.segment_size,
                settings.log.min_free,
                synced_end=self._checkpoint.log_end(),
            )
            closing.callback(self._log.close)
            replayed = await asyncio.to_thread(
                load,
                self._streams,
                self._admission,
                self._checkpoint,
                settings.log_directory,
                self._log.end,
            )
            if settings.handoff.kafka.brokers:
                if settings.shared.redis:
                    self._share_streams(closing)
                self._begin_publishing(closing)
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

    def _begin_publishing(self, closing: contextlib.ExitStack) -> None:
        # One machine needs no Kafka, and then does not load its client.
        from collector.handoff.kafka.cursor import CURSOR_FILE, Cursor
        from collector.handoff.kafka.publisher import Publisher
        from collector.handoff.kafka.sharing import Sharing

        settings, loop = self._settings, asyncio.get_running_loop()
        cursor = Cursor(settings.state_dir / CURSOR_FILE, self._log.end)
        closing.callback(cursor.close)

        def news(confirmed: int, trouble: str) -> None:
            loop.call_soon_threadsafe(receipts.update, confirmed, trouble)

        sharing = Sharing(self._shared_streams, self._log.end)
        publisher = Publisher(
            settings.handoff.kafka, settings.log_directory, cursor, self._log.end, news, sharing
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
        trust_domain = authority.trust_domain if authority else settings.tls.trust_domain
        authenticator = Authenticator(trust_domain, authority.registry if authority else None)
        service = IngestService(
            self._pipeline, authenticator, settings.limits.streams, settings.limits.in_flight
        )
        options: list[tuple[str, Any]] = [
            *SERVER_OPTIONS,
            ("grpc.max_allowed_incoming_connections", settings.limits.streams + 64),
        ]
        ingest = grpc.aio.server(options=options, maximum_concurrent_rpcs=settings.limits.streams + 64)
        ingest.add_generic_rpc_handlers((service.handler(),))
        pair, client_ca = _key_material(settings, authority)
        ports = {"ingest": self._listen(ingest, "listen.ingest", settings.listen.ingest, pair, client_ca)}
        servers = [ingest]
        if authority is not None:
            advertised = settings.listen.advertise or [f":{ports['ingest']}"]
            enrolment = EnrolmentService(
                authority, authenticator, advertised, timedelta(seconds=settings.tls.certificate_life)
            )
            add_EnrolmentServicer_to_server(enrolment, ingest)
            if settings.listen.enrolment:
                door = grpc.aio.server(options=options, maximum_concurrent_rpcs=64)
                add_EnrolmentServicer_to_server(enrolment, door)
                ports["enrolment"] = self._listen(
                    door, "listen.enrolment", settings.listen.enrolment, pair, None
                )
                servers.append(door)
        local = self._local_port()
        self._importer = Importer(self._pipeline, authority.registry if authority else None, self._audit)
        control = ControlSocket(settings.control_socket, self._answer, MAX_REQUEST_BYTES)
        try:
            local.start()
            ports["local"] = local.port
            await control.start()
            for server in servers:
                await server.start()
            _write_endpoints(settings.state_dir / ENDPOINTS_FILE, ports)
            self._signals()
            log.info("listening", **ports, streams=len(self._streams), replayed_records=replayed)
            await self._until_stopped(service)
            log.info("stopping")
            service.say_goodbye()
            for server in servers:
                await server.stop(DRAIN_SECONDS)
        finally:
            await control.close()
            local.close()
            for server in servers:
                await server.stop(0)

    def _listen(
        self,
        server: grpc.aio.Server,
        key: str,
        address: str,
        pair: Any,
        client_ca: Any,
    ) -> int:
        split_address(address)
        try:
            port = server.add_secure_port(address, server_credentials(pair, client_ca))
        except RuntimeError:
            port = 0
        if port == 0:
            raise CollectorError(
                f"{address} cannot be opened: it is in use, or not of this host; set `{key}` to another"
            )
        return port

    def _local_port(self) -> LocalPort:
        registry = new_registry()
        registry.register(CollectorMetrics(self._tally, self._gauges, self._queues))
        where = self._settings.local_port
        return LocalPort(where.address, where.port, registry, self._stuck, self._unready)

    def _gauges(self) -> Iterator[Gauge]:
        yield from gauges.of_log(self._log, len(self._streams))
        yield from gauges.of_admission(self._admission, len(self._plans.overrides))
        yield from gauges.of_shared_buckets(self._settler, self._admission)
        yield from gauges.of_shared_streams(self._shared_streams)
        yield from gauges.of_kafka(self._publisher, self._receipts)
        yield from gauges.of_webhook(self._webhook, self._pipeline.notices)
        yield from gauges.of_certificates(self._settings)
        yield "reload_failed", "1 if the last reload kept the old settings.", float(bool(self._reload_error))

    def _queues(self) -> list[View]:
        return self._admission.views(time.monotonic_ns())

    def _stuck(self) -> dict[str, str]:
        """What only a restart can mend."""
        reasons = {}
        silent = time.monotonic() - self._beat
        if silent > STUCK_SECONDS:
            reasons["event_loop"] = f"the event loop has not run for {silent:.0f} s"
        if not self._log.alive:
            reasons["log_thread"] = "the thread that writes the log has ended; see the journal"
        if self._publisher is not None and not self._publisher.alive:
            reasons["kafka_thread"] = "the thread that publishes to Kafka has ended; see the journal"
        if self._shared_streams is not None and not self._shared_streams.alive:
            reasons["shared_streams_thread"] = (
                "the thread that asks Redis about streams has ended; see the journal"
            )
        return reasons

    def _unready(self) -> dict[str, str]:
        reasons = {}
        if self._log.trouble:
            reasons["log_unavailable"] = f"METER-001: {self._log.trouble}"
        if self._settler is not None and self._settler.trouble:
            reasons["shared_buckets_away"] = f"METER-001: {self._settler.trouble}"
        if self._shared_streams is not None and self._shared_streams.trouble:
            reasons["shared_streams_away"] = f"METER-001: {self._shared_streams.trouble}"
        if self._receipts is not None and self._receipts.trouble:
            reasons["kafka_unavailable"] = f"METER-001: {self._receipts.trouble}"
        if self._reload_error:
            reasons["reload_failed"] = self._reload_error
        return reasons

    async def _until_stopped(self, service: IngestService) -> None:
        work: list[Coroutine[Any, Any, object]] = [
            service.watch(),
            self._keep_checkpoint(),
            self._releaser.run(),
            self._stop.wait(),
        ]
        if self._settler is not None:
            work.append(self._settler.run())
        tasks = [asyncio.create_task(one) for one in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _keep_checkpoint(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            self._beat = time.monotonic()
            await self._save()

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
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    def reload(self) -> None:
        """Take up what can change while running; a file that cannot be read changes nothing."""
        try:
            fresh = read(self._file)
        except SettingsError as error:
            self._reload_error = str(error)
            log.error("reload_failed", error=str(error))
            return
        self._reload_error = ""
        old, self._settings = self._settings, fresh
        self._pipeline.validator.bounds = fresh.validation.bounds()
        self._plans.settings = fresh.admission
        self._admission.reconsider(time.monotonic_ns())
        journal.configure(fresh.journal_level)
        restart = [
            name
            for name in (
                "state_dir",
                "listen",
                "tls",
                "log",
                "limits",
                "shared",
                "handoff",
                "webhook",
                "local_port",
            )
            if getattr(old, name) != getattr(fresh, name)
        ]
        log.info("reloaded", needs_restart=restart)

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
        if command != "status":
            return {"error": f"commands: status, {', '.join((*known, *brought))}"}
        tally = self._tally
        return {
            "ready": self._unready(),
            "open_streams": tally.open_streams,
            "streams": len(self._streams),
            "agents": len(self._streams.agents()),
            "answers": dict(tally.answers),
            "refusals": {f"{code} {reason}": n for (code, reason), n in tally.refusals.items()},
            "log_end_bytes": self._log.end,
            "tenants": {
                tenant: {"batches": t.batches, "rows": t.rows, "cpu_usage_ns": t.cpu_usage_ns}
                for tenant, t in sorted(tally.tenants.items())
            },
        }


def load(
    streams: Streams, admission: Admission, checkpoint: Checkpoint, directory: Path, log_end: int
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
            known.mark(record.seq, digest)
    admission.restored(now_ns)
    return count


def _key_material(settings: Settings, authority: CertificateAuthority | None) -> tuple[Any, Any]:
    """(current key and chain, current client CA), both asked at each handshake."""
    tls = settings.tls
    if authority is not None:
        return authority.server_pair, lambda: authority.ca_pem
    certificate, key, client_ca = tls.certificate_file, tls.key_file, tls.client_ca_file
    assert certificate is not None
    assert key is not None
    assert client_ca is not None

    def read_file(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise CollectorError(f"{path}: {error.strerror}; make it readable for this user") from error

    def pair() -> PemPair:
        return read_file(key), read_file(certificate)

    return pair, lambda: read_file(client_ca)


def _write_endpoints(path: Path, ports: dict[str, int]) -> None:
    found = {**ports, "pid": os.getpid(), "since": int(time.time())}
    replace_durably(path, json.dumps(found).encode() + b"\n", 0o644)
