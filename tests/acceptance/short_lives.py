"""bench/short_lives.c in a machine: cgroups of a few milliseconds, and what the kernel said of each before its removal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.acceptance.machines.machine import Machine

DIRECTORY = "/sys/fs/cgroup/wb-test"
PROGRAM = "/opt/short_lives"
WORKERS = 2


class ShortLives:
    def __init__(self, machine: Machine, program: Path) -> None:
        self.used_ns: dict[int, int] = {}
        """Cgroup id -> CPU time of cpu.stat just before the removal."""
        self._machine = machine
        self._made = 0
        machine.put(program, PROGRAM)
        machine.run(f"mkdir {DIRECTORY}")

    def live(self, count: int) -> None:
        """So many cgroups come and go."""
        self._keep(self._machine.run(self._command(count)).output)

    @contextmanager
    def meanwhile(self, count: int, seconds: int = 300) -> Iterator[None]:
        """They come and go beside what is done within; then those still to come are waited for."""
        file = f"/var/tmp/lives-{self._made}"
        command = f"{self._command(count)} >{file}.part && mv {file}.part {file}"
        self._machine.run(f'systemd-run --quiet --collect sh -c "{command}"')
        yield
        self._machine.run(f"until [ -e {file} ]; do sleep 0.3; done", seconds=seconds)
        self._keep(self._machine.read(file))

    def _command(self, count: int) -> str:
        first, self._made = self._made, self._made + count
        return f"{PROGRAM} {DIRECTORY} {first} {count} {WORKERS}"

    def _keep(self, said: str) -> None:
        for cgroup_id, usage_us in (map(int, line.split()) for line in said.splitlines()):
            assert cgroup_id not in self.used_ns
            self.used_ns[cgroup_id] = usage_us * 1_000
