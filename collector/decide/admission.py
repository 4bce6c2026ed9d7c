"""May this batch go on now, or must it wait its turn? Pure: the interface every admission has.

This release admits everything; a token bucket per tenant takes the same place.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Verdict(Enum):
    ADMITTED = "admitted"
    PARKED = "parked"


class Admission(Protocol):
    def admit(self, tenant: str, weight: int, now_ns: int) -> Verdict:
        """Judge a batch of `weight` micro-tokens at monotonic time `now_ns`."""


MICRO_TOKENS_PER_BATCH = 100_000
MICRO_TOKENS_PER_ROW = 10_000
MICRO_TOKENS_PER_KIB = 50_000


def weight(size_bytes: int, rows: int) -> int:
    """Micro-tokens of a batch: a fixed part, its rows, its bytes. 1 KB with 5 rows weighs 0.2 tokens, 500 KB with
    1,000 rows about 35.
    """
    return MICRO_TOKENS_PER_BATCH + MICRO_TOKENS_PER_ROW * rows + MICRO_TOKENS_PER_KIB * size_bytes // 1_024


class AdmitAll:
    """The embedded default: no limits."""

    def admit(self, tenant: str, weight: int, now_ns: int) -> Verdict:
        return Verdict.ADMITTED
