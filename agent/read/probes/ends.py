"""Tombstones and traffic -> ends of units and traffic of units.

Order. The caller has walked the living units before; then tombstones are read, then traffic. So a unit that the walk missed
because it ended is among the tombstones, and the traffic of one that is released is final. A cgroup is removed
from the tree a moment before its tombstone is written, both under cgroup_mutex: a unit that is in neither is
therefore looked for again before it is taken for lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.meter.model import End, Network
from agent.read.probes.as_files import last_reading
from agent.read.probes.reader import Probes
from agent.read.probes.records import PARENT_ID, Knows, RawRow, Tombstone
from agent.read.probes.units import UnitPaths

ROOT_ID = 1
LOOK_AGAIN_TIMES, LOOK_AGAIN_SECONDS = 5, 0.01


@dataclass(slots=True)
class Seen:
    """What the probes told at one reading."""

    ends: list[End] = field(default_factory=list)
    networks: list[Network] = field(default_factory=list)
    forgettable: list[int] = field(default_factory=list)
    """Cgroups that are no units and will not come back: to be deleted once their traffic is durable."""


class Ends:
    """One per reader; remembers from one reading to the next which traffic has no owner."""

    def __init__(self, probes: Probes, units: UnitPaths) -> None:
        self._probes = probes
        self._paths = units
        self._ownerless: set[int] = set()

    def read(
        self,
        living: Mapping[int, str],
        known: frozenset[int],
        rows: Mapping[int, RawRow] | None,
        complete: bool,
    ) -> Seen:
        """`living`: units by id, with their paths. `known`: units of the baseline. `rows`: the walk. `complete`: a
        known unit that is not living has ended.
        """
        round_ = _Round(self._probes, self._paths, living, known, rows)
        round_.read_tombstones()
        if complete and self._probes.watches_ends:
            round_.look_again(known - living.keys())
        round_.read_traffic(self._ownerless)
        self._ownerless = round_.ownerless
        return round_.seen


class _Round:
    def __init__(
        self,
        probes: Probes,
        paths: UnitPaths,
        living: Mapping[int, str],
        known: frozenset[int],
        rows: Mapping[int, RawRow] | None,
    ) -> None:
        self.seen = Seen()
        self.ownerless: set[int] = set()
        self._probes, self._paths, self._living, self._known, self._rows = probes, paths, living, known, rows
        self._by_path: dict[str, int] | None = None
        self._buried: dict[int, Tombstone] = {}
        self._ended: set[int] = set()

    def read_tombstones(self) -> None:
        loads = {}
        for load_id, tombstone in self._probes.tombstones():
            self._buried[tombstone.cgroup_id] = tombstone
            loads[tombstone.cgroup_id] = load_id
        for cgroup_id, tombstone in self._buried.items():
            if self._is_unit(tombstone):
                self._add(tombstone, loads[cgroup_id])

    def _add(self, tombstone: Tombstone, load_id: int) -> None:
        enclosing_id = self._unit_around(tombstone.parent_id, tombstone.path)
        self._ended.add(tombstone.cgroup_id)
        self.seen.ends.append(
            End(
                last_reading(tombstone, enclosing_id),
                tombstone.born_boottime_ns,
                tombstone.removed_boottime_ns,
                tombstone.released_boottime_ns != 0,
                load_id,
                tombstone.removal_seen,
            )
        )

    def look_again(self, missing: frozenset[int]) -> None:
        """For the tombstones of units that left the tree just now."""
        wanted = missing - self._ended
        about = self._probes.about
        for _ in range(LOOK_AGAIN_TIMES):
            if not wanted or about is None:
                return
            time.sleep(LOOK_AGAIN_SECONDS)
            for cgroup_id in sorted(wanted):
                tombstone = self._probes.tombstone(cgroup_id)
                if tombstone is not None:
                    wanted -= {cgroup_id}
                    self._buried[cgroup_id] = tombstone
                    self._add(tombstone, about.load_id)

    def read_traffic(self, ownerless_before: set[int]) -> None:
        for counted in self._probes.networks():
            entries: list[tuple[int, int | None, tuple[int, ...]]] = []
            for cgroup_id, counters in counted.entries:
                if cgroup_id == ROOT_ID or cgroup_id in self._living or cgroup_id in self._ended:
                    entries.append((cgroup_id, cgroup_id, counters))
                    continue
                unit_id = self._owner(cgroup_id, ownerless_before)
                entries.append((cgroup_id, unit_id, counters))
            self.seen.networks.append(Network(counted.load_id, entries, counted.unloaded))
        self.seen.forgettable += [
            cgroup_id
            for cgroup_id, tombstone in self._buried.items()
            if tombstone.released_boottime_ns and cgroup_id not in self._ended
        ]

    def _owner(self, cgroup_id: int, ownerless_before: set[int]) -> int | None:
        """The unit of this reading that a cgroup's traffic belongs to, the root's id if there is none, None if
        it has yet to come.
        """
        place = self._place(cgroup_id)
        if place is None:
            # Neither living, nor dead, nor born: the maps had no room for it. It is dead if the walk saw all.
            self.ownerless.add(cgroup_id)
            if cgroup_id in ownerless_before and self._rows is not None:
                self.seen.forgettable.append(cgroup_id)
            return ROOT_ID
        parent_id, path = place
        unit_id = cgroup_id if path and self._paths.is_unit(path) else self._unit_around(parent_id, path)
        if unit_id == ROOT_ID or unit_id in self._living or unit_id in self._ended:
            return unit_id
        buried = self._buried.get(cgroup_id)
        if buried is not None and buried.released_boottime_ns:
            # Its unit has had its last row.
            return ROOT_ID
        return None

    def _is_unit(self, tombstone: Tombstone) -> bool:
        if tombstone.cgroup_id in self._living or tombstone.cgroup_id in self._known:
            return True
        # Whose name is cut is nobody: it is counted with what it lies in.
        return not tombstone.flags & Knows.PATH_CUT and self._paths.is_unit(tombstone.path)

    def _unit_around(self, parent_id: int, path: str) -> int:
        """Parents never change, so climbing them finds the right incarnation; where a parent is unknown (0, or it
        was there before the probes, and there is no walk) its path must do.
        """
        while parent_id > ROOT_ID:
            if parent_id in self._living or parent_id in self._ended:
                return parent_id
            place = self._place(parent_id)
            if place is None:
                break
            above, its_path = place
            if its_path and self._paths.is_unit(its_path):
                return parent_id
            parent_id = above
        if parent_id == ROOT_ID or not path:
            return ROOT_ID
        if self._by_path is None:
            self._by_path = {path: cgroup_id for cgroup_id, path in self._living.items()}
        return self._by_path.get(self._paths.around(path), ROOT_ID)

    def _place(self, cgroup_id: int) -> tuple[int, str] | None:
        """(id of the parent, path or "" where nobody knows it)."""
        buried = self._buried.get(cgroup_id)
        if buried is not None:
            return buried.parent_id, buried.path
        if self._rows is not None and (row := self._rows.get(cgroup_id)) is not None:
            return row[PARENT_ID], ""
        birth = self._probes.birth(cgroup_id)
        if birth is not None:
            return birth.parent_id, "" if birth.flags & Knows.PATH_CUT else birth.path
        # Released since the tombstones were read: births are deleted after the tombstone was written.
        late = self._probes.tombstone(cgroup_id)
        return (late.parent_id, late.path) if late is not None else None
