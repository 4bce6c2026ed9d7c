"""The one thread that owns the ledger: it books what comes, adds up, and answers between two chunks.

ClickHouse inside a program is of one thread, and so is all that the ledger remembers; whoever else wants something asks
here and waits. Progress is real: `quiet_seconds` counts from the last chunk or command that came to its end, so a store that
hangs shows, and what may take long is told apart from it by `busy`.

Failure model. A ledger that cannot be opened *now* (LedgerAway) is tried again for ever; one that cannot be opened at all ends
the thread with its LedgerError. A LedgerError out of booking or adding up is trouble: said, and tried again with growing
pauses. Anything else is a state nobody has thought of: the thread ends, the process after it, and the next start derives
everything from the store.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from ledger.config import Settings
from ledger.desk import Answer, Books, Request, answer
from ledger.errors import LedgerAway, LedgerError
from ledger.lock import Lock
from ledger.tally import Tally
from wire.daemon.journal import Journal
from wire.daemon.settings import Seconds

STOPPING = "the ledger is stopping; ask again when it runs"
OPENING = "opening the ledger"
BY_ITSELF = "periods.close_after"
"""Who closed a period that nobody closed."""
WAIT_SECONDS = 0.5
"""For batches, when there are none; a command waits no longer than that, and for the chunk in hand."""
AGAIN_SECONDS = 5.0
MOST_AGAIN_SECONDS = 60.0
MAX_WAITING = 8
"""Commands that may wait, each with a connection of the control socket's 16: others still hear that it is busy."""

log = Journal("ledger.worker")

Open = Callable[[Settings], Books]


class Busy(LedgerError):
    """Too many commands wait."""


