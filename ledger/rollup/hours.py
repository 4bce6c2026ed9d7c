"""Builds of hours, and which of them are to be built.

An hour is built as a whole from the rows that lie in it: minutes, then units, then the row of `rollup_builds` that makes both
count. Before batches are booked into an hour that is built, it is marked stale. So nothing that is read as built ever differs
from the rows; and a kill at any point leaves an hour that is built again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from itertools import groupby
from typing import NamedTuple

from ledger.rollup.parts import (
    AGGREGATES,
    COMMON,
    DAY_NS,
    DIVIDING,
    HOUR_NS,
    MINUTE_NS,
    NAMES,
    UNIT,
    parts,
    sums,
    unit_sums,
)
from ledger.store.client import Store, StoreTrouble, now_ns
from wire.measures import MEASURES

_TABLES = ("usage_minutes", "usage_hours")
_BUILD_COLUMNS = ("start_ns", "generation", "state", "batches", "fingerprint", "written_at_ns")


class State(Enum):
    BUILT = auto()
    STALE = auto()
    UNSURE = auto()
    """A write failed, and nobody knows whether it was done: neither read as built, nor changed without being marked stale."""


class Build(NamedTuple):
    generation: int
    state: State
    batches: int
    fingerprint: int


class Hours:
    """The rollups of one store. StoreTrouble from every method that writes or reads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._builds: dict[int, Build] = {}
        self._dirty: set[int] = set()
        """Hours that have batches and no build that is made of just those."""
        self.load()

    def load(self) -> None:
        """What is built and what is to be, derived from the tables."""
        found = self._store.query(
            "SELECT start_ns, generation, state, batches, fingerprint FROM rollup_builds FINAL"
        )
        self._builds = {
            start: Build(gen, State.BUILT if state == "built" else State.STALE, count, print_)
            for start, gen, state, count, print_ in found
        }
        there = {start: (count, print_) for start, count, print_ in self.fingerprints()}
        wrong = self._differing(there)
        self._mark_stale(wrong)
        self._dirty = {
            h for h in (*there, *wrong) if h not in self._builds or self._builds[h].state is not State.BUILT
        }

    def fingerprints(self, start_ns: int = 0, end_ns: int = 1 << 63) -> list[tuple[int, int, int]]:
        """(hour, batches, fingerprint) of what is booked in the hours of [start, end)."""
        hours = (
            f"range(intDiv(greatest(interval_start_ns, {start_ns}), {HOUR_NS}),"
            f" intDiv(least(interval_end_ns, {end_ns}) + {HOUR_NS - 1}, {HOUR_NS}))"
        )
        return [
            (start, count, fingerprint)
            for start, count, fingerprint in self._store.query(f"""
                SELECT hour * {HOUR_NS} AS start, count(), sum(cityHash64(agent_id, epoch, seq, digest))
                FROM (
                    SELECT agent_id, epoch, seq, digest, arrayJoin({hours}) AS hour FROM batches FINAL
                    WHERE interval_end_ns > {start_ns} AND interval_start_ns < {end_ns}
                )
                GROUP BY start ORDER BY start""")
        ]

    @property
    def dirty(self) -> list[int]:
        """Starts of hours to build, ascending: they have batches and no build that counts."""
        return sorted(self._dirty)

    @property
    def built(self) -> list[int]:
        """Starts of hours whose build counts, ascending."""
        return sorted(start for start, build in self._builds.items() if build.state is State.BUILT)

    def differing(self) -> list[int]:
        """Hours that count as built of other batches than are there: by the fingerprints, all of them."""
        return self._differing({start: (count, print_) for start, count, print_ in self.fingerprints()})

    def _differing(self, there: Mapping[int, tuple[int, int]]) -> list[int]:
        return [
            h
            for h in self.built
            if there.get(h, (0, 0)) != (self._builds[h].batches, self._builds[h].fingerprint)
        ]

    def touch(self, hours: Iterable[int]) -> None:
        """Batches are about to be booked into these."""
        hours = set(hours)
        self._mark_stale(sorted(h for h in hours if self._may_count(h)))
        self._dirty |= hours

    def _may_count(self, hour: int) -> bool:
        build = self._builds.get(hour)
        return build is not None and build.state is not State.STALE

    def build_settled(self, before_ns: int, most: int) -> int:
        """Build up to `most` dirty hours that end by `before_ns`, the latest first; how many."""
        due = sorted((h for h in self._dirty if h + HOUR_NS <= before_ns), reverse=True)[:most]
        # A day's hours in one go: what a statement costs apart from its rows is most of what a small hour costs.
        for _, hours in groupby(due, key=lambda hour: hour // DAY_NS):
            self._build(sorted(hours))
        return len(due)

    def _mark_stale(self, hours: list[int]) -> None:
        """From here on they are to be built, also if this fails half-way."""
        self._dirty.update(hours)
        self._write(dict.fromkeys(hours, (State.STALE, 0, 0)))

    def _generation(self, hour: int) -> int:
        """The newest that `rollup_builds` may have."""
        return self._builds[hour].generation if hour in self._builds else 0

    def _write(self, states: Mapping[int, tuple[State, int, int]], newest: int = 0) -> None:
        """As the next generation, or as `newest` if that is a later one."""
        rows = []
        for hour, (state, count, fingerprint) in states.items():
            generation = max(self._generation(hour) + 1, newest)
            self._builds[hour] = Build(generation, State.UNSURE, 0, 0)
            rows.append((hour, generation, state.name.lower(), count, fingerprint, now_ns()))
        self._store.insert("rollup_builds", _BUILD_COLUMNS, rows)
        for hour, (state, count, fingerprint) in states.items():
            self._builds[hour] = Build(self._builds[hour].generation, state, count, fingerprint)

    def _build(self, hours: list[int]) -> None:
        """Hours of one day, ascending."""
        # The last try to build one may have come to its end although it failed; what counts is not taken apart.
        self._mark_stale([hour for hour in hours if self._may_count(hour)])
        start, end = hours[0], hours[-1] + HOUR_NS
        listed = ", ".join(map(str, hours))
        prints = {hour: (count, fingerprint) for hour, count, fingerprint in self.fingerprints(start, end)}
        span = f"start_ns >= {start} AND start_ns < {end}"
        # Rows of a build that was broken off are there, too, and of no generation that counts.
        left = [
            generation
            for table in _TABLES
            for (generation,) in self._store.query(f"SELECT max(generation) FROM {table} WHERE {span}")
        ]
        generation = 1 + max(*left, *map(self._generation, hours))
        self._store.command(f"""
            INSERT INTO usage_minutes (start_ns, generation, tenant, {", ".join((*COMMON, *MEASURES))})
            SELECT bucket, {generation}, tenant, {AGGREGATES}, {sums()} FROM ({parts(start, end, MINUTE_NS)})
            WHERE intDiv(bucket, {HOUR_NS}) * {HOUR_NS} IN ({listed}) GROUP BY bucket, tenant {DIVIDING}""")
        columns = ", ".join(("tenant", *UNIT, *NAMES, *COMMON, *MEASURES))
        self._store.command(f"""
            INSERT INTO usage_hours (start_ns, generation, {columns})
            SELECT bucket, {generation}, {columns} FROM ({unit_sums(start, end, HOUR_NS)})
            WHERE bucket IN ({listed}) {DIVIDING}""")
        self._write({hour: (State.BUILT, *prints.get(hour, (0, 0))) for hour in hours}, generation)
        self._dirty.difference_update(hours)
        if any(left):
            self._tidy(
                f"{span} AND intDiv(start_ns, {HOUR_NS}) * {HOUR_NS} IN ({listed}) AND generation < {generation}"
            )

    def _tidy(self, which: str) -> None:
        """Have rows deleted that nobody reads any more. Nothing waits for that, and it may as well fail."""
        for table in _TABLES:
            with contextlib.suppress(StoreTrouble):
                self._store.command(
                    f"DELETE FROM {table} WHERE {which} SETTINGS lightweight_deletes_sync = 0"
                )
