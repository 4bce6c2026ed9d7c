"""A manifest as the lines of a bill. Pure.

A line's id is a function of what it is about, so a billing system that imports a period twice finds every line
already there. A closed period's lines never change: what comes later has lines of its own, in the period that it is
booked with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ledger.periods.manifest import Manifest
from wire.measures import MAXIMA

_UNITS = (("_byte_seconds", "byte-seconds"), ("_ns", "nanoseconds"), ("_bytes", "bytes"))


def unit_of(measure: str) -> str:
    """The unit that the measure's name ends with, "count" for what is counted."""
    return next((unit for ending, unit in _UNITS if measure.endswith(ending)), "count")


def bill_lines(manifest: Manifest) -> list[dict[str, Any]]:
    """One line for each tenant and measure that is not 0, of the period's usage, of each adjustment, and of what was
    recovered, in this order. JSON-able:

    line_id       "2026-11/adjustment/2026-10/cpu_usage_ns/acme": period, kind, usage_period, measure, tenant
    period        the one that was closed; usage_period: in which the usage lies, another one for an adjustment
    kind          "usage", "adjustment" or "recovered" (signed: what two batches carried is taken off)
    value         decimal digits, in `unit`: sums pass what JSON readers hold exactly
    aggregate     "sum", or "max" for a measure whose lines do not add up
    """
    return list(_lines(manifest))


def _lines(manifest: Manifest) -> Iterator[dict[str, Any]]:
    period = manifest.period
    for account in sorted(manifest.accounts, key=lambda a: a.tenant):
        yield from _of(period, "usage", period, account.tenant, account.sums)
    for adjustment in sorted(manifest.adjustments, key=lambda a: a.period):
        for account in sorted(adjustment.accounts, key=lambda a: a.tenant):
            yield from _of(period, "adjustment", adjustment.period, account.tenant, account.sums)
    for recovered in sorted(manifest.recovered, key=lambda r: r.tenant):
        yield from _of(period, "recovered", period, recovered.tenant, recovered.sums)


def _of(
    period: str, kind: str, usage_period: str, tenant: str, sums: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    for measure in sorted(sums):
        if sums[measure]:
            yield {
                # The tenant last: whatever it is called, no two lines share an id.
                "line_id": f"{period}/{kind}/{usage_period}/{measure}/{tenant}",
                "period": period,
                "usage_period": usage_period,
                "kind": kind,
                "tenant": tenant,
                "measure": measure,
                "value": str(sums[measure]),
                "unit": unit_of(measure),
                "aggregate": "max" if measure in MAXIMA else "sum",
            }
