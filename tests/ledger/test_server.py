"""The ledger's process around a fake of its core: one thread owns it, nothing waits for ever, and an end is clean."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import signal
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ledger import server as server_module
from ledger import worker as worker_module
from ledger.config import Settings, read
from ledger.errors import LedgerAway, LedgerError
from ledger.lock import Lock
from ledger.server import Server
from ledger.tally import Tally
from ledger.worker import BY_ITSELF, MAX_WAITING, due
from tests.ledger.fake_books import FakeBooks
from wire.daemon.control import ControlError, ask
from wire.daemon.settings import Seconds

HOUR_NS = 3_600 * 10**9


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What the condition returns once that is true; the loop runs meanwhile."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.02)
    return value


class Running:
    """A server in this process, with what it was opened with."""

    def __init__(self, directory: Path, more: str = "") -> None:
        self.file = directory / "ledger.yaml"
        self.text = f"state_dir: {directory}/state\nlocal_port: {{port: 0}}\n"
        self.file.write_text(self.text + more)
        self.settings = read(self.file)
        self.settings.state_dir.mkdir(exist_ok=True)
        self.askers = ThreadPoolExecutor(16)
        self.books: list[FakeBooks] = []
        self.refusals: list[Exception] = []
        self.server = Server(self.settings, self.file, self.open)
        self.task = asyncio.create_task(self.server.run())

    def open(self, settings: Settings) -> FakeBooks:
        if self.refusals:
            raise self.refusals.pop(0)
        self.books.append(FakeBooks(settings))
        return self.books[-1]

    async def opened(self) -> FakeBooks:
        await until(lambda: self.task.done() or (self.books and not self.server._worker.opening))
        assert not self.task.done(), self.task.exception()
        return self.books[0]

    async def ask(self, command: str, **more: Any) -> dict[str, Any]:
        request = {"command": command, **more}
        # Not the loop's own threads: there are but a few.
        return await asyncio.get_running_loop().run_in_executor(
            self.askers, ask, self.settings.control_socket, request, 20.0
        )

    async def page(self, path: str) -> tuple[int, str]:
        port = json.loads((self.settings.state_dir / "endpoints.json").read_bytes())["local"]

        def fetch() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return await asyncio.to_thread(fetch)

    async def stop(self) -> None:
        if not self.task.done():
            self.server._stop.set()
        for books in self.books:
            books.hold.set()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.task, 20)
        self.askers.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of seconds are of milliseconds here."""
    monkeypatch.setattr(worker_module, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "MOST_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(worker_module, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(server_module, "LOCK_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(server_module, "STATUS_SECONDS", 0.3)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(more: str = "") -> Running:
        made.append(Running(tmp_path, more))
        return made[-1]

    yield start
    for one in made:
        await one.stop()


Start = Callable[..., Running]


async def test_one_thread_does_all_that_is_done_with_the_books(running: Start) -> None:
    one = running()
    books = await one.opened()
    await one.ask("usage", start_unix_ns=1, end_unix_ns=2)
    await one.ask("verify")
    await until(lambda: len(books.calls) > 20)
    assert {call[0] for call in books.calls} >= {"consume", "roll_up", "usage", "verify"}
    await one.stop()
    assert books.closed
    assert len(books.threads) == 1


async def test_whoever_asks_is_who_decided(running: Start) -> None:
    one = running()
    books = await one.opened()
    await one.ask("waive", period="2026-10", blockers=["b1"], reason="gone", by="somebody", peer_uid=12_345)
    me = pwd.getpwuid(os.getuid()).pw_name
    assert ("waive", "2026-10", ["b1"], "gone", me) in books.calls


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"command": "nonsense"}, "commands: status, usage"),
        ({"command": ["status"]}, "commands: status, usage"),
        ({"command": "usage", "start_unix_ns": 5, "end_unix_ns": 5}, "is no time"),
        ({"command": "usage", "start_unix_ns": True, "end_unix_ns": 5}, "start_unix_ns: nanoseconds"),
        ({"command": "usage", "start_unix_ns": 1, "end_unix_ns": 1 << 70}, "end_unix_ns: nanoseconds"),
        ({"command": "usage", "start_unix_ns": 1, "end_unix_ns": 5, "by": "name"}, "by: one of tenant"),
        ({"command": "usage", "start_unix_ns": 1, "end_unix_ns": 5, "tenant": {}}, "tenant: a text"),
        ({"command": "waive", "period": "p", "blockers": ["b"], "reason": "  "}, "reason: a text"),
        ({"command": "waive", "period": "p", "blockers": [], "reason": "r"}, "blockers: a list of names"),
        ({"command": "close", "period": "p" * 2_000}, "period: a text of at most 1000"),
        ({"command": "close", "period": "1999-01"}, "no such period; `weighbridge-ledger periods`"),
    ],
)
async def test_what_is_asked_wrongly_is_refused_with_the_fix(
    running: Start, request_: dict[str, Any], says: str
) -> None:
    one = running()
    await one.opened()
    with pytest.raises(ControlError) as error:
        await one.ask(**request_)
    assert says in str(error.value)


