"""Who waits until somebody behind the local log has confirmed it up to an offset. Pure: no I/O, one owner.

Waiting begins in the order of the log, so the first to wait is the first to be confirmed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Done = Callable[[bool], object]
"""True: confirmed. False: not yet, and nobody knows when."""


class Receipts:
    def __init__(
        self, confirmed: int, log_end: int, most_unconfirmed_bytes: int, publish: Callable[[int], object]
    ) -> None:
        """`confirmed`: offset up to which the log is confirmed already; `publish`: who is told how far it may go."""
        self.confirmed = confirmed
        self.log_end = log_end
        self._publish = publish
        self.trouble = "nothing has been heard of the brokers yet"
        """Why nothing is confirmed at the moment, or empty."""
        self._most = most_unconfirmed_bytes
        self._waiting: deque[tuple[int, Done]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def take_more(self) -> bool:
        """Whether something new may come in."""
        return not self.trouble and self.log_end - self.confirmed <= self._most

    def durable(self, log_end: int) -> None:
        """The log has grown, durably."""
        self.log_end = log_end
        self._publish(log_end)

    def wait(self, end: int, done: Done) -> None:
        """Tell `done` once the log is confirmed up to `end`."""
        if end <= self.confirmed:
            done(True)
        elif self.trouble:
            done(False)
        else:
            self._waiting.append((end, done))

    def update(self, confirmed: int, trouble: str) -> None:
        """The news. In trouble everybody who still waits is told so."""
        self.confirmed = max(self.confirmed, confirmed)
        self.trouble = trouble
        while self._waiting and (trouble or self._waiting[0][0] <= self.confirmed):
            end, done = self._waiting.popleft()
            done(end <= self.confirmed)
