"""Host totals from /proc."""

from __future__ import annotations

import os
from pathlib import Path


def boot_id(proc_root: Path) -> str:
    """The kernel's id of this boot, a UUID; "unknown" where it cannot be read."""
    try:
        return (proc_root / "sys/kernel/random/boot_id").read_text().strip() or "unknown"
    except OSError:
        return "unknown"


def cpu_total_ns(proc_root: Path) -> int | None:
    """CPU time of the whole host without idle, iowait, steal and (counted in user already) guest.

    /proc/stat counts in clock ticks (proc_stat(5)), so this is the coarsest of the root's sources.
    """
    try:
        with open(proc_root / "stat", "rb") as file:
            words = file.readline().split()
    except OSError:
        return None
    if len(words) < 8 or words[0] != b"cpu" or not all(word.isdigit() for word in words[1:8]):
        return None
    user, nice, system, _idle, _iowait, irq, softirq = (int(word) for word in words[1:8])
    return (user + nice + system + irq + softirq) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))
