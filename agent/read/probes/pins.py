"""A set of programs as it is pinned: find it, check it, keep it, notice when it is unloaded.

A set's maps live as long as somebody holds a descriptor of them. So a set that was unloaded under a reading agent is
still there to be read out once more; its counters then no longer move.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from agent.read.probes import records
from agent.read.probes.bpf import BpfError, Map
from agent.read.probes.records import About, Has, RawRow, Walk
from agent.read.probes.wake import Ring

LOAD = "run `weighbridge-probes load`"

_MAPS_OF = {
    Has.LIFECYCLE: ("births", "tombstones"),
    Has.NETWORK: ("network",),
    Has.SNAPSHOT: ("snapshot",),
}
_EMPTIED_BY_THE_AGENT = frozenset(("tombstones", "network"))


class State(Enum):
    """How the agent stands with the probes, as `/metrics`, `status` and `doctor` say it."""

    OFF = "off"
    """`read.probes` is off, or the units are not those of the v2 hierarchy."""
    ABSENT = "absent"
    UNREADABLE = "unreadable"
    FOREIGN = "foreign"
    """Something else is pinned where the set is expected."""
    WRONG_LAYOUT = "wrong_layout"
    """Programs of another version."""
    DETACHED = "detached"
    """Links were removed one by one: maps are there, and nobody counts."""
    READ_ONLY = "read_only"
    """Counting and read, but nothing may be deleted: the maps fill up."""
    ATTACHED = "attached"


class Refusal(NamedTuple):
    """Why there is no set to read, and what to do."""

    state: State
    text: str


class ProbeSet:
    """The maps of one load, open."""

    def __init__(self, directory: Path, about: About, maps: dict[str, Map], place: tuple[int, int]) -> None:
        self.directory = directory
        self.about = about
        self.has = Has(about.has)
        self.maps = maps
        self.may_delete = True
        self._about_at = place
        self._links = _links(directory)
        self.ring = _ring(directory) if Has.LIFECYCLE in self.has else None

    @property
    def load_id(self) -> int:
        return self.about.load_id

    def refresh(self) -> State:
        """Whether this set still counts. Takes up what an upgrade wrote into `about`."""
        try:
            if _place(self.directory / "about") != self._about_at:
                return State.ABSENT
            links = _links(self.directory)
            value = self.maps["about"].lookup(records.FIRST)
        except (FileNotFoundError, NotADirectoryError):
            return State.ABSENT
        except (OSError, BpfError):
            # What is open stays readable; whether it still counts cannot be told.
            return State.UNREADABLE
        fresh = records.about(value or bytes(self.maps["about"].value_size))
        if fresh.programs_boottime_ns != self.about.programs_boottime_ns:
            try:
                # The other engine's programs, or those that a newer kernel accepts, may keep more maps.
                self.may_delete &= _open_maps(self.maps, self.directory, Has(fresh.has))
            except (BpfError, _Foreign):
                return State.UNREADABLE
            self.about, self.has, self._links = fresh, Has(fresh.has), links
        if self._links - links:
            return State.DETACHED
        return State.ATTACHED if self.may_delete else State.READ_ONLY

    def rows(self) -> dict[int, RawRow] | None:
        """Every cgroup below the root, by id, as the programs see it now; None if that cannot be had."""
        snapshot = self.maps["snapshot"]
        try:
            with self._alone():
                self._walk()
                head = records.head(snapshot.lookup(records.FIRST) or b"")
                # Whoever is not in it must not be taken for gone.
                if head.sequence % 2 or head.missed:
                    return None
                elements = snapshot.first(records.elements_of(head.rows))
                # Whoever does not keep the lock may have had it written anew meanwhile.
                after = records.head(snapshot.lookup(records.FIRST) or b"")
                return records.rows(elements, head.rows) if after == head else None
        except (OSError, struct.error):
            return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One reader at a time has the snapshot written anew; BlockingIOError for another one."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(fd)

    def _walk(self) -> None:
        """Reading one byte of the pinned iterator has it run once."""
        fd = os.open(self.directory / "walk", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.read(fd, 1)
        finally:
            os.close(fd)

    def close(self) -> None:
        if self.ring is not None:
            self.ring.close()
        for found in self.maps.values():
            found.close()


def adopt(base: Path) -> ProbeSet | Refusal:
    """The set below the directory of pins, or why there is none."""
    directory = base / f"v{records.LAYOUT}"
    try:
        place = _place(directory / "about")
    except PermissionError:
        return _unreadable(base, directory)
    except OSError:
        return _absent(base, directory)
    opened: dict[str, Map] = {}
    try:
        about = _about(opened, directory)
        if isinstance(about, Refusal):
            return about
        may_delete = _open_maps(opened, directory, Has(about.has))
        found = ProbeSet(directory, about, opened, place)
    except PermissionError:
        _close(opened)
        return _unreadable(base, directory)
    except BpfError as error:
        _close(opened)
        # bpf(2) says EACCES to what is no BPF object, too.
        if error.number in (errno.EACCES, errno.EPERM) and not _readable(directory):
            return _unreadable(base, directory)
        if error.number == errno.ENOENT:
            return Refusal(State.FOREIGN, f"{error}: a part of the set is missing; {_reload(directory)}")
        return Refusal(State.FOREIGN, f"{error}; {_reload(directory)}")
    except _Foreign as error:
        _close(opened)
        return Refusal(State.FOREIGN, f"{error}; {_reload(directory)}")
    found.may_delete = may_delete
    return found


class _Foreign(Exception):
    """A pin is not what it is called."""


def _about(opened: dict[str, Map], directory: Path) -> About | Refusal:
    opened["about"] = _checked(Map(directory / "about"))
    value = opened["about"].lookup(records.FIRST)
    if value is None:
        raise _Foreign("the pin about holds nothing")
    about = records.about(value)
    if about.layout != records.LAYOUT:
        _close(opened)
        return Refusal(
            State.WRONG_LAYOUT,
            f"{directory} says layout {about.layout}, this agent reads {records.LAYOUT}: install agent and probes of"
            " one version, then run `weighbridge-probes upgrade`",
        )
    return about


def _open_maps(opened: dict[str, Map], directory: Path, has: Has) -> bool:
    """Open what the set has and is not open yet; whether the agent may empty what it is to empty."""
    may_delete = True
    for name in ("overflow", *(name for part, names in _MAPS_OF.items() if part in has for name in names)):
        if name in opened:
            continue
        try:
            found = Map(directory / name, writable=name in _EMPTIED_BY_THE_AGENT)
        except BpfError as error:
            if name not in _EMPTIED_BY_THE_AGENT or error.number not in (errno.EACCES, errno.EPERM):
                raise
            found = Map(directory / name)
            may_delete = False
        opened[name] = _checked(found)
    return may_delete


def _ring(directory: Path) -> Ring | None:
    """None where it cannot be read: it is a hint, and nothing depends on it."""
    try:
        found = Map(directory / "wake", writable=True)
    except BpfError:
        return None
    try:
        return Ring(found)
    except BpfError:
        return None
    finally:
        found.close()


def _checked(found: Map) -> Map:
    wanted = records.SIZES[found.name]
    if (found.key_size, found.value_size) != wanted:
        sizes = f"keys of {found.key_size} and values of {found.value_size} bytes, not {wanted[0]} and {wanted[1]}"
        found.close()
        raise _Foreign(f"the pin {found.name} has {sizes}")
    return found


def _close(opened: dict[str, Map]) -> None:
    for found in opened.values():
        with suppress(OSError):
            found.close()


def _place(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _links(directory: Path) -> frozenset[str]:
    """Without those that an upgrade is about to put in another's place."""
    return frozenset(
        name for name in os.listdir(directory) if name.startswith("link_") and not name.endswith("_new")
    )


