"""The measures of a usage row by number, read off the contract so that there is one list.

`MEASURES[k]` is the column whose bit in `known` is `1 << k` and whose field number is `k + 32`.
"""

from __future__ import annotations

from wire.v1 import usage_pb2

FIRST_MEASURE_FIELD = 32

MEASURES: tuple[str, ...] = tuple(
    name.removeprefix("MEASURE_").lower()
    for name, _ in sorted(usage_pb2.Measure.items(), key=lambda item: item[1])
)
"""Column names in bit order."""

MAXIMA = frozenset(("memory_peak_bytes", "pids_peak"))
"""Measures that are the greatest value within the interval; all others are amounts, which add up."""

BIT: dict[str, int] = {name: bit for bit, name in enumerate(MEASURES)}
"""Column name -> bit number."""
