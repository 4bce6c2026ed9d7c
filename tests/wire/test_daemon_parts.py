"""Journal, local port, control socket: bounded, and never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import Counter

from wire.daemon import journal
from wire.daemon.control import ControlError, ControlSocket, ask
from wire.daemon.local_port import MAX_CONNECTIONS, LocalPort, LocalPortError, new_registry


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def lines_of(capfd: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_a_journal_line_is_one_bounded_ascii_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    log = journal.Journal("test.part")
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        cause = error
    log.info(
        "happened",
        text="\x1b[2J\u202e\n" + "x" * 5_000,
        bad=Unspeakable(),
        nan=float("nan"),
        error=cause,
        ts="mine",
    )
    raw = capfd.readouterr().err
    assert raw.isascii()
    assert raw.count("\n") == 1
    line = json.loads(raw)
    assert (line["part"], line["event"], line["level"]) == ("test.part", "happened", "info")
    assert len(line["text"]) <= journal.MAX_VALUE_CHARACTERS
    assert line["error"] == {"type": "ValueError", "message": "a\nb"}
    assert line["bad"] == "<Unspeakable>"
    assert line["ts_"] == "mine"


def test_a_flood_of_one_event_is_cut_and_other_events_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    log = journal.Journal("test.flood")
    for n in range(500):
        log.warning("again", n=n)
    log.warning("other")
    events = [line["event"] for line in lines_of(capfd)]
    assert events.count("again") == journal.BURST
    assert events.count("other") == 1


@pytest.fixture
def port() -> LocalPort:
    registry = new_registry()
    Counter("weighbridge_test_things", "Things.", registry=registry).inc(3)
    reasons: dict[str, str] = {}
    made = LocalPort("127.0.0.1", 0, registry, dict, lambda: reasons)
    made.reasons = reasons  # type: ignore[attr-defined]
    made.start()
    return made


def get(port: LocalPort, path: str, accept: str = "") -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port.port}{path}", headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=10) as page:
            return page.status, page.headers["Content-Type"], page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def test_the_local_port_serves_metrics_health_and_named_reasons(port: LocalPort) -> None:
    code, kind, text = get(port, "/metrics", "application/openmetrics-text; version=1.0.0")
    assert code == 200
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    code, kind, text = get(port, "/metrics")
    assert kind.startswith("text/plain")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert get(port, "/livez")[0] == get(port, "/readyz")[0] == 200
    port.reasons["disk_full"] = "METER-002: free some"  # type: ignore[attr-defined]
    code, _, text = get(port, "/readyz")
    assert code == 503
    assert json.loads(text) == {"status": "not ready", "reasons": {"disk_full": "METER-002: free some"}}
    assert get(port, "/livez")[0] == 200
    assert get(port, "/etc/passwd")[0] == 404
    port.close()


def test_slow_clients_are_bounded_and_do_not_stop_the_port(port: LocalPort) -> None:
    slow = [socket.create_connection(("127.0.0.1", port.port)) for _ in range(3 * MAX_CONNECTIONS)]
    for connection in slow:
        connection.close()
    for _ in range(50):
        try:
            assert get(port, "/livez")[0] == 200
            break
        except OSError:
            continue
    else:
        pytest.fail("the port is stuck")
    port.close()


def test_a_port_that_cannot_be_opened_is_named_with_the_fix(port: LocalPort) -> None:
    with pytest.raises(LocalPortError, match=r"in use.*local_port\.port"):
        LocalPort("127.0.0.1", port.port, new_registry(), dict, dict).start()
    with pytest.raises(LocalPortError, match=r"local_port\.address"):
        LocalPort("192.0.2.1", 0, new_registry(), dict, dict).start()
    port.close()


async def test_the_control_socket_answers_and_survives_nonsense(tmp_path: Path) -> None:
    async def answer(request: dict[str, object]) -> dict[str, object]:
        if request["command"] == "fail":
            raise ValueError("no")
        return {"got": request["command"]}

    path = tmp_path / "run" / "x.sock"
    control = ControlSocket(path, answer)
    await control.start()
    assert path.stat().st_mode & 0o777 == 0o660
    assert await asyncio.to_thread(ask, path, {"command": "hello"}) == {"got": "hello"}
    for nonsense in (b"\n", b"rubbish\n", b"[]\n", b"x" * 200_000 + b"\n", b""):
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(nonsense)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
    with pytest.raises(ControlError, match="ValueError: no"):
        await asyncio.to_thread(ask, path, {"command": "fail"})
    await control.close()
    with pytest.raises(ControlError, match="is the daemon running"):
        await asyncio.to_thread(ask, path, {"command": "hello"})
    assert not path.exists()
