"""The probes as a reading meets them: adopted, read out, unloaded and loaded again under the agent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from agent.meter.model import ProbeMark
from agent.read.probes import records
from agent.read.probes.bpf import BpfError, Map, possible_cpus
from agent.read.probes.pins import ProbeSet, Refusal, State, adopt, engine_name
from agent.read.probes.records import Birth, Has, Overflow, RawRow, Tombstone
from wire.daemon.journal import Journal

log = Journal("agent.probes")

_COUNTED = ("births", "tombstones", "network")


class Counted(NamedTuple):
    """The network map of one set."""

    load_id: int
    unloaded: bool
    entries: list[tuple[int, tuple[int, ...]]]


class Probes:
    """Not thread-safe; one owner. Call `look` first at each reading and `settle` last.

    A BpfError out of a reading method means that the kernel refuses what it allowed before: `drop` then.
    """

    def __init__(self, base: Path | None, why_off: str = "`read.probes` is off") -> None:
        self._base = base
        self._set: ProbeSet | None = None
        self._left: list[ProbeSet] = []
        self._shown: frozenset[bytes] = frozenset()
        self.standing = Refusal(State.OFF, why_off)
        self.overflow = Overflow()
        self.sizes: dict[str, tuple[int, int]] = {}
        """Map -> elements at the last reading, elements at most."""

    @property
    def without(self) -> str:
        """Why the units' ends and traffic are not seen, and what to do; empty if they are."""
        return "" if self.standing.state in _COUNTING else self.standing.text

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the attached set does not see, because the kernel refused the programs for it."""
        has = self._set.has if self._set is not None else Has(0)
        seen = {Has.LIFECYCLE: "ends of containers", Has.NETWORK: "network traffic"}
        return tuple(text for part, text in seen.items() if part not in has)

    @property
    def walk(self) -> str:
        """How the snapshot is taken."""
        return engine_name(self._set.about.walk) if self._set is not None else "none"

    @property
    def version(self) -> str:
        return self._set.about.version if self._set is not None else ""

    @property
    def about(self) -> records.About | None:
        return self._set.about if self._set is not None else None

    def look(self) -> None:
        """Adopt a set that is there, notice that one is gone."""
        if self._base is None:
            return
        before = self.standing
        if self._set is not None:
            state = self._set.refresh()
            if state is State.ABSENT:
                self._left.append(self._set)
                self._set = None
            else:
                self.standing = Refusal(state, _TEXTS[state])
        if self._set is None:
            found = adopt(self._base)
            if isinstance(found, ProbeSet):
                self._set = found
                state = found.refresh()
                self.standing = Refusal(state, _TEXTS.get(state, "unloaded while it was adopted"))
            else:
                self.standing = found
                self.sizes = {}
        if self.standing.state is not before.state:
            self._say(before.state)

    def rows(self) -> dict[int, RawRow] | None:
        """The snapshot by cgroup id, or None where files must be read."""
        if self._set is None or Has.SNAPSHOT not in self._set.has:
            return None
        return self._set.rows()

    @property
    def flushes_by_itself(self) -> bool:
        """False: somebody must read each top-level cpu.stat before the snapshot is taken."""
        return self._set is None or self._set.about.walk != records.Walk.TABLE

    @property
    def watches_ends(self) -> bool:
        return self._set is not None and Has.LIFECYCLE in self._set.has and self.standing.state in _COUNTING

    def birth(self, cgroup_id: int) -> Birth | None:
        for found in self._maps("births"):
            value = found.lookup(records.key(cgroup_id))
            if value is not None:
                return records.birth(value)
        return None

    def newborn(self) -> list[str]:
        """Paths of cgroups that were born since the last time, as far as they still live."""
        if self._set is None or self._set.ring is None:
            return []
        births = [self.birth(cgroup_id) for cgroup_id in self._set.ring.take()]
        return [birth.path for birth in births if birth is not None]

    def tombstone(self, cgroup_id: int) -> Tombstone | None:
        key = records.key(cgroup_id)
        for found in self._maps("tombstones"):
            value = found.lookup(key)
            if value is not None:
                return next(records.tombstones(memoryview(key), memoryview(value)))
        return None

    def tombstones(self) -> Iterator[tuple[int, Tombstone]]:
        """(load_id of the set, tombstone), sets that were unloaded first."""
        for probe_set in self._sets():
            found = probe_set.maps.get("tombstones")
            count = 0
            for keys, values in found.chunks() if found is not None else ():
                for tombstone in records.tombstones(keys, values):
                    count += 1
                    yield probe_set.load_id, tombstone
            if found is not None:
                self.sizes["tombstones"] = (count, found.max_entries)

    def networks(self) -> list[Counted]:
        """Traffic by cgroup, sets that were unloaded first."""
        out = []
        for probe_set in self._sets():
            found = probe_set.maps.get("network")
            if found is None:
                continue
            entries = [
                entry
                for keys, values in found.chunks()
                for entry in records.network(keys, values, possible_cpus())
            ]
            self.sizes["network"] = (len(entries), found.max_entries)
            out.append(Counted(probe_set.load_id, probe_set is not self._set, entries))
        return out

    def marks(self) -> tuple[ProbeMark | None, list[ProbeMark]]:
        """What is there now, and what was unloaded since the last reading."""
        marks = {}
        for probe_set in self._sets():
            value = probe_set.maps["overflow"].lookup(records.FIRST)
            lost = records.overflow(value) if value is not None else Overflow()
            counting = probe_set is self._set and self.standing.state in _COUNTING
            marks[probe_set] = ProbeMark(
                probe_set.load_id,
                counting and Has.LIFECYCLE in probe_set.has,
                counting and Has.NETWORK in probe_set.has,
                {kind: count for kind, count in lost._asdict().items() if count},
            )
            self.overflow = lost
        now = marks.pop(self._set, None) if self._set is not None else None
        return now, list(marks.values())

    def forget(self, cgroup_ids: Iterable[int]) -> int:
        """Delete what was billed durably; how many ends were there. Traffic goes first: an end that is still shown
        has it deleted again.
        """
        if self._set is None or self.standing.state is not State.ATTACHED:
            return 0
        keys = [records.key(cgroup_id) for cgroup_id in cgroup_ids]
        deleted = 0
        for name in ("network", "tombstones"):
            found = self._set.maps.get(name)
            if found is not None and keys:
                deleted = found.delete(keys)
        return deleted

    def settle(self) -> None:
        """The sets that were unloaded have been read out: let them go."""
        for probe_set in self._left:
            probe_set.close()
        self._left = []

    def drop(self, error: BpfError) -> None:
        """Give everything back and begin anew at the next reading."""
        log.error("probes_unreadable", error=str(error))
        self.close()
        self.standing = Refusal(State.UNREADABLE, str(error))

    def close(self) -> None:
        self.settle()
        if self._set is not None:
            self._set.close()
            self._set = None

    def _sets(self) -> list[ProbeSet]:
        return [*self._left, *([self._set] if self._set is not None else [])]

    def _maps(self, name: str) -> Iterator[Map]:
        for probe_set in reversed(self._sets()):
            if name in probe_set.maps:
                yield probe_set.maps[name]

    def _say(self, before: State) -> None:
        now, text = self.standing
        if now is State.ATTACHED:
            log.info("probes_attached", version=self.version, walk=self.walk)
        elif before is State.ATTACHED or now is not State.ABSENT:
            log.warning("probes_unavailable", before=before.value, now=now.value, text=text)


_COUNTING = (State.ATTACHED, State.READ_ONLY)
_TEXTS = {
    State.ATTACHED: "attached",
    State.READ_ONLY: "attached, but this user may not empty the maps: add it to the group that owns the pins",
    State.UNREADABLE: "the pins may no longer be looked at: give them back to the group of the agent's user",
    State.DETACHED: "links were removed: run `weighbridge-probes unload`, then `weighbridge-probes load`",
}