class Worker:
    """`start`, then `ask` from any thread; `stop` ends it after the chunk or command in hand."""

    def __init__(self, settings: Settings, open_books: Open, news: Callable[[], object]) -> None:
        """`news`: called from the thread when it is open, waits, or is over, however it ended."""
        self.settings = settings
        """Replaced as a whole by a reload, and taken up in the next turn."""
        self._open = open_books
        self._news = news
        self._waiting: queue.Queue[tuple[Request, int, Future[Answer]]] = queue.Queue(MAX_WAITING)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._progress = time.monotonic()
        self._tally = Tally()
        self._trouble: dict[str, str] = {}
        self._failing = ""
        self.opening = OPENING
        """What a start is at, or what it waits for; empty when the ledger is open."""
        self.busy: tuple[str, float] | None = None
        """What is in hand that may take minutes, and the time.monotonic() of its beginning."""
        self.failure: BaseException | None = None
        """What ended the thread, if nobody asked it to."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end; `join` waits."""
        self._stop.set()

    def join(self, timeout_seconds: float) -> bool:
        """Whether it has ended."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def quiet_seconds(self) -> float:
        """Since it last came to the end of something."""
        return time.monotonic() - self._progress

    @property
    def tally(self) -> Tally:
        """As of the last turn; nobody changes it any more."""
        return self._tally

    @property
    def trouble(self) -> dict[str, str]:
        """Why the ledger cannot go on now: reason -> sentence with the fix."""
        if self.opening:
            return {"opening": self.opening}
        return {**self._trouble, **({"ledger_failing": self._failing} if self._failing else {})}

    def ask(self, request: Request, uid: int) -> Future[Answer]:
        """Have a command done when its turn comes. Busy if too many wait. Cancel it to give up waiting."""
        done: Future[Answer] = Future()
        if self._stop.is_set() or not self.alive:
            raise LedgerError(STOPPING)
        if self.opening:
            raise LedgerError(f"the ledger is not open yet: {self.opening}")
        try:
            self._waiting.put_nowait((request, uid, done))
        except queue.Full:
            raise Busy(f"{MAX_WAITING} commands wait already; ask again later") from None
        return done

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as closing:
                books = self._opened()
                if books is not None:
                    closing.callback(books.close)
                    self._work(books)
        except BaseException as error:  # noqa: BLE001 - the process says what became of its thread
            self.failure = error
        finally:
            self._refuse_waiting()
            self._news()

    def _opened(self) -> Books | None:
        """The ledger, as soon as it can be had; None when asked to stop before."""
        told = ""
        while not self._stop.is_set():
            try:
                with self._busy_with("opening"):
                    books = self._open(self.settings)
            except LedgerAway as error:
                self.opening = str(error)
                if told != self.opening:
                    log.error("ledger_unavailable", code="METER-001", trouble=self.opening)
                    told = self.opening
                self._news()
                self._stop.wait(AGAIN_SECONDS)
                continue
            self._publish(books)
            self.opening = ""
            if told:
                log.info("ledger_recovered")
            self._news()
            return books
        return None

    def _work(self, books: Books) -> None:
        taken_up = self.settings
        next_look = time.monotonic()
        again_seconds = AGAIN_SECONDS
        while not self._stop.is_set():
            self._answer_one(books)
            try:
                if self.settings is not taken_up:
                    taken_up = self.settings
                    books.take_up(taken_up)
                    next_look = time.monotonic()
                books.consume(0.0 if not self._waiting.empty() else WAIT_SECONDS)
                if time.monotonic() >= next_look:
                    self._look(books, taken_up)
                    next_look = time.monotonic() + taken_up.rollup.every
            except LedgerError as error:
                self._fails(str(error))
                self._publish(books)
                self._pause(books, again_seconds)
                again_seconds = min(MOST_AGAIN_SECONDS, again_seconds * 2)
                continue
            if self._failing:
                self._failing, again_seconds = "", AGAIN_SECONDS
                log.info("ledger_recovered")
            self._publish(books)

    def _look(self, books: Books, settings: Settings) -> None:
        """What is done now and then: add up, and close what is due."""
        with self._busy_with("roll-up"):
            books.roll_up()
        period = due(books.recorded(), settings.periods.close_after, time.time_ns())
        if period:
            with self._busy_with(f"close {period}"):
                books.close_period(period, BY_ITSELF)

    @contextlib.contextmanager
    def _busy_with(self, what: str) -> Iterator[None]:
        self.busy = what, time.monotonic()
        try:
            yield
        finally:
            self.busy = None
            self._progress = time.monotonic()

    def _pause(self, books: Books, seconds: float) -> None:
        """Before the next try, answering meanwhile."""
        until = time.monotonic() + seconds
        while not self._stop.is_set() and time.monotonic() < until:
            self._answer_one(books, WAIT_SECONDS)
            self._progress = time.monotonic()

    def _fails(self, text: str) -> None:
        if text != self._failing:
            log.error("ledger_failing", code="METER-001", trouble=text)
        self._failing = text

    def _publish(self, books: Books) -> None:
        """For the other threads, each replaced at once."""
        self._tally = books.recorded().copy()
        self._trouble = dict(books.trouble)
        self._progress = time.monotonic()

    def _answer_one(self, books: Books, wait_seconds: float = 0.0) -> None:
        """One command, so that many of them never keep batches waiting for more than one."""
        try:
            request, uid, done = self._waiting.get(block=wait_seconds > 0, timeout=wait_seconds or None)
        except queue.Empty:
            return
        if not done.set_running_or_notify_cancel():
            return  # Nobody waits for it any more.
        name = str(request.get("command"))[:40]
        try:
            with self._busy_with(name):
                done.set_result(answer(books, request, uid))
        except Exception as error:  # noqa: BLE001 - of one question, not of the ledger
            if not isinstance(error, LedgerError):
                log.error("command_failed", command=name, error=error)
            done.set_exception(error)
        self._publish(books)

    def _refuse_waiting(self) -> None:
        while True:
            try:
                *_, done = self._waiting.get_nowait()
            except queue.Empty:
                return
            if done.set_running_or_notify_cancel():
                done.set_exception(LedgerError(STOPPING))


def due(tally: Tally, close_after: Seconds | None, now_unix_ns: int) -> str:
    """The period that is to be closed by itself now; empty: none. Only the oldest can be: periods close in their order."""
    if close_after is None or tally.period_end_unix_ns is None or tally.blockers:
        return ""
    return tally.period if now_unix_ns >= tally.period_end_unix_ns + close_after.ns else ""


def open_for_command(settings: Settings, open_books: Open, request: dict[str, Any], uid: int) -> Answer:
    """Do one command without a daemon. LedgerError names who has the ledger open."""
    if not settings.state_dir.is_dir():
        raise LedgerError(
            f"{settings.state_dir}: no ledger here; name its settings with --config, or start weighbridge-ledger"
        )
    with contextlib.ExitStack() as closing:
        lock = Lock(settings.lock_file)
        closing.callback(lock.close)
        lock.take(f"weighbridge-ledger {request['command']}")
        books = open_books(settings)
        closing.callback(books.close)
        return answer(books, request, uid)
