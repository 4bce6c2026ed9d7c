"""How far each source is read: written behind what was booked, so a crash reads some of it again and never skips any."""

from __future__ import annotations

from collections.abc import Mapping

from ledger.store.client import Store, now_ns

_COLUMNS = ("place", "position", "written_at_ns")
_FORGOTTEN = (1 << 64) - 1
"""In place of a position: rows are only ever added, and the last one of a place counts. 0 is a position: nothing was read of
what begins there, and what is deleted of it is lost."""


class Progress:
    """Positions by place. StoreTrouble from everything."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._written: dict[str, int] = {}
        self._version = 0
        """Of the last row that was written: the clock may be set back, and the last one counts all the same."""
        for place, position, version in store.query(
            "SELECT place, position, written_at_ns FROM progress FINAL"
        ):
            self._version = max(self._version, version)
            if position != _FORGOTTEN:
                self._written[place] = position

    @property
    def positions(self) -> dict[str, int]:
        """What to go on from."""
        return dict(self._written)

    def write(self, positions: Mapping[str, int]) -> None:
        """What was read up to these is booked."""
        new = {place: at for place, at in positions.items() if self._written.get(place) != at}
        self._insert(new)
        self._written.update(new)

    def forget(self) -> None:
        """Everything will be read again."""
        self._insert(dict.fromkeys(self._written, _FORGOTTEN))
        self._written = {}

    def _insert(self, positions: Mapping[str, int]) -> None:
        self._version = max(now_ns(), self._version + 1)
        self._store.insert(
            "progress", _COLUMNS, [(place, at, self._version) for place, at in positions.items()]
        )

    def lose(self, lost: Mapping[str, tuple[int, int]]) -> None:
        """Write down what a source deleted before it was read."""
        self._store.insert(
            "lost_ranges",
            ("place", "first", "last", "found_at_ns"),
            [(place, first, last, now_ns()) for place, (first, last) in lost.items()],
        )

    def lost(self) -> list[tuple[str, int, int]]:
        """(place, from, to) of what was deleted before it was read."""
        return [
            (place, first, last)
            for place, first, last in self._store.query(
                "SELECT place, first, last FROM lost_ranges FINAL ORDER BY place, first"
            )
        ]