def _absent(base: Path, directory: Path) -> Refusal:
    try:
        others = sorted(p.name for p in base.glob("v[0-9]*") if (p / "about").exists())
    except OSError:
        others = []
    if others:
        return Refusal(
            State.WRONG_LAYOUT,
            f"{base} has {', '.join(others)}, this agent reads v{records.LAYOUT}: install agent and probes of one"
            " version, then run `weighbridge-probes upgrade`",
        )
    if directory.exists():
        return Refusal(State.ABSENT, f"{directory} is not ready (no `about`): {LOAD}")
    return Refusal(State.ABSENT, f"no probes are loaded in {base}: {LOAD}")


def _readable(directory: Path) -> bool:
    try:
        names = [name for name in os.listdir(directory) if not name.startswith("link_")]
    except OSError:
        return False
    return all(os.access(directory / name, os.R_OK) for name in names)


def _unreadable(base: Path, directory: Path) -> Refusal:
    for place in (directory / "about", directory, base):
        with suppress(OSError):
            group = place.stat().st_gid
            with suppress(KeyError):
                group_name = grp.getgrgid(group).gr_name
                return Refusal(
                    State.UNREADABLE,
                    f"{directory} may not be read by uid {os.geteuid()}: add the agent's user to the group"
                    f" {group_name}, or load the probes for its group",
                )
    return Refusal(
        State.UNREADABLE, f"{directory} may not be read by uid {os.geteuid()}: load the probes for its group"
    )


def _reload(directory: Path) -> str:
    return f"run `weighbridge-probes unload`, clear {directory}, {LOAD}"


def engine_name(walk: int) -> str:
    """How the snapshot is taken, in a word."""
    return Walk(walk).name.lower() if walk in Walk._value2member_map_ else f"unknown ({walk})"
