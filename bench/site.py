"""A throw-away installation: a CA, a collector, an agent and a ledger as real processes; mutual TLS between the first two.

Ports are free ones, everything lies below one directory, and every process is ended by its pid.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from bench.ports import free_ports
from wire.daemon.control import NotRunning, ask

_SOCKETS = {
    "agent": "run/agent.sock",
    "collector": "collector/collector.sock",
    "ledger": "ledger/ledger.sock",
}


class SiteError(Exception):
    """A part did not come up; the message has its journal."""


class Site:
    """`runner`: a command that runs the daemons as somebody else, such as setpriv."""

    def __init__(self, directory: Path, runner: Sequence[str] = ()) -> None:
        self.directory = directory
        self._runner = list(runner)
        self.collector_file, self.agent_file, self.ledger_file = map(
            self._file, ("collector", "agent", "ledger")
        )
        self.collector: subprocess.Popen[bytes] | None = None
        self.agent: subprocess.Popen[bytes] | None = None
        self.ledger: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}

    def prepare(
        self,
        agent: Mapping[str, Any] | None = None,
        collector: Mapping[str, Any] | None = None,
        ledger: Mapping[str, Any] | None = None,
    ) -> None:
        """Settings and a CA. The mappings are laid over the defaults of a throw-away site."""
        self.directory.mkdir(parents=True, exist_ok=True)
        ingest, enrolment = free_ports(2)
        base: dict[str, Any] = {
            "state_dir": str(self.directory / "collector"),
            "listen": {"ingest": f"127.0.0.1:{ingest}", "enrolment": f"127.0.0.1:{enrolment}"},
            "local_port": {"port": 0},
            "log": {"min_free": "1MiB"},
        }
        self.collector_file.write_text(yaml.safe_dump(_over(base, collector or {})))
        base = {
            "state_dir": str(self.directory / "agent"),
            "run_dir": str(self.directory / "run"),
            "local_port": {"port": 0},
            "meter": {"interval": "1s", "memory_sample": "500ms"},
        }
        self.agent_file.write_text(yaml.safe_dump(_over(base, agent or {})))
        base = {
            "state_dir": str(self.directory / "ledger"),
            "source": {"log_directory": str(self.directory / "collector" / "log")},
            "store": {"memory": "512MiB"},
            "local_port": {"port": 0},
        }
        self.ledger_file.write_text(yaml.safe_dump(_over(base, ledger or {})))
        self.command("collector", "ca", "init", "--domain", "demo.example", "--host", "127.0.0.1")

    def command(self, part: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one command of `agent`, `collector` or `ledger`."""
        done = subprocess.run(
            [sys.executable, "-m", part, "--config", str(self._file(part)), *words],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode != 0:
            raise SiteError(f"{part} {' '.join(words)}: {done.stderr or done.stdout}")
        return done

    def start_collector(self, seconds: float = 20.0) -> None:
        """Start it and wait until it listens."""
        endpoints = self.directory / "collector" / "endpoints.json"
        endpoints.unlink(missing_ok=True)
        self.collector = self._start("collector")
        deadline = time.monotonic() + seconds
        while not endpoints.exists():
            if self.collector.poll() is not None or time.monotonic() > deadline:
                raise SiteError(f"the collector did not start:\n{self.journal('collector')}")
            time.sleep(0.02)
        self._ports = json.loads(endpoints.read_text())

    @property
    def ports(self) -> dict[str, int]:
        """ingest, enrolment, local of the running collector."""
        return self._ports

    def enroll(self, *token_options: str) -> str:
        """Enrol the agent; returns its id."""
        token = self.command("collector", "token", "create", *token_options).stdout.strip()
        return self.command("agent", "enroll", token).stdout.split()[3].rstrip(";")

    def start_agent(self) -> None:
        self.agent = self._start("agent")

    def wait_metering(self, seconds: float = 20.0) -> None:
        """Until the agent has taken its first reading."""
        deadline = time.monotonic() + seconds
        while not (self.directory / "run" / "agent.sock").exists() or '"started"' not in self.journal(
            "agent"
        ):
            if self.agent is None or self.agent.poll() is not None or time.monotonic() > deadline:
                raise SiteError(f"the agent did not start:\n{self.journal('agent')}")
            time.sleep(0.02)

    def start_ledger(self) -> None:
        """Start it; `wait_booking` waits until it has opened its books."""
        self.ledger = self._start("ledger")

    def wait_booking(self, seconds: float = 60.0) -> None:
        """Until the ledger answers with its books open. Its engine alone takes a second to load."""
        deadline = time.monotonic() + seconds
        while not self._booking():
            if self.ledger is None or self.ledger.poll() is not None or time.monotonic() > deadline:
                raise SiteError(f"the ledger did not start:\n{self.journal('ledger')}")
            time.sleep(0.05)

    def _booking(self) -> bool:
        try:
            return not self.ask("ledger", "status")["ready"]
        except NotRunning:
            return False

    def ask(self, part: str, command: str, seconds: float = 30.0, **more: Any) -> dict[str, Any]:
        """Ask a running daemon over its control socket."""
        return ask(self.directory / _SOCKETS[part], {"command": command, **more}, seconds)

    def stop(self, part: str, how: int = signal.SIGTERM, seconds: float = 40.0) -> int:
        """End a daemon and wait for it; returns its exit code."""
        process: subprocess.Popen[bytes] | None = getattr(self, part)
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(how)
        code = process.wait(seconds)
        setattr(self, part, None)
        return code

    def close(self) -> None:
        """Kill what still runs."""
        for process in (self.agent, self.collector, self.ledger):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        self.agent = self.collector = self.ledger = None

    def journal(self, part: str) -> str:
        path = self.directory / f"{part}.journal"
        return path.read_text(errors="replace") if path.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, part: str) -> Path:
        return self.directory / f"{part}.yaml"

    def _start(self, part: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{part}.journal").open("ab") as journal:
            return subprocess.Popen(
                [*self._runner, sys.executable, "-m", part, "--config", str(self._file(part)), "run"],
                stdin=subprocess.DEVNULL,
                stdout=journal,
                stderr=journal,
                env={**os.environ, "PYTHONFAULTHANDLER": "1"},
                start_new_session=True,
            )


def _over(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return out
