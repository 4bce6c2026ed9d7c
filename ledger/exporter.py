"""The ledger's /metrics. Names are documented in docs/operator-guide.md. No label has a tenant's or an agent's name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ledger import __version__
from ledger.tally import INSERT_BUCKETS_SECONDS, TROUBLES, VERDICTS, Tally

P = "weighbridge_ledger_"
MAX_SOURCES = 16
MAX_TROUBLES = 16

Gauge = tuple[str, str, float]
"""Name, help, value."""


class LedgerMetrics(Collector):
    """Reads when it is scraped. `tally`: as the ledger left it last; `trouble`: reasons as for /readyz; `gauges`: what
    the process itself measures then.
    """

    def __init__(
        self,
        tally: Callable[[], Tally],
        trouble: Callable[[], Mapping[str, str]],
        gauges: Callable[[], Iterable[Gauge]],
    ) -> None:
        self._tally = tally
        self._trouble = trouble
        self._gauges = gauges

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        tally = self._tally()
        yield InfoMetricFamily(f"{P}build", "Version of the ledger.", {"version": __version__})
        yield from _counted(tally)
        yield from _labelled(tally, self._trouble())
        yield _inserts(tally)
        for name, text, value in (*_measured(tally, time.time_ns()), *self._gauges()):
            yield GaugeMetricFamily(P + name, text, value)


def _counted(tally: Tally) -> Iterator[Metric]:
    for name, text, value in (
        ("booked_batches", "Batches booked.", tally.booked_batches),
        ("booked_rows", "Usage rows booked.", tally.booked_rows),
        ("duplicates", "Arrivals that were booked already, and changed nothing.", tally.duplicates),
        (
            "conflicts",
            "Arrivals of an identity that is booked with other bytes (METER-006).",
            tally.conflicts,
        ),
        ("failed_inserts", "Inserts that the store refused (METER-001).", tally.failed_inserts),
        ("rollup_built", "Hours and days added up.", tally.rollup_built),
    ):
        yield CounterMetricFamily(P + name, text, value)


def _labelled(tally: Tally, trouble: Mapping[str, str]) -> Iterator[Metric]:
    # From zero on: `increase` does not see the first event of a series that begins with it.
    verdicts = CounterMetricFamily(f"{P}verdicts", "What collectors said of batches.", labels=["kind"])
    for kind in VERDICTS:
        verdicts.add_metric([kind], tally.verdicts.get(kind, 0))
    yield verdicts
    lag = GaugeMetricFamily(f"{P}source_lag", "What is there and not read yet.", labels=["source", "unit"])
    for (source, unit), value in islice(sorted(tally.source_lag.items()), MAX_SOURCES):
        lag.add_metric([source, unit], value)
    yield lag
    troubles = GaugeMetricFamily(
        f"{P}trouble", "1 while the ledger cannot go on because of it.", labels=["reason"]
    )
    others = sorted(trouble.keys() - set(TROUBLES))
    for reason in (*TROUBLES, *others[:MAX_TROUBLES]):
        troubles.add_metric([reason], float(reason in trouble))
    yield troubles


def _measured(tally: Tally, now_unix_ns: int) -> Iterator[Gauge]:
    """What there is nothing to say of yet has no series."""
    if tally.watermark_unix_ns is not None:
        text = "Unix time up to which the usage of every agent is booked."
        yield "watermark_timestamp_seconds", text, tally.watermark_unix_ns / 1e9
    yield "agents", "Agents known and not retired.", tally.agents
    yield "silent_agents", "Agents of which nothing comes.", tally.silent_agents
    yield "missing_batches", "Numbers that a stream has passed over.", tally.missing_batches
    yield "parked_batches", "Batches that wait for their tenant's plan: not booked.", tally.parked_batches
    yield (
        "rejected_batches",
        "Batches that were rejected and not readmitted: not booked.",
        tally.rejected_batches,
    )
    blockers = "What keeps the oldest ended period from being closed, and is not waived."
    yield "open_blockers", blockers, tally.blockers
    text = "Bytes of the log or records of topics that were deleted before they were read."
    yield "lost_positions", text, tally.lost_positions
    yield "periods_closed", "Closed periods.", tally.periods_closed
    unclosed_ns = 0 if tally.period_end_unix_ns is None else max(0, now_unix_ns - tally.period_end_unix_ns)
    text = "How long ago the oldest period ended that is not closed; 0: none."
    yield "oldest_unclosed_period_seconds", text, unclosed_ns / 1e9
    yield "rollup_dirty_hours", "Hours whose sums lack something that is booked.", tally.rollup_dirty_hours
    differences = "Batches that one hop has and the next has not, by the last reconciliation."
    yield "reconcile_differences", differences, tally.reconcile_differences
    if tally.reconcile_success_unix_ns is not None:
        text = "Unix time of the last reconciliation without a difference."
        yield "reconcile_success_timestamp_seconds", text, tally.reconcile_success_unix_ns / 1e9
    text = "CPU time by which raw usage and its sums differ, by the last `verify`."
    yield "conservation_difference_ns", text, tally.conservation_difference_ns


def _inserts(tally: Tally) -> Metric:
    running = 0
    buckets = []
    for bound, count in zip((*INSERT_BUCKETS_SECONDS, float("inf")), tally.insert_counts, strict=True):
        running += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(running)))
    return HistogramMetricFamily(
        f"{P}insert_seconds",
        "Time of an insert into the store.",
        buckets=buckets,
        sum_value=tally.insert_sum_seconds,
    )
