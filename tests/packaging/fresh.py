"""A machine's file system for an installation: this machine's own, with a layer over it that takes every change.

Each run is in namespaces of its own, which end with it, and so do its processes: nothing is ever mounted or changed on this
machine. There is no network but a loopback.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ENTER = """
set -e
ip link set lo up
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/changes,workdir=$1/work" "$1/root"
mount --rbind /proc "$1/root/proc"
mount --rbind /sys "$1/root/sys"
mount --rbind /dev "$1/root/dev"
mount --bind "$1/run" "$1/root/run"
mount --bind "$1/shared" "$1/root/mnt"
cd "$1/root"
exec chroot . /bin/bash -euo pipefail -c "$2"
"""


class Fresh:
    """`shared` is /mnt in there. /run is empty, so no systemd runs as far as anybody can see."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("changes", "work", "root", "run", "shared"):
            (directory / name).mkdir(parents=True)
        self.shared = directory / "shared"
        self.run_directory = directory / "run"

    def give(self, *files: Path) -> None:
        for file in files:
            shutil.copy(file, self.shared)

    def run(self, script: str, seconds: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "bash",
            "-c",
            ENTER,
            "enter",
        ]
        done = subprocess.run(
            [*command, str(self.directory), script], capture_output=True, text=True, timeout=seconds
        )
        assert not check or done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done
