"""The cgroups that live, by path: what a tracepoint cannot say of what was there before it was listened to."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import kernel
import records


def ids_by_path(root: Path) -> dict[bytes, int]:
    """Every cgroup below the mount point `root`, the root itself included as /. Its inode number is its id."""
    found = {b"/": root.stat().st_ino}
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        # It may be gone by now.
        with contextlib.suppress(FileNotFoundError), os.scandir(os.fsencode(root) + path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below = path + b"/" + entry.name
                    found[below] = entry.inode()
                    waiting.append(below)
    return found


def enter(maps: Mapping[str, kernel.Map], living: Mapping[bytes, int]) -> None:
    """What the programs have entered meanwhile stays: it is newer."""
    for path, cgroup_id in living.items():
        key = records.path_key(path)
        level = 0 if path == b"/" else path.count(b"/")
        if key is None:
            continue
        try:
            maps["paths"].update(key, records.place(cgroup_id, level), kernel.NOEXIST)
        except FileExistsError:
            continue
        except OSError:
            # Full: parents of some cgroups will not be known, which their records say.
            return


def name_parents(maps: Mapping[str, kernel.Map], living: Mapping[bytes, int]) -> None:
    """Of cgroups born after the programs began and before their parent was entered."""
    for key in maps["births"].all_keys():
        value = maps["births"].lookup(key)
        if value is None:
            continue
        birth = records.Birth.parse(value)
        parent_id = living.get(os.path.dirname(birth.path.split(b"\0")[0]))
        if birth.parent_id == 0 and not birth.flags & records.PATH_CUT and parent_id is not None:
            with contextlib.suppress(FileNotFoundError):
                maps["births"].update(key, birth._replace(parent_id=parent_id).pack(), kernel.EXIST)


def forget_paths(maps: Mapping[str, kernel.Map]) -> None:
    """While no program keeps them they grow old."""
    for key in list(maps["paths"].all_keys()):
        maps["paths"].delete(key)


def close_missed(maps: Mapping[str, kernel.Map], since_boottime_ns: int, living: Mapping[bytes, int]) -> int:
    """End what was born before `since`, when nobody listened, and lives no more. How many.

    Had its rmdir been seen and its release not, it is released now: nobody would ever say so again.
    """
    alive = set(living.values())
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    ended = 0
    for key in list(maps["births"].all_keys()):
        value = maps["births"].lookup(key)
        if value is None or records.id_of(key) in alive:
            continue
        birth = records.Birth.parse(value)
        tombstone = maps["tombstones"].lookup(key)
        removed = records.removed_boottime_ns(tombstone) if tombstone else 0
        if birth.born_boottime_ns >= since_boottime_ns or removed >= since_boottime_ns:
            continue
        late = records.released(tombstone, now) if tombstone else records.late_tombstone(birth, now)
        try:
            maps["tombstones"].update(key, late)
        except OSError:
            # Full: the birth stays, and the next start tries again.
            continue
        maps["births"].delete(key)
        ended += 1
    return ended
