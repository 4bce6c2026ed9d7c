"""A reload as every daemon answers for it: what only a restart takes up, or why the old settings stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from wire.daemon.journal import Journal

log = Journal("reload")


class Reload:
    """Of one daemon, which was started with `settings`.

    `restart_keys`: those that only a restart takes up, dotted. `report`: called when `error` may have changed.
    """

    def __init__(self, settings: object, restart_keys: Sequence[str], report: Callable[[], None]) -> None:
        self._started_with = settings
        self._restart_keys = restart_keys
        self._report = report
        self.error = ""
        """Why the last one kept the old settings; empty: it did not."""

    def failed(self, error: Exception) -> dict[str, Any]:
        """The answer to whoever asked for it."""
        self.error = str(error)
        log.error("reload_failed", error=self.error)
        self._report()
        return {"error": self.error}

    def done(self, fresh: object) -> dict[str, Any]:
        """The answer. What needed a restart once needs it until there is one, or until it is as it was at the start."""
        self.error = ""
        restart = [key for key in self._restart_keys if _of(self._started_with, key) != _of(fresh, key)]
        log.info("reloaded", needs_restart=restart)
        self._report()
        return {"needs_restart": restart}


def _of(settings: object, dotted: str) -> object:
    for key in dotted.split("."):
        settings = getattr(settings, key)
    return settings
