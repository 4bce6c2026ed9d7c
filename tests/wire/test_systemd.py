"""What systemd is told, over a real notification socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from wire.daemon import systemd
from wire.daemon.systemd import MAX_STATUS_CHARACTERS, Supervision, tell


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """systemd's end."""
    name = f"@weighbridge-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name.replace("@", "\0"))
        listening.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield listening


def heard(manager: socket.socket) -> list[str]:
    """All that was said since the last look."""
    lines: list[str] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            lines += manager.recv(65_536).decode().split("\n")
    return lines


def test_nobody_is_told_where_systemd_did_not_start_it(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    tell("STATUS=nobody hears this")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    tell("STATUS=a socket that is not there is no trouble")
    assert heard(manager) == []


def test_a_status_is_one_bounded_line(manager: socket.socket) -> None:
    supervision = Supervision(dict, lambda: "disk\nfull " + "x" * 9_000)
    supervision.report()
    (status,) = (line for line in heard(manager) if line.startswith("STATUS="))
    assert status.startswith("STATUS=disk full xxx")
    assert len(status) == len("STATUS=") + MAX_STATUS_CHARACTERS


def test_a_start_asks_for_more_time_until_it_is_done_once(manager: socket.socket) -> None:
    supervision = Supervision(dict, lambda: "starting")
    supervision.report()
    assert "EXTEND_TIMEOUT_USEC=60000000" in heard(manager)
    supervision.ready()
    supervision.ready()
    said = heard(manager)
    assert said.count("READY=1") == 1
    assert not any(line.startswith("EXTEND_TIMEOUT") for line in said)


def test_the_watchdog_hears_of_a_daemon_only_while_nothing_stands_still(
    manager: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    stuck: dict[str, str] = {}
    supervision = Supervision(lambda: stuck, lambda: "well")
    supervision.ready()
    assert heard(manager)[-2:] == ["WATCHDOG=1", "STATUS=well"]
    supervision.report()
    assert heard(manager) == ["WATCHDOG=1"], "what was said already is not said again"
    stuck["no_reading"] = "no reading for 61 s"
    supervision.report()
    supervision.report()
    assert heard(manager) == ["STATUS=no_reading: no reading for 61 s"]
    assert capfd.readouterr().err.count('"no_progress"') == 1
    stuck.clear()
    supervision.report()
    assert heard(manager) == ["WATCHDOG=1", "STATUS=well"]


def test_a_check_that_breaks_is_no_progress(manager: socket.socket) -> None:
    def broken() -> dict[str, str]:
        raise RuntimeError("the check itself")

    supervision = Supervision(broken, lambda: "well")
    supervision.ready()
    assert heard(manager) == ["READY=1", "STATUS=RuntimeError: the check itself"]


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("9000000", None, 3.0),
        ("600000000", None, systemd.REPORT_SECONDS),
        ("9000000", "another's", systemd.REPORT_SECONDS),
        ("nonsense", None, systemd.REPORT_SECONDS),
    ],
)
def test_reports_come_three_times_as_often_as_the_watchdog_looks(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, seconds: float
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", "1" if pid else str(os.getpid()))
    waits: list[float] = []

    async def run() -> None:
        async def sleep(wait: float) -> None:
            waits.append(wait)
            raise asyncio.CancelledError

        monkeypatch.setattr(systemd.asyncio, "sleep", sleep)
        with contextlib.suppress(asyncio.CancelledError):
            await Supervision(dict, lambda: "well").run()

    asyncio.run(run())
    assert waits == [seconds]
    assert "WATCHDOG=1" in heard(manager)
