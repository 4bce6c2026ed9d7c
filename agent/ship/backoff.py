"""Full-jitter exponential backoff: sleep = random(0, min(cap, base * 2^n)).

Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. There is no limit on age:
what waits is in the spool.
"""

from __future__ import annotations

import random


class Backoff:
    def __init__(self, base_seconds: float, cap_seconds: float, rng: random.Random) -> None:
        self._base, self._cap, self._rng = base_seconds, cap_seconds, rng
        self._failures = 0

    def next_seconds(self) -> float:
        ceiling = min(self._cap, self._base * 2 ** min(self._failures, 30))
        self._failures += 1
        return self._rng.uniform(0, ceiling)

    def succeeded(self) -> None:
        self._failures = 0
