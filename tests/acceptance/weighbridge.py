"""This checkout, put into a machine the way the operator guide puts it on a host.

Locked wheels and our own are unpacked on the host (pip in an emulated machine would take minutes) into the tree
that the machine gets as /usr/lib/weighbridge. Units and users are the operator guide's own text.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.acceptance.machines.cache import Cache, build_step, key_of
from tests.acceptance.machines.machine import Machine

ROOT = Path(__file__).parent.parent.parent
GUIDE = ROOT / "docs/operator-guide.md"
REQUIREMENTS = (ROOT / "requirements/agent.txt", ROOT / "requirements/collector.txt")
HOME = "/usr/lib/weighbridge"
GUEST_PYTHON = "3.11"
GLIBC_OF_DEBIAN_12 = 36
PARTS = ("agent", "collector")
WAIT_INTERVALS = """
import sys, time, urllib.request
def committed():
    page = urllib.request.urlopen("http://127.0.0.1:9465/metrics", timeout=30).read().decode()
    return next(float(line.split()[1]) for line in page.splitlines() if line.startswith("weighbridge_agent_intervals_total "))
wanted = committed() + int(sys.argv[1])
while committed() < wanted: time.sleep(0.5)
"""


class Weighbridge:
    """Agent and collector of this checkout in one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def install(self) -> None:
        """Programs, users, state directories and units, as the guide says; nothing runs yet."""
        with tempfile.TemporaryDirectory() as scratch:
            tree = Path(scratch, "weighbridge")
            _unpack(tree)
            self.machine.put(tree, HOME)
            for part in PARTS:
                unit = Path(scratch, f"weighbridge-{part}.service")
                unit.write_text(_unit(part))
                self.machine.put(unit, f"/etc/systemd/system/{unit.name}")
        for part in PARTS:
            user, state = _user(part), _state(part)
            self.machine.run(
                f"useradd --system --home-dir {state} --shell /usr/sbin/nologin {user}\n"
                f"install -d -o {user} -g {user} -m 0750 {state}\n"
                f"ln -s {HOME}/bin/weighbridge-{part} /usr/bin/\n"
                "systemctl daemon-reload"
            )

    def configure(self, part: str, settings: Mapping[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, f"{part}.yaml")
            file.write_text(yaml.safe_dump(dict(settings)))
            self.machine.put(file, f"/etc/weighbridge/{part}.yaml")

    def command(self, part: str, words: str) -> str:
        """One command of `agent` or `collector` as the user that runs the daemon."""
        return self.machine.run(f"runuser -u {_user(part)} -- weighbridge-{part} {words}").output

    def start(self) -> None:
        """A CA, the collector, one enrolment, the agent; returns when the agent meters."""
        self.command("collector", "ca init --domain example.org --host 127.0.0.1")
        self.machine.run("systemctl start weighbridge-collector")
        self.wait(f"[ -e {_state('collector')}/endpoints.json ]")
        token = self.command("collector", "token create").strip()
        self.command("agent", f"enroll {token}")
        self.machine.run("systemctl start weighbridge-agent")
        self.wait("journalctl -q -u weighbridge-agent | grep -q metering_begun")

    def wait(self, condition: str, seconds: int = 120) -> None:
        """Until a shell condition holds."""
        done = self.machine.run(f"until {condition}; do sleep 0.3; done", seconds=seconds, check=False)
        if done.code != 0:
            raise TimeoutError(f"not so after {seconds} s: {condition}\n{done.errors}\n{self.journal()}")

    def wait_intervals(self, count: int) -> None:
        """Until the agent has committed this many more intervals, by its own metrics."""
        self.machine.run(f"python3 -Sc '{WAIT_INTERVALS}' {count}")

    def journal(self) -> str:
        return self.machine.run("journalctl -b --no-pager -n 100 -u 'weighbridge-*'", check=False).output


def _user(part: str) -> str:
    return "weighbridge" if part == "agent" else "weighbridge-collector"


def _state(part: str) -> str:
    return f"/var/lib/{_user(part)}"


def _unit(part: str) -> str:
    """The guide's unit of the agent; the collector's differs in what the guide says it differs in."""
    block = re.search(
        r"```ini\n(# /etc/systemd/system/weighbridge-agent\.service\n.*?)```", GUIDE.read_text(), re.DOTALL
    )
    assert block, "the operator guide has lost its unit"
    unit = block[1]
    if part == "collector":
        unit = unit.replace("weighbridge-agent", "weighbridge-collector").replace(" agent\n", " collector\n")
        unit = re.sub(
            r"^(User|StateDirectory|RuntimeDirectory)=weighbridge$",
            r"\1=weighbridge-collector",
            unit,
            flags=re.MULTILINE,
        )
    return unit


def _unpack(tree: Path) -> None:
    """Locked wheels from the cache, our own wheel built now, and the two commands."""
    cache = Cache()
    key = key_of(GUEST_PYTHON, *REQUIREMENTS)
    with cache.entry("wheels", key, _locked_wheels) as locked:
        shutil.copytree(locked, tree)
    site = tree / "site"
    with tempfile.TemporaryDirectory() as dist:
        build_step([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist])
        (wheel,) = Path(dist).glob("*.whl")
        build_step([*_pip(site), "--no-deps", wheel])
    (tree / "bin").mkdir()
    for part in PARTS:
        command = tree / "bin" / f"weighbridge-{part}"
        command.write_text(f'#!/bin/sh\nPYTHONPATH={HOME}/site exec python{GUEST_PYTHON} -m {part} "$@"\n')
        command.chmod(0o755)


def _locked_wheels(directory: Path) -> None:
    requirements = [word for file in REQUIREMENTS for word in ("-r", file)]
    build_step([*_pip(directory / "site"), "--require-hashes", *requirements])


def _pip(target: Path) -> list[str | Path]:
    """pip install into a directory for the machine's Python, whatever this host's is."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(GLIBC_OF_DEBIAN_12, 16, -1)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
    ]
    return [
        *command,
        *platforms,
        f"--python-version={GUEST_PYTHON}",
        "--implementation=cp",
        "--target",
        target,
    ]
