"""The agent as a process: take the state up, run cadence, shipper and renewal side by side, end cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from agent import __version__, report
from agent.config import Settings, read
from agent.errors import AgentError
from agent.exporter import AgentMetrics
from agent.loop import MeterLoop
from agent.meter.catalogue import Catalogue
from agent.meter.labels import LabelCache, sources
from agent.meter.owners import Owners
from agent.read import plan
from agent.ship.backoff import Backoff
from agent.ship.enrol import EnrolError, Identity, renew
from agent.ship.shipper import Shipper
from agent.ship.spool import BatchKey, Spool
from agent.ship.spool_file import SpoolError, SpoolUnavailable
from agent.tally import Tally
from wire.daemon import journal
from wire.daemon.control_socket import ControlSocket
from wire.daemon.local_port import LocalPort, new_registry
from wire.daemon.reload import Reload
from wire.daemon.settings import SettingsError
from wire.daemon.systemd import Supervision
from wire.statuses import Meter
from wire.tls import CHANNEL_OPTIONS

T = TypeVar("T")

DRAIN_SECONDS = 5.0
NEWBORN_EVERY_SECONDS = 1.0
METERING_THREAD = "wb-metering"
RENEW_TIMEOUT_SECONDS = 20.0
STUCK_AFTER_INTERVALS = 3
STUCK_AFTER_SECONDS = 60.0
SHIPPER_STUCK_SECONDS = 180.0
"""Twice the longest of its waits: a pause after failures, then the way to a collector."""
START_BASE_SECONDS, START_CAP_SECONDS = 1.0, 30.0
"""Pauses between two attempts to start while the spool's disk refuses."""
READ_ONLY_PATIENCE_SECONDS = 60.0
"""A service sees the mounts of its start: one that was read-only then stays so for it, whoever mounts it anew."""

RESTART_KEYS = ("state_dir", "run_dir", "read", "spool", "ship", "local_port")

log = journal.Journal("agent.daemon")