async def test_while_a_command_takes_long_status_answers_and_nothing_says_stuck(running: Start) -> None:
    one = running()
    books = await one.opened()
    await one.ask("status")
    books.hold.clear()
    slow = asyncio.create_task(one.ask("verify"))
    await until(lambda: one.server._worker.busy)
    found = await one.ask("status")
    assert found["agents"] == 12, "what was known last"
    assert found["busy"].startswith("busy with verify for")
    assert "busy with verify" in one.server._headline()
    one.server._worker._progress -= 1e6
    assert one.server._stuck() == {}
    assert (await one.page("/livez"))[0] == 200
    books.hold.set()
    assert (await slow)["ok"] is True


async def test_a_command_without_end_and_a_chunk_without_end_are_stuck(
    running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = running()
    books = await one.opened()
    books.hold.clear()
    slow = asyncio.create_task(one.ask("reconcile"))
    await until(lambda: one.server._worker.busy)
    monkeypatch.setattr(server_module, "COMMAND_SECONDS", 0.0)
    assert "busy with reconcile" in one.server._stuck()["ledger_thread"]
    assert (await one.page("/livez"))[0] == 503
    books.hold.set()
    await slow
    monkeypatch.setattr(server_module, "COMMAND_SECONDS", 1_800.0)
    monkeypatch.setattr(server_module, "BOOKING_STUCK_SECONDS", -1.0)
    assert "no chunk" in (await until(one.server._stuck))["ledger_thread"]


async def test_more_commands_than_may_wait_hear_that_it_is_busy(running: Start) -> None:
    one = running()
    books = await one.opened()
    books.hold.clear()
    asked = [asyncio.create_task(one.ask("verify")) for _ in range(MAX_WAITING + 3)]
    await until(lambda: sum(task.done() for task in asked) >= 2)
    books.hold.set()
    done = await asyncio.gather(*asked, return_exceptions=True)
    refused = [error for error in done if isinstance(error, BaseException)]
    assert 2 <= len(refused) <= 3
    assert all("commands wait already" in str(error) for error in refused)


async def test_what_cannot_be_opened_now_is_tried_again_and_readyz_says_why(
    running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "AGAIN_SECONDS", 0.5)
    one = running()
    one.refusals += [LedgerAway("ClickHouse is away; start it")] * 2
    await until(lambda: one.server._worker.trouble.get("opening", "").startswith("ClickHouse is away"))
    status, body = await one.page("/readyz")
    assert status == 503
    assert "ClickHouse is away" in body
    assert (await one.ask("status"))["ready"]["opening"] == "ClickHouse is away; start it"
    with pytest.raises(ControlError, match="not open yet: ClickHouse is away"):
        await one.ask("verify")
    await one.opened()
    assert (await one.page("/readyz"))[0] == 200


async def test_what_can_never_be_opened_ends_the_process_with_the_fix(running: Start) -> None:
    one = running()
    one.refusals.append(LedgerError("the store is newer than this program; install that again"))
    with pytest.raises(LedgerError, match="newer than this program"):
        await asyncio.wait_for(one.task, 20)


async def test_a_ledger_error_amid_booking_is_trouble_until_it_is_over(running: Start) -> None:
    one = running()
    books = await one.opened()
    books.fail_consume = LedgerError("METER-001 no; do this")
    await until(lambda: one.server._unready().get("ledger_failing") == "METER-001 no; do this")
    assert (await one.ask("verify"))["ok"] is True, "questions are answered meanwhile"
    books.fail_consume = None
    await until(lambda: not one.server._unready())


async def test_a_state_nobody_has_thought_of_ends_the_process(running: Start) -> None:
    one = running()
    books = await one.opened()
    books.fail_consume = ZeroDivisionError("?")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(one.task, 20)
    assert books.closed


async def test_a_directory_that_cannot_be_made_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="set `state_dir` to a directory"):
        Lock(tmp_path / "file" / "state" / "lock").take("a test")


