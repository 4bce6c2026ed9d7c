"""The ledger as a process: it waits for its disk and its lock, has one thread book, answers commands, and ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from ledger import desk
from ledger.config import Settings, read
from ledger.errors import LedgerAway, LedgerError
from ledger.exporter import Gauge, LedgerMetrics
from ledger.lock import Lock
from ledger.times import clock
from ledger.worker import OPENING, Open, Worker
from wire.daemon import journal
from wire.daemon.control_socket import MAX_REQUEST_BYTES, ControlSocket
from wire.daemon.disk import wait_for_disk
from wire.daemon.files import replace_durably
from wire.daemon.local_port import LocalPort, new_registry
from wire.daemon.reload import Reload
from wire.daemon.settings import SettingsError
from wire.daemon.systemd import Supervision

BEAT_SECONDS = 5.0
STUCK_SECONDS = 60.0
BOOKING_STUCK_SECONDS = 300.0
"""One chunk, one insert; ClickHouse gives up by itself long before."""
COMMAND_SECONDS = 1_800.0
"""What a command, a roll-up or the opening may take: closing a period reads all of it."""
STATUS_SECONDS = 2.0
"""A status waits so long for its turn; then the last one is told, with what keeps the ledger busy."""
STOP_SECONDS = 50.0
"""For the chunk or command in hand. What is cut off then is as if it had not begun."""
LOCK_AGAIN_SECONDS = 1.0
ENDPOINTS_FILE = "endpoints.json"
RESTART_KEYS = ("state_dir", "source", "store", "periods.length", "local_port")

log = journal.Journal("ledger.server")


class Server:
    """One running ledger. `run` returns when it was told to stop, or raises what ended it."""

    def __init__(self, settings: Settings, settings_file: Path | None, open_books: Open) -> None:
        self._settings = settings
        self._file = settings_file
        self._stop = asyncio.Event()
        self._news = asyncio.Event()
        self._asked_to_reload = asyncio.Event()
        self._beat = time.monotonic()
        self._starting = OPENING
        """What keeps a start from opening the ledger; empty when its thread is at it."""
        loop = asyncio.get_running_loop()
        self._worker = Worker(settings, open_books, lambda: _tell(loop, self._news))
        self._last_status: dict[str, Any] = {}
        self._supervision = Supervision(self._stuck, self._headline)
        self._reload = Reload(settings, RESTART_KEYS, self._supervision.report)

    async def run(self) -> None:
        settings = self._settings
        with contextlib.ExitStack() as closing:
            for keeping in (self._keep_beat(), self._supervision.run()):
                closing.callback(asyncio.create_task(keeping).cancel)
            self._signals()
            local = self._local_port()
            closing.callback(local.close)
            local.start()
            lock = Lock(settings.lock_file)
            closing.callback(lock.close)
            if not await self._unless_stopped(self._own_the_directory(lock)):
                return
            # Only now: the socket's name is of whoever has the lock.
            control = ControlSocket(settings.control_socket, self._answer, MAX_REQUEST_BYTES, COMMAND_SECONDS)
            try:
                await control.start()
                self._write_endpoints(local.port)
                self._starting = ""
                self._worker.start()
                log.info("listening", local=local.port)
                await self._until_stopped()
                log.info("stopping")
                self._supervision.stopping()
            finally:
                # In this order, so that whoever waits for an answer hears that there will be none.
                await self._end_worker()
                await control.close()
        failure = self._worker.failure
        if failure is not None:
            raise failure

    async def _own_the_directory(self, lock: Lock) -> None:
        await wait_for_disk((self._settings.state_dir,), self._waits, "ledger", LedgerError)
        told = False
        while True:
            try:
                lock.take("weighbridge-ledger run")
            except LedgerAway as error:
                # A command that has the ledger open ends by itself.
                self._waits(str(error))
                if not told:
                    log.warning("lock_held", trouble=str(error))
                told = True
                await asyncio.sleep(LOCK_AGAIN_SECONDS)
            else:
                return

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether `work` was done before somebody said stop."""
        doing, stop = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((doing, stop), return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
                return True
            return False
        finally:
            doing.cancel()
            stop.cancel()

    def _waits(self, trouble: str) -> None:
        """`systemctl start` has nothing to wait for; collectors keep what there is to book."""
        self._starting = f"METER-001: {trouble}"
        self._supervision.ready()

    def _write_endpoints(self, port: int) -> None:
        found = {"local": port, "pid": os.getpid(), "since": int(time.time())}
        path = self._settings.state_dir / ENDPOINTS_FILE
        try:
            replace_durably(path, json.dumps(found).encode() + b"\n", 0o644)
        except OSError as error:
            log.warning("endpoints_not_written", error=error)

    def _local_port(self) -> LocalPort:
        registry = new_registry()
        registry.register(LedgerMetrics(lambda: self._worker.tally, self._unready, self._gauges))
        where = self._settings.local_port
        return LocalPort(where.address, where.port, registry, self._stuck, self._unready)

    def _gauges(self) -> Iterator[Gauge]:
        yield "reload_failed", "1 if the last reload kept the old settings.", float(bool(self._reload.error))
        busy = self._worker.busy
        seconds = 0.0 if busy is None else time.monotonic() - busy[1]
        yield "busy_seconds", "How long it has been at one command, roll-up or start.", seconds

    def _stuck(self) -> dict[str, str]:
        """What only a restart can mend."""
        reasons = {}
        silent = time.monotonic() - self._beat
        if silent > STUCK_SECONDS:
            reasons["event_loop"] = f"the event loop has not run for {silent:.0f} s"
        if self._starting:
            return reasons
        busy = self._worker.busy
        if busy is not None:
            seconds = time.monotonic() - busy[1]
            if seconds > COMMAND_SECONDS:
                reasons["ledger_thread"] = f"busy with {busy[0]} for {seconds / 60:.0f} min"
        elif not self._worker.alive:
            reasons["ledger_thread"] = "the thread that books has ended; see the journal"
        elif not self._worker.opening and self._worker.quiet_seconds > BOOKING_STUCK_SECONDS:
            reasons["ledger_thread"] = (
                f"no chunk has been booked or looked for in {self._worker.quiet_seconds:.0f} s"
            )
        return reasons

    def _unready(self) -> dict[str, str]:
        reasons = {"opening": self._starting} if self._starting else self._worker.trouble
        if self._reload.error:
            reasons["reload_failed"] = self._reload.error
        return reasons

    def _headline(self) -> str:
        """For `systemctl status`."""
        reasons = self._unready()
        busy = self._busy()
        if reasons:
            return "; ".join((*reasons.values(), *([busy] if busy else [])))
        tally, now = self._worker.tally, time.time_ns()
        words = [
            f"booked up to {clock(tally.watermark_unix_ns, now)}"
            if tally.watermark_unix_ns
            else "nothing booked yet"
        ]
        words.append(f"{tally.agents} agents")
        if tally.period:
            words.append(f"{tally.blockers} blockers for {tally.period}")
        if busy:
            words.append(busy)
        return ", ".join(words)

    def _busy(self) -> str:
        busy = self._worker.busy
        return "" if busy is None else f"busy with {busy[0]} for {time.monotonic() - busy[1]:.0f} s"

    async def _until_stopped(self) -> None:
        work = (self._watch_worker(), self._reload_when_asked(), self._stop.wait())
        tasks = [asyncio.create_task(one) for one in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _watch_worker(self) -> None:
        """Until it has ended. A start is done when the ledger is open, or waits for something that may take days."""
        while self._worker.alive:
            if self._worker.opening != OPENING:
                self._supervision.ready()
                self._supervision.report()
            await self._news.wait()
            self._news.clear()
            # The last news comes from a thread that has a few instructions left.
            await asyncio.to_thread(self._worker.join, 0.1)

    async def _end_worker(self) -> None:
        self._worker.stop()
        if self._worker.alive and not await asyncio.to_thread(self._worker.join, STOP_SECONDS):
            log.warning("stopped_amid_work", busy=self._busy())

    async def _keep_beat(self) -> None:
        """Shows that the event loop runs."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)

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
            self.reload()

    def reload(self) -> dict[str, Any]:
        """Take up what can change while running. A file that cannot be read changes nothing."""
        try:
            fresh = read(self._file)
        except SettingsError as error:
            return self._reload.failed(error)
        self._worker.settings = fresh
        journal.configure(fresh.journal_level)
        return self._reload.done(fresh)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        command, uid = request.get("command"), int(request["peer_uid"])
        try:
            if command == "reload":
                return self.reload()
            if command == "status":
                return await self._status(uid)
            desk.command_of(request)
            return await asyncio.wrap_future(self._worker.ask(request, uid))
        except LedgerError as error:
            return {"error": str(error)}

    async def _status(self, uid: int) -> dict[str, Any]:
        with contextlib.suppress(LedgerError, TimeoutError):
            async with asyncio.timeout(STATUS_SECONDS):
                self._last_status = await asyncio.wrap_future(self._worker.ask({"command": "status"}, uid))
        return {**self._last_status, "ready": self._unready(), "busy": self._busy()}


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """From another thread. A loop that is closed has nobody left to tell."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)
