"""Who goes next when several may: start-time fair queueing (Goyal, Vin and Cheng, 1996). Pure.

Each flow's service is measured in the time its own share takes for it; the flow that is least far goes next.
While two flows both wait, what they got divided by their shares differs by one batch of each at most, however
many others come and go. A flow that was away starts where the others are: it saves nothing up.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

_FINE = 1_000_000_000_000_000
"""Shares are up to 10^12 a second and the lightest batch 10^5: what flooring loses stays below 10^-8 of it."""


class Flow:
    """One who waits; `start` and `finish` are virtual times."""

    __slots__ = ("finish", "start")

    def __init__(self) -> None:
        self.start = self.finish = 0


F = TypeVar("F", bound=Flow)


class FairQueue(Generic[F]):
    """Flows that may go on. A flow is in it once at most."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, F]] = []
        self._virtual = 0
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, flow: F) -> None:
        flow.start = max(self._virtual, flow.finish)
        self._pushed += 1  # among equals, first come first served
        heapq.heappush(self._heap, (flow.start, self._pushed, flow))

    def pop(self) -> F:
        self._virtual, _, flow = heapq.heappop(self._heap)
        return flow

    def served(self, flow: F, weight: int, share: int) -> None:
        """The flow that was popped got `weight`; it is `share` strong."""
        flow.finish = flow.start + weight * _FINE // share

    def clear(self) -> None:
        self._heap.clear()