async def test_a_start_waits_for_a_command_that_has_the_ledger_open(running: Start, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    lock = Lock(tmp_path / "state" / "lock")
    lock.take("weighbridge-ledger verify")
    one = running()
    await until(lambda: "weighbridge-ledger verify" in one.server._unready()["opening"])
    assert not one.settings.control_socket.exists(), "its name is of whoever has the lock"
    assert one.server._stuck() == {}
    lock.close()
    await one.opened()


async def test_a_start_that_waits_can_be_stopped(running: Start, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    lock = Lock(tmp_path / "state" / "lock")
    lock.take("a test")
    one = running()
    await until(lambda: one.server._starting.startswith("METER-001"))
    one.server._stop.set()
    await asyncio.wait_for(one.task, 20)
    assert not one.server._worker.alive
    lock.close()


async def test_sigterm_ends_after_what_is_in_hand(running: Start) -> None:
    one = running()
    books = await one.opened()
    books.hold.clear()
    slow = asyncio.create_task(one.ask("verify"))
    await until(lambda: one.server._worker.busy)
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: one.server._worker._stop.is_set())
    assert not books.closed
    books.hold.set()
    await asyncio.wait_for(one.task, 20)
    assert books.closed
    assert not one.settings.control_socket.exists()
    assert (await slow)["ok"] is True
    Lock(one.settings.lock_file).take("whoever comes next")


async def test_a_reload_takes_up_what_it_can_and_says_what_it_cannot(running: Start) -> None:
    one = running()
    books = await one.opened()
    changed = "rollup: {settle: 9s}\nsource: {log_directory: /elsewhere}\nperiods: {close_after: 1h}\n"
    one.file.write_text(one.text + changed)
    assert (await one.ask("reload"))["needs_restart"] == ["source"]
    await until(lambda: ("take_up", 9.0) in books.calls)
    assert one.server._worker.settings.periods.close_after == 3_600
    # It still does.
    assert (await one.ask("reload"))["needs_restart"] == ["source"]


async def test_a_bad_file_keeps_the_old_settings_and_shows(running: Start) -> None:
    one = running()
    books = await one.opened()
    one.file.write_text(one.text + "rollup: {settle: 9s}\nrolup: 1\n")
    with pytest.raises(ControlError, match="did you mean `rollup`"):
        await one.ask("reload")
    assert "weighbridge_ledger_reload_failed 1.0" in (await one.page("/metrics"))[1]
    assert "reload_failed" in (await one.ask("status"))["ready"]
    one.file.write_text(one.text + "rollup: {settle: 8s}\n")
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: ("take_up", 8.0) in books.calls)
    assert ("take_up", 9.0) not in books.calls
    assert "weighbridge_ledger_reload_failed 0.0" in (await one.page("/metrics"))[1]


async def test_the_headline_says_how_far_how_many_and_what_blocks(running: Start) -> None:
    one = running()
    books = await one.opened()
    books.tally.watermark_unix_ns = 1_700_000_000 * 10**9
    books.tally.period, books.tally.blockers = "2026-10", 2
    books.tally.period_end_unix_ns = time.time_ns()
    await until(lambda: "2026-10" in one.server._headline())
    assert one.server._headline() == "booked up to 2023-11-14T22:13:20Z, 12 agents, 2 blockers for 2026-10"


async def test_a_complete_period_is_closed_by_itself_when_it_is_old_enough(running: Start) -> None:
    one = running("periods: {close_after: 1h}\nrollup: {every: 1s}\n")
    books = await one.opened()
    books.tally.period = "2026-10"
    books.tally.period_end_unix_ns = time.time_ns() - 2 * HOUR_NS
    await until(lambda: any(call[0] == "close" for call in books.calls))
    assert next(call for call in books.calls if call[0] == "close") == ("close", "2026-10", BY_ITSELF)


def test_nothing_is_due_that_is_young_blocked_or_nobodys_wish() -> None:
    old = Tally(period="p", period_end_unix_ns=HOUR_NS)
    assert due(old, Seconds(60), 2 * HOUR_NS) == "p"
    assert due(old, Seconds(60), HOUR_NS + 59 * 10**9) == ""
    assert due(old, None, 2 * HOUR_NS) == ""
    assert due(Tally(period="p", period_end_unix_ns=HOUR_NS, blockers=1), Seconds(60), 2 * HOUR_NS) == ""
    assert due(Tally(), Seconds(60), 2 * HOUR_NS) == ""
