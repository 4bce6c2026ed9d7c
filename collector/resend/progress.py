"""A bar on the terminal, for the person who waits. Elsewhere nothing is written."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 30
_EVERY_SECONDS = 0.1


class Progress:
    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = max(1, total)
        self._stream = stream or sys.stderr
        self._shown = self._stream.isatty()
        self._begun = self._last = time.monotonic()

    def at(self, done: int, batches: int) -> None:
        """So much of the source (in the unit of its total) and so many batches of it are done."""
        now = time.monotonic()
        if self._shown and now - self._last >= _EVERY_SECONDS:
            self._last = now
            self._draw(done, batches, now)

    def aside(self) -> None:
        """Clear the line, so that something else can be written."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _draw(self, done: int, batches: int, now: float) -> None:
        share = min(1.0, done / self._total)
        bar = ("#" * round(share * _WIDTH)).ljust(_WIDTH, "-")
        seconds = max(now - self._begun, 1e-3)
        left = f"{seconds / share - seconds:.0f} s left" if share > 0 else ""
        self._stream.write(
            f"\r\x1b[K[{bar}] {share:4.0%}  {batches} batches, {batches / seconds:.0f}/s  {left}"
        )
        self._stream.flush()
