"""What the kernel's files say of a cgroup in a machine, read by `grep` and parsed here: not by the agent's readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.acceptance.machines.machine import Machine

FILES = "cpu.stat memory.current memory.peak memory.events io.stat pids.peak"


@dataclass(frozen=True, slots=True)
class Figures:
    """The files of one cgroup, by name and line."""

    cgroup_id: int
    files: dict[str, list[str]] = field(default_factory=dict)

    def number(self, file: str) -> int:
        return int(self.files[file][0])

    def keyed(self, file: str, key: str) -> int:
        return next(int(value) for name, value in map(str.split, self.files[file]) if name == key)

    def devices(self, key: str) -> int:
        """A key of io.stat over all devices. The file is empty until there is block I/O."""
        pairs = [word.split("=") for line in self.files.get("io.stat", []) for word in line.split()[1:]]
        return sum(int(value) for name, value in pairs if name == key)

    def measures(self) -> dict[str, int]:
        """By the names under which they are delivered."""
        return {
            "cpu_usage_ns": self.keyed("cpu.stat", "usage_usec") * 1_000,
            "cpu_periods": self.keyed("cpu.stat", "nr_periods"),
            "cpu_throttled_periods": self.keyed("cpu.stat", "nr_throttled"),
            "cpu_throttled_ns": self.keyed("cpu.stat", "throttled_usec") * 1_000,
            "oom_kills": self.keyed("memory.events", "oom_kill"),
            "memory_peak_bytes": self.number("memory.peak"),
            "pids_peak": self.number("pids.peak"),
            "io_read_bytes": self.devices("rbytes"),
            "io_write_bytes": self.devices("wbytes"),
            "io_read_ops": self.devices("rios"),
            "io_write_ops": self.devices("wios"),
        }


def figures(machine: Machine, cgroups: Mapping[str, str]) -> dict[str, Figures]:
    """One pass over cgroups (name -> path below the hierarchy); a cgroup that is not there has no entry."""
    found: dict[str, Figures] = {}
    names = {path: name for name, path in cgroups.items()}
    paths = " ".join(f"'{path}'" for path in names)
    # Every line as cgroup:file:text; an empty file has none, which `grep` calls a failure.
    script = (
        f"for g in {paths}; do [ -d /sys/fs/cgroup$g ] && cd /sys/fs/cgroup$g || continue\n"
        f'{{ stat -c id:%i . ; grep -H "" {FILES} || :; }} | sed "s|^|$g:|"; done'
    )
    for line in machine.run(script).output.splitlines():
        path, file, text = line.split(":", 2)
        if file == "id":
            found[names[path]] = Figures(int(text))
        else:
            found[names[path]].files.setdefault(file, []).append(text)
    return found
