"""The packages of this checkout, installed in a machine with their own units and users."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.acceptance.machines.machine import Machine
from tests.acceptance.packages import OLD, manage, put_packages

HOME = "/usr/lib/weighbridge"
AGENT_PORT, COLLECTOR_PORT = 9465, 9464
WAIT_INTERVALS = """
import sys, time, urllib.request
def committed():
    page = urllib.request.urlopen("http://127.0.0.1:9465/metrics", timeout=30).read().decode()
    return next(float(line.split()[1]) for line in page.splitlines() if line.startswith("weighbridge_agent_intervals_total "))
wanted = committed() + int(sys.argv[1])
while committed() < wanted: time.sleep(0.5)
"""
FETCH = """
import sys, urllib.error, urllib.request
try: page = urllib.request.urlopen(sys.argv[1], timeout=30)
except urllib.error.HTTPError as error: page = error
print(page.read().decode())
"""


class Weighbridge:
    """Agent and collector of this checkout in one machine, and whatever else."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def install(self, kind: str = "deb", probes: bool = False) -> None:
        """Both packages; nothing runs yet. Without `probes` nobody loads them but the test itself."""
        put_packages(self.machine, kind)
        # Debian's rpm has no record of what dpkg has installed.
        manage(self.machine, f"{'dpkg' if kind == 'deb' else 'rpm --nodeps'} --install {OLD}/*.{kind}")
        if not probes:
            self.machine.run("systemctl mask weighbridge-probes.service")

    def configure(self, part: str, settings: Mapping[str, Any]) -> None:
        """A drop-in over the packages' settings."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "test.yaml")
            file.write_text(yaml.safe_dump(dict(settings)))
            self.machine.put(file, f"/etc/weighbridge/{part}.d/test.yaml")

    def command(self, part: str, words: str) -> str:
        """One command of `agent`, `collector` or `ledger`, as root gives it."""
        return self.machine.run(f"weighbridge-{part} {words}", seconds=300).output

    def start(self) -> None:
        """A CA, the collector, one enrolment, the agent; returns when the agent meters."""
        self.command("collector", "ca init --domain example.org --host 127.0.0.1")
        self.machine.run(
            "systemctl start weighbridge-collector\n"
            "weighbridge-collector token create | weighbridge-agent enroll -\n"
            "systemctl start weighbridge-agent",
            seconds=600,
        )

    def wait(self, condition: str, seconds: int = 120) -> None:
        """Until a shell condition holds. Asking it costs an emulated machine more than most of what is waited for."""
        done = self.machine.run(f"until {condition}; do sleep 1; done", seconds=seconds, check=False)
        if done.code != 0:
            raise TimeoutError(f"not so after {seconds} s: {condition}\n{done.errors}\n{self.journal()}")

    def wait_ready(self, seconds: int = 300) -> None:
        """Until both are, and so the agent delivers to a collector that takes."""
        for port in (COLLECTOR_PORT, AGENT_PORT):
            self.wait_page(port, seconds)

    def wait_page(self, port: int, seconds: int) -> None:
        """Until the daemon with this local port is ready."""
        self.wait(f"busybox wget -q -O - http://127.0.0.1:{port}/readyz 2>/dev/null | grep -qx ok", seconds)

    def wait_intervals(self, count: int) -> None:
        """Until the agent has committed this many more intervals, by its own metrics."""
        self.machine.run(f"python3 -Sc '{WAIT_INTERVALS}' {count}", seconds=300)

    def fetch(self, port: int, path: str) -> str:
        """A page of a local port, whatever its status."""
        return self.machine.run(f"python3 -Sc '{FETCH}' http://127.0.0.1:{port}{path}").output

    def metric(self, port: int, name: str) -> float:
        """A metric without labels."""
        lines = self.fetch(port, "/metrics").splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def reasons(self, port: int, path: str = "/readyz") -> dict[str, str]:
        """Why a daemon is not ready; empty if it is."""
        page = self.fetch(port, path)
        reasons: dict[str, str] = {} if page == "ok\n\n" else json.loads(page)["reasons"]
        return reasons

    def unit(self, part: str, *properties: str) -> dict[str, str]:
        """Properties of a part's unit."""
        wanted = " ".join(f"-p {name}" for name in properties)
        lines = self.machine.run(f"systemctl show weighbridge-{part} {wanted}").output.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def journal(self) -> str:
        return self.machine.run("journalctl -b --no-pager -n 100 -u 'weighbridge-*'", check=False).output
