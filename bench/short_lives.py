"""Containers too short to sample: the program of short_lives.c, and what the kernel's own file said of each of its cgroups."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.cgroups import Cgroup

_SOURCE = Path(__file__).with_suffix(".c")


def build(directory: Path) -> Path:
    """Compile it into `directory`."""
    program = directory / "short_lives"
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-o", program, _SOURCE], check=True)
    return program


def start(program: Path, parent: Cgroup, first: int, count: int, workers: int = 1) -> subprocess.Popen[str]:
    """`count` cgroups in `parent`, named by numbers from `first` on, `workers` at a time."""
    command = [str(program), str(parent.path), str(first), str(count), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def usage_ns(process: subprocess.Popen[str], timeout: float = 600) -> dict[int, int]:
    """Wait for the end; cgroup id -> usage of cpu.stat just before the removal."""
    out, _ = process.communicate(timeout=timeout)
    if process.returncode:
        raise RuntimeError(f"short_lives ended with {process.returncode}")
    lives = [line.split() for line in out.splitlines()]
    usage = {int(cgroup_id): int(us) * 1_000 for cgroup_id, us in lives}
    if len(usage) != len(lives):
        raise RuntimeError("a cgroup id came twice")
    return usage
