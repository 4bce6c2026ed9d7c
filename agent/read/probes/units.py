"""Which cgroups are metering units, told from their paths: the same answer as the walk over directories gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from agent.meter.model import Role

RoleOf = Callable[[str, bool], Role]

MAX_REMEMBERED = 16_384


class UnitPaths:
    def __init__(self, role: RoleOf) -> None:
        self._role = role
        self._below = lru_cache(MAX_REMEMBERED)(self._look_below)

    def is_unit(self, path: str) -> bool:
        inside, metered_whole = self._below(path.rpartition("/")[0])
        return not metered_whole and self._role(path, inside) is not Role.PASS

    def around(self, path: str) -> str:
        """Path of the nearest unit around this one, "" for the host."""
        path = path.rpartition("/")[0]
        while path and not self.is_unit(path):
            path = path.rpartition("/")[0]
        return path

    def _look_below(self, path: str) -> tuple[bool, bool]:
        """(what lies below is inside a unit, is metered with it as one)."""
        if not path:
            return False, False
        inside, metered_whole = self._below(path.rpartition("/")[0])
        if metered_whole:
            return True, True
        role = self._role(path, inside)
        return inside or role is not Role.PASS, role is Role.LEAF_UNIT