class Daemon:
    """One running agent. `run` returns when it was told to stop."""

    def __init__(self, settings: Settings, settings_file: Path | None) -> None:
        self._settings = settings
        self._file = settings_file
        self._identity = Identity.load(settings.state_dir)
        self._worker = ThreadPoolExecutor(1, "metering", _name_thread)
        self._stop = asyncio.Event()
        self._started = time.time()
        self._metering_since: float | None = None
        """Monotonic; None while the spool's disk keeps metering from beginning."""
        self._supervision = Supervision(self._stuck, self._headline)
        self._reload = Reload(settings, RESTART_KEYS, self._supervision.report)

    async def run(self) -> None:
        settings = self._settings
        async with contextlib.AsyncExitStack() as closing:
            closing.callback(self._worker.shutdown)
            self._spool = Spool(settings.state_dir, self._identity.agent_id, settings.spool.max_bytes)
            closing.callback(self._spool.close)
            with contextlib.suppress(SpoolUnavailable):
                # Before the sockets are taken, whose names belong to whoever holds the spool. A disk that
                # refuses is told of in `_begin`, which tries again.
                await self._metering(lambda: self._spool.take_up(time.time_ns()))
            self._loop = await self._metering(
                lambda: MeterLoop(settings, self._spool, _catalogue(settings), Tally())
            )
            closing.callback(self._loop.close)
            self._shipper = Shipper(
                self._spool,
                self._connect,
                settings.ship.collectors or self._identity.collectors,
                self._open_epoch,
                f"weighbridge-agent/{__version__}",
            )
            registry = new_registry()
            self._metrics = AgentMetrics(
                self._loop, self._spool, self._shipper, lambda: self._identity, self._reload, settings.metrics
            )
            registry.register(self._metrics)
            where = settings.local_port
            self._local = LocalPort(where.address, where.port, registry, self._stuck, self._unready)
            self._local.start()
            closing.callback(self._local.close)
            control = ControlSocket(settings.control_socket, self._answer)
            await control.start()
            closing.push_async_callback(control.close)
            self._signals()
            reporting = asyncio.create_task(self._supervision.run())
            closing.callback(reporting.cancel)
            if not await self._begin():
                return
            log.info(
                "started",
                version=__version__,
                agent_id=self._identity.agent_id,
                epoch=self._spool.epoch,
                spool=self._spool.opened.value,
                sources=self._loop.plan.signature,
                unseen=plan.unseen(self._loop.facts, self._loop.plan, self._loop.probes.without),
                local_port=self._local.port,
                seconds=round(time.time() - self._started, 3),
            )
            await self._until_stopped()

    async def _begin(self) -> bool:
        """Start to meter as soon as the spool's disk allows it; False if told to stop before that."""
        backoff = Backoff(START_BASE_SECONDS, START_CAP_SECONDS, random.Random())  # noqa: S311 - spreads load
        begun = time.monotonic()
        while not await self._metering(self._loop.start):
            self._supervision.ready()
            read_only = os.statvfs(self._settings.state_dir).f_flag & os.ST_RDONLY
            if read_only and time.monotonic() - begun > READ_ONLY_PATIENCE_SECONDS:
                raise AgentError("; ".join(self._loop.state.trouble.values()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), backoff.next_seconds())
                return False
        self._metering_since = time.monotonic()
        self._supervision.ready()
        return True

    async def _until_stopped(self) -> None:
        shipping = asyncio.create_task(self._shipper.run())
        others = [
            asyncio.create_task(work)
            for work in (self._cadence(), self._renewal(), self._newborn(), self._stop.wait())
        ]
        try:
            done, _ = await asyncio.wait({shipping, *others}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            log.info("stopping")
            self._supervision.stopping()
            others[0].cancel()
            # The last reading: from here to the next start the kernel goes on counting by itself.
            await self._metering(self._loop.tick)
            self._shipper.notify()
            drained = await self._shipper.drain(DRAIN_SECONDS)
            log.info("stopped", spool_empty=drained)
        finally:
            for task in (shipping, *others):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _cadence(self) -> None:
        """Ticks at the boundaries of wall clock, memory samples between them."""
        while True:
            now = time.time()
            to_tick = self._loop.due_in_seconds(now)
            every = self._settings.meter.memory_sample
            to_sample = every - now % every
            if to_sample < to_tick - 0.05:
                await asyncio.sleep(to_sample)
                await self._metering(self._loop.sample)
                continue
            await asyncio.sleep(to_tick)
            if await self._metering(self._loop.tick):
                self._shipper.notify()

    async def _newborn(self) -> None:
        while True:
            await asyncio.sleep(NEWBORN_EVERY_SECONDS)
            await self._metering(self._loop.meet_newborn)

    async def _renewal(self) -> None:
        """A new certificate at half life; the old one serves until then."""
        while True:
            identity = self._identity
            await asyncio.sleep(min(60.0, max(1.0, (identity.not_after - time.time()) / 20)))
            if not identity.renewal_due(time.time()):
                continue
            address = self._shipper.state.collector or identity.collectors[0]
            async with self._connect(address) as channel:
                try:
                    self._identity = await renew(
                        identity, channel, self._settings.state_dir, RENEW_TIMEOUT_SECONDS
                    )
                except EnrolError as error:
                    log.warning("renewal_failed", code=Meter.NOT_AUTHORISED, error=str(error))
                    continue
            log.info("certificate_renewed", not_after=self._identity.not_after)
            self._shipper.reconnect()

    def _connect(self, address: str) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, self._identity.credentials(), CHANNEL_OPTIONS)

    async def _open_epoch(self, at_least: int, aside_from: BatchKey | None) -> None:
        await self._metering(lambda: self._loop.open_epoch(at_least, aside_from))

    async def _metering(self, work: Callable[[], T]) -> T:
        """Run in the one thread that owns readers and baseline."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: asyncio.ensure_future(self.reload()))

    async def reload(self) -> dict[str, Any]:
        """Take up what can change while running; a file that cannot be read changes nothing."""
        try:
            fresh = read(self._file)
            catalogue = _catalogue(fresh)
        except (SettingsError, AgentError) as error:
            return self._reload.failed(error)
        self._settings = fresh
        self._metrics.settings = fresh.metrics
        journal.configure(fresh.journal_level)
        await self._metering(lambda: self._loop.reconfigure(fresh, catalogue))
        return self._reload.done(fresh)

    def _stuck(self) -> dict[str, str]:
        """What only a restart can mend. Not by the wall clock, which may be set under way."""
        if self._metering_since is None:
            return {}
        reasons = {}
        now = time.monotonic()
        since = now - max(self._loop.state.last_reading_monotonic, self._metering_since)
        bound = max(
            STUCK_AFTER_SECONDS,
            self._settings.meter.interval * STUCK_AFTER_INTERVALS * self._loop.state.stretch,
        )
        if since > bound:
            reasons["no_reading"] = f"no reading for {since:.0f} s"
        since = now - max(self._shipper.state.last_turn_monotonic, self._metering_since)
        if since > SHIPPER_STUCK_SECONDS:
            reasons["no_shipping"] = f"the shipper has not moved for {since:.0f} s"
        return reasons

    def _headline(self) -> str:
        """For `systemctl status`."""
        reasons = self._unready()
        if reasons:
            return "; ".join(reasons.values())
        if self._metering_since is None:
            return "starting"
        return f"metering {self._loop.state.units} units, delivering to {self._shipper.state.collector}"

    def _unready(self) -> dict[str, str]:
        reasons = {**self._stuck(), **self._loop.state.trouble}
        shipper = self._shipper.state
        if shipper.connected_since is None:
            code = Meter.NOT_AUTHORISED if shipper.person_needed else ""
            reasons["collector_unavailable"] = f"{code} {shipper.trouble or 'not connected yet'}".strip()
        if not self._loop.state.complete:
            reasons["reading_incomplete"] = "some cgroups could not be read; see `weighbridge-agent doctor`"
        if time.time() > self._identity.not_after:
            reasons["certificate_expired"] = (
                f"{Meter.NOT_AUTHORISED}: enrol again with a join token; nothing is lost meanwhile"
            )
        if self._reload.error:
            reasons["reload_failed"] = self._reload.error
        return reasons

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        command = request.get("command")
        if command == "status":
            fill = None
            with contextlib.suppress(SpoolError):
                fill = await asyncio.to_thread(self._spool.fill)
            return report.status(
                self._identity,
                self._spool,
                fill,
                self._loop,
                self._shipper.state,
                self._unready(),
                self._local.port,
            )
        if command == "reload":
            return await self.reload()
        if self._metering_since is None:
            return {"error": f"not metering yet: {'; '.join(self._unready().values())}"}
        if command == "top":
            return report.top(self._loop, int(request.get("limit", 50)))
        if command == "explain":
            return await self._metering(lambda: report.explain(self._loop, str(request.get("container", ""))))
        return {"error": "commands: status, reload, top, explain"}


def _name_thread() -> None:
    """So that `top -H` and the benchmark can tell metering from shipping (PR_SET_NAME, prctl(2))."""
    pr_set_name = 15
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(pr_set_name, METERING_THREAD.encode(), 0, 0, 0)


def _catalogue(settings: Settings) -> Catalogue:
    return Catalogue(Owners(settings.owners), LabelCache(sources(settings.labels), settings.labels.refresh))
