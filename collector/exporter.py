"""/metrics, /livez and /readyz of the collector. Names are documented in docs/operator-guide.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from collector import __version__
from collector.decide.admission import View
from collector.decide.bucket import MICRO
from collector.tally import LATENCY_BUCKETS_SECONDS, MAX_TENANTS, OTHER, Tally
from wire.statuses import REASONS, label, meter_code
from wire.v1.usage_pb2 import GapReason

P = "weighbridge_collector_"

# From zero on: `increase` does not see the first event of a series that begins with it.
_NO_REFUSALS = {(str(code), label(r)): 0 for r in REASONS if (code := meter_code(r)) is not None}
_NO_GAPS = {name.removeprefix("GAP_REASON_").lower(): 0 for name, number in GapReason.items() if number}

Gauge = tuple[str, str, float]
"""Name, help, value."""


class CollectorMetrics(Collector):
    """Reads the tally when scraped. `gauges`: (name, help, value) of what is measured at that moment; `queues`: what
    is parked then, longest debt first.
    """

    def __init__(
        self,
        tally: Tally,
        gauges: Callable[[], Iterable[Gauge]],
        queues: Callable[[], Sequence[View]],
    ) -> None:
        self._tally = tally
        self._gauges = gauges
        self._queues = queues

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        tally = self._tally
        yield InfoMetricFamily(f"{P}build", "Version of the collector.", {"version": __version__})
        answers = CounterMetricFamily(f"{P}answers", "Answers to batches.", labels=["status"])
        for status in ("accepted", "duplicate", "parked", "rejected", "retry"):
            answers.add_metric([status], tally.answers[status])
        yield answers
        refusals = CounterMetricFamily(
            f"{P}refusals", "Batches, messages and connections refused.", labels=["code", "reason"]
        )
        for (code, reason), count in sorted((_NO_REFUSALS | tally.refusals.copy()).items()):
            refusals.add_metric([code, reason], count)
        yield refusals
        gaps = CounterMetricFamily(f"{P}gaps", "Gap records in accepted batches.", labels=["reason"])
        for reason, count in sorted((_NO_GAPS | tally.gaps.copy()).items()):
            gaps.add_metric([reason], count)
        yield gaps
        batches = CounterMetricFamily(f"{P}tenant_batches", "Batches accepted.", labels=["tenant"])
        rows = CounterMetricFamily(f"{P}tenant_rows", "Usage rows accepted.", labels=["tenant"])
        cpu = CounterMetricFamily(f"{P}tenant_cpu_usage_seconds", "CPU time accepted.", labels=["tenant"])
        for tenant, total in sorted(tally.tenants.copy().items()):
            batches.add_metric([tenant], total.batches)
            rows.add_metric([tenant], total.rows)
            cpu.add_metric([tenant], total.cpu_usage_ns / 1e9)
        yield from (batches, rows, cpu)
        for name, text, value in (
            ("received_bytes", "Bytes of batches received.", tally.bytes_received),
            ("connections", "Agent streams opened.", tally.connections),
            (
                "broken_streams",
                "Streams that broke: agent killed, network cut, or a message over the bound.",
                tally.broken_streams,
            ),
            (
                "slowed_messages",
                "Messages that waited because their agent sent more than its rate.",
                tally.slowed_messages,
            ),
            (
                "adopted_streams",
                "Streams that went on beyond what this collector knew.",
                tally.adopted_streams,
            ),
            ("released_batches", "Parked batches handed on.", tally.released_batches),
            (
                "unreadable_parked_batches",
                "Parked batches whose record no longer verifies.",
                tally.unreadable_parked,
            ),
            (
                "delivered_elsewhere_batches",
                "Batches that another collector had delivered.",
                tally.delivered_elsewhere,
            ),
            (
                "held_elsewhere_batches",
                "Answers RETRY because another collector was publishing the batch.",
                tally.held_elsewhere,
            ),
            ("commits", "Deliveries made durable.", tally.commits),
            ("failed_commits", "Deliveries the disk refused (METER-001).", tally.failed_commits),
        ):
            yield CounterMetricFamily(P + name, text, value)
        yield GaugeMetricFamily(f"{P}open_streams", "Agents connected now.", tally.open_streams)
        for name, text, number in self._gauges():
            yield GaugeMetricFamily(P + name, text, number)
        yield from self._parked()
        yield self._latency()

    def _parked(self) -> Iterator[Metric]:
        views = self._queues()
        own, rest = views[:MAX_TENANTS], views[MAX_TENANTS:]
        now_ns = time.time_ns()

        def age_seconds(some: Sequence[View]) -> float:
            oldest_ns = min((v.oldest_unix_ns for v in some if v.oldest_unix_ns), default=now_ns)
            return max(0, now_ns - oldest_ns) / 1e9

        for name, text, value in (
            ("batches", "Batches that wait.", lambda some: sum(v.batches for v in some)),
            ("bytes", "Bytes of batches that wait.", lambda some: sum(v.bytes for v in some)),
            (
                "debt_tokens",
                "Tokens that must come in before all is released.",
                lambda some: sum(v.debt for v in some) / MICRO,
            ),
            ("oldest_seconds", "Age of the batch that has waited longest.", age_seconds),
        ):
            family = GaugeMetricFamily(f"{P}tenant_parked_{name}", text, labels=["tenant"])
            for view in own:
                family.add_metric([view.tenant], value([view]))
            if rest:
                family.add_metric([OTHER], value(rest))
            yield family

    def _latency(self) -> Metric:
        tally = self._tally
        running = 0
        buckets = []
        for bound, count in zip((*LATENCY_BUCKETS_SECONDS, float("inf")), tally.latency_counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(running)))
        return HistogramMetricFamily(
            f"{P}answer_seconds",
            "Time from a batch's arrival to its answer.",
            buckets=buckets,
            sum_value=tally.latency_sum_seconds,
        )
