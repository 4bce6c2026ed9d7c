"""Sends batches to the running collector in groups, and asks again until each has an answer that stands.

RETRY is obeyed: the same bytes, after the time the collector named, however long that takes (a full queue is no reason
to give up). Only a batch whose forerunners are missing in its stream is given up, when nothing else moves any more.
"""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from collector.resend.batches import Found
from wire.daemon.control import ask
from wire.limits import MAX_GROUP_BYTES, MAX_ITEMS_PER_DELIVERY

_LEAST_PAUSE_SECONDS = 0.2
_OUT_OF_WINDOW = "REASON_OUT_OF_WINDOW"

Refused = Callable[[Found, str], None]
"""Told of a batch that did not come in, and why."""


class Sender:
    """One run. `rate`: batches a second at most; None: as fast as they are taken."""

    def __init__(
        self, socket: Path, how: str, names: list[str], refused: Refused, rate: float | None = None
    ) -> None:
        self._socket = socket
        self._refused = refused
        self._rate = rate
        self._begun = time.monotonic()
        self._group: list[Found] = []
        self._bytes = 0
        self.sent = 0
        self.settled_end = 0
        """`end` of the last batch that has its answer: all before it have theirs."""
        self.answers: Counter[str] = Counter()
        """Final answers by status; `missing_before` is a batch that was given up."""
        self._run = ask(socket, {"command": "import_begin", "how": how, "names": names})["run"]

    def add(self, found: Found) -> None:
        """Queue a batch, and send what makes a group. ControlError when nobody answers."""
        if self._group and self._bytes + len(found.body) > MAX_GROUP_BYTES:
            self.flush()
        self._group.append(found)
        self._bytes += len(found.body)
        if len(self._group) >= self._most_in_group():
            self.flush()

    def flush(self) -> None:
        """Send what is queued, until each has an answer that stands."""
        waiting, self._group, self._bytes = self._group, [], 0
        if not waiting:
            return
        self._pace(len(waiting))
        self.sent += len(waiting)
        last = waiting[-1]
        while waiting:
            waiting = self._try(waiting)
        self.settled_end = last.end

    def close(self) -> None:
        """Send what is queued and end the run."""
        self.flush()
        ask(self._socket, {"command": "import_end", "run": self._run})

    def _try(self, group: list[Found]) -> list[Found]:
        """Deliver once; what has to be sent again, after the pause it was asked for."""
        batches = []
        for found in group:
            assert found.identity is not None
            batches.append([*found.identity, base64.b64encode(found.body).decode()])
        told = ask(self._socket, {"command": "import_deliver", "run": self._run, "batches": batches})
        again: list[tuple[Found, str, float]] = []
        for found, (status, reason, detail, after_ms) in zip(group, told["answers"], strict=True):
            if status == "retry":
                again.append((found, reason, after_ms / 1e3))
                continue
            self.answers[status] += 1
            if status == "rejected":
                self._refused(found, f"{reason} {detail}")
        if len(again) == len(group) and all(reason == _OUT_OF_WINDOW for _, reason, _ in again):
            for found, _, _ in again:
                self.answers["missing_before"] += 1
                self._refused(found, "batches before it are missing in its stream: bring those first")
            return []
        if again:
            time.sleep(max(_LEAST_PAUSE_SECONDS, *(seconds for _, _, seconds in again)))
        return [found for found, _, _ in again]

    def _most_in_group(self) -> int:
        """A slow run goes in small steps."""
        if self._rate is None:
            return MAX_ITEMS_PER_DELIVERY
        return max(1, min(MAX_ITEMS_PER_DELIVERY, int(self._rate)))

    def _pace(self, more: int) -> None:
        if self._rate is not None:
            due = self._begun + (self.sent + more) / self._rate
            time.sleep(max(0.0, due - time.monotonic()))
