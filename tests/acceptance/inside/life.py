"""life.py CGROUP MEMORY_MAX COMMAND: a shell command's life in a cgroup made for it. Killed for memory, it is killed as a whole.

Prints as JSON what the files of the cgroup said just before it was removed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

SETTLED_SECONDS = 0.05
AT_MOST_SECONDS = 60


def keyed(file: Path, key: str) -> int:
    return next(int(value) for name, value in map(str.split, file.read_text().splitlines()) if name == key)


def main(cgroup: Path, memory_max: str, command: str) -> None:
    cgroup.mkdir()
    for name, value in (("memory.max", memory_max), ("memory.oom.group", "1")):
        (cgroup / name).write_text(value)
    enter = f'echo $$ >"{cgroup}/cgroup.procs"; {command}'
    subprocess.run(["/bin/sh", "-c", enter], stderr=subprocess.DEVNULL, check=False)
    deadline = time.monotonic() + AT_MOST_SECONDS
    before: dict[str, int] = {}
    while True:
        said = {
            "cgroup_id": cgroup.stat().st_ino,
            "populated": keyed(cgroup / "cgroup.events", "populated"),
            "cpu_usage_ns": keyed(cgroup / "cpu.stat", "usage_usec") * 1_000,
            "memory_peak_bytes": int((cgroup / "memory.peak").read_text()),
            "oom_kills": keyed(cgroup / "memory.events", "oom_kill"),
        }
        # What a task used for its own exit is counted after its parent heard of it.
        if said == before and not said["populated"]:
            break
        if time.monotonic() > deadline:
            raise SystemExit(f"{cgroup} does not settle: {said}")
        before = said
        time.sleep(SETTLED_SECONDS)
    cgroup.rmdir()
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
