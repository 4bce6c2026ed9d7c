"""Journal, local port, control socket: bounded, and never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import Counter

from wire.daemon import journal, local_port
from wire.daemon.control import ControlError, ask
from wire.daemon.control_socket import ControlSocket
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


def test_what_was_cut_is_said_once_when_the_event_comes_again(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    log = journal.Journal("test.flood")
    for _ in range(journal.BURST + 7):
        log.warning("again")
    capfd.readouterr()
    now += journal.BURST_SECONDS + 1
    log.warning("again")
    log.warning("again")
    assert [line.get("suppressed") for line in lines_of(capfd)] == [7, None]


def test_no_value_is_too_odd_to_be_written(capfd: pytest.CaptureFixture[str]) -> None:
    log = journal.Journal("test.odd")
    round_and_round: list[object] = []
    round_and_round.append({"again": round_and_round})
    log.info("odd", value=round_and_round)
    log.info("odd", value=10**5_000)
    log.info("odd", value={Unspeakable(): b"\xff", 1: "\x7f\x9b"})
    log.info("odd", **{f"key_{n}": "x" * 1_000 for n in range(100)})
    raw = capfd.readouterr().err
    assert raw.isascii()
    assert raw.replace("\n", "").isprintable()
    *_, names, cut = (json.loads(line) for line in raw.splitlines())
    assert raw.count("\n") == 4
    assert names["value"] == {"<Unspeakable>": "b'\\xff'", "1": "\x7f\x9b"}
    assert cut["cut"] > journal.MAX_LINE_CHARACTERS
    assert all(len(line) <= journal.MAX_LINE_CHARACTERS for line in raw.splitlines())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
        max_leaves=20,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_is_one_printable_line(capfd: pytest.CaptureFixture[str], value: object) -> None:
    journal.Journal("test.any").info("any", value=value)
    raw = capfd.readouterr().err
    assert raw.endswith("\n")
    assert raw[:-1].isascii()
    assert raw[:-1].isprintable()
    assert json.loads(raw)["event"] == "any"


def test_a_closed_standard_error_does_not_stop_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    log = journal.Journal("test.closed")
    with open("/dev/null", "w") as closed:
        pass
    for stream in (closed, None):
        monkeypatch.setattr("sys.stderr", stream)
        assert log.error("unheard") is None


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


def eventually_live(port: LocalPort) -> bool:
    for _ in range(50):
        with contextlib.suppress(OSError):
            return get(port, "/livez")[0] == 200
        time.sleep(0.02)
    return False


def test_slow_clients_are_bounded_and_do_not_stop_the_port(port: LocalPort) -> None:
    slow = [socket.create_connection(("127.0.0.1", port.port)) for _ in range(3 * MAX_CONNECTIONS)]
    for connection in slow:
        connection.close()
    assert eventually_live(port)
    port.close()


def test_an_idle_client_is_cut_and_its_place_given_to_the_next(
    port: LocalPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_port._Handler, "timeout", 1.0)
    with contextlib.ExitStack() as stack:
        stack.callback(port.close)
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port.port), timeout=10))
            for _ in range(MAX_CONNECTIONS)
        ]
        with pytest.raises(OSError):
            get(port, "/livez")
        for connection in idle:
            assert connection.recv(1) == b""
        # A place is free again a moment after its connection is closed.
        assert eventually_live(port)


def test_a_check_that_fails_is_itself_the_reason() -> None:
    def broken() -> dict[str, str]:
        raise RuntimeError("lost")

    port = LocalPort("127.0.0.1", 0, new_registry(), dict, broken)
    port.start()
    try:
        code, _, text = get(port, "/readyz")
        assert code == 503
        assert json.loads(text)["reasons"] == {"check_failed": "RuntimeError: lost"}
    finally:
        port.close()


@pytest.mark.skipif(
    os.geteuid() != 0 or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 2,
    reason="gives privilege away and asks for a privileged port: needs root, and ports that are privileged",
)
def test_a_privileged_port_is_named_with_the_fix() -> None:
    os.seteuid(65_534)
    try:
        with pytest.raises(LocalPortError, match=r"needs privilege; set `local_port\.port` to 1024"):
            LocalPort("127.0.0.1", 1, new_registry(), dict, dict).start()
    finally:
        os.seteuid(0)


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

    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    path = tmp_path / "run" / "x.sock"
    control = ControlSocket(path, answer)
    await control.start()
    assert path.stat().st_mode & 0o777 == 0o660
    assert await asyncio.to_thread(ask, path, {"command": "hello"}) == {"got": "hello"}
    for nonsense in (b"\n", b"rubbish\n", b"[]\n", b"x" * 200_000 + b"\n", b"[" * 50_000 + b"\n", b""):
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(nonsense)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
    with pytest.raises(ControlError):
        await asyncio.to_thread(ask, path, {"command": "x" * 200_000})
    with pytest.raises(ControlError, match="ValueError: no"):
        await asyncio.to_thread(ask, path, {"command": "fail"})
    assert unhandled == []
    await control.close()
    with pytest.raises(ControlError, match="is the daemon running"):
        await asyncio.to_thread(ask, path, {"command": "hello"})
    assert not path.exists()


async def test_a_control_socket_that_cannot_be_opened_names_the_fix(tmp_path: Path) -> None:
    async def answer(request: dict[str, object]) -> dict[str, object]:
        return request

    (tmp_path / "file").touch()
    for path, why in (
        (tmp_path / "file" / "x.sock", "exists|Not a directory"),
        (tmp_path / ("x" * 200), "too long"),
    ):
        with pytest.raises(ControlError, match=rf"({why}); set `run_dir` to a directory"):
            await ControlSocket(path, answer).start()
