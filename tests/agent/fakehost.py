"""A cgroup tree and /proc of plain files, to be any host: v2, v1 or hybrid, with or without a field."""

from __future__ import annotations

import shutil
from pathlib import Path

BOOT = "11111111-aaaa-4aaa-8aaa-111111111111"
CONTAINER = "/system.slice/docker-" + "ab" * 32 + ".scope"


class FakeHost:
    """Pure v2 unless `v1` is given."""

    def __init__(self, directory: Path, v1: bool = False) -> None:
        self.cgroup_root = directory / "cgroup"
        self.proc_root = directory / "proc"
        self.v1 = v1
        (self.proc_root / "sys/kernel/random").mkdir(parents=True)
        self.boot(BOOT)
        self.proc("stat", "cpu 0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\n")
        if v1:
            for controller in ("cpuacct", "cpu", "memory", "blkio", "pids"):
                (self.cgroup_root / controller).mkdir(parents=True)
        else:
            self.cgroup_root.mkdir(parents=True)
            (self.cgroup_root / "cgroup.controllers").write_text("cpu io memory pids\n")
            self.cpu("/", 0)

    def boot(self, boot_id: str) -> None:
        self.proc("sys/kernel/random/boot_id", f"{boot_id}\n")

    def proc(self, name: str, text: str) -> None:
        (self.proc_root / name).write_text(text)

    def write(self, path: str, name: str, text: str, controller: str = "") -> None:
        directory = self.cgroup_root / controller / path.lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)

    def cpu(self, path: str, usage_us: int, **more: int) -> None:
        """usage_usec and its split (all user), other keys of cpu.stat beside it."""
        keys = {"usage_usec": usage_us, "user_usec": usage_us, "system_usec": 0, **more}
        self.write(path, "cpu.stat", "".join(f"{k} {v}\n" for k, v in keys.items()))

    def memory(self, path: str, current: int, inactive_file: int = 0) -> None:
        self.write(path, "memory.current", f"{current}\n")
        self.write(path, "memory.stat", f"anon 0\ninactive_file {inactive_file}\n")

    def remove(self, path: str) -> None:
        shutil.rmtree(self.cgroup_root / path.lstrip("/"))
