"""The kernel probes of this checkout in a machine.

    with Probes(machine) as probes:         # puts bpf/build/ into the machine
        probes.command("load")
        ...                                 # tests; bpftool is there too
    # unloaded, and no program or pin of ours is left

`./dev setup` builds bpf/build/. BTF is in /sys/kernel/btf/vmlinux of the machine, bpffs on /sys/fs/bpf.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.acceptance.machines.machine import Machine

BUILT = Path(__file__).parent.parent.parent / "bpf/build"
IN_MACHINE = "/usr/lib/weighbridge/bpf"
LOADER = f"{IN_MACHINE}/weighbridge-probes"
PINS = "/run/weighbridge/bpf"


class Probes:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __enter__(self) -> Self:
        self.machine.put(BUILT, IN_MACHINE)
        self.machine.run("getent group weighbridge >/dev/null || groupadd --system weighbridge")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.command("unload")
        if kind is None:
            assert self.programs() == [], "unload left programs behind"
            assert self.machine.run(f"find {PINS} -mindepth 1").output == "", "unload left pins behind"

    def command(self, words: str) -> str:
        """One command of the loader, as root."""
        return self.machine.run(f"{LOADER} {words}").output

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.command("status --json"))
        return status

    def programs(self) -> list[str]:
        """Names of the programs in the kernel that are neither systemd's nor a container's filter of devices."""
        listed = json.loads(self.machine.run("bpftool --json prog show").output)
        names = (program.get("name", "") for program in listed if program["type"] != "cgroup_device")
        return sorted(name for name in names if not name.startswith("sd_"))
