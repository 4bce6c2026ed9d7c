"""/metrics, /livez and /readyz of the agent. Names are documented in docs/operator-guide.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from agent import __version__
from agent.config import Metrics
from agent.loop import MeterLoop
from agent.meter.model import ClockState
from agent.meter.rows import ROOT_ID
from agent.ship.enrol import Identity
from agent.ship.shipper import Shipper
from agent.ship.spool import Spool
from agent.ship.spool_file import SpoolError
from agent.tally import TOTALS
from wire.daemon.reload import Reload
from wire.measures import BIT
from wire.statuses import REJECTIONS, label

P = "weighbridge_agent_"

_CPU, _MEMORY = BIT["cpu_usage_ns"], BIT["memory_byte_seconds"]


class AgentMetrics(Collector):
    """Reads the daemon's states when scraped."""

    def __init__(
        self,
        loop: MeterLoop,
        spool: Spool,
        shipper: Shipper,
        identity: Callable[[], Identity],
        reload: Reload,
        settings: Metrics,
    ) -> None:
        self.settings = settings
        self._loop, self._spool, self._shipper = loop, spool, shipper
        self._identity, self._reload = identity, reload

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        tally, state, shipper = self._loop.tally, self._loop.state, self._shipper.state
        yield InfoMetricFamily(
            f"{P}build",
            "Version of the agent and the sources it reads.",
            {"version": __version__, "sources": self._loop.plan.signature},
        )
        for name, text, number in (
            ("intervals", "Intervals committed to the spool.", tally.intervals),
            (
                "held_intervals",
                "Intervals that could not be committed and were merged.",
                tally.held_intervals,
            ),
            ("batches", "Batches made.", tally.batches),
            ("rows", "Usage rows made.", tally.rows),
            ("batch_bytes", "Bytes of batches made.", tally.batch_bytes),
            ("gaps", "Gap records made.", tally.gaps),
            ("ends", "Last rows made of an end that the kernel probes recorded.", tally.ends),
            ("ends_forgotten", "Ended cgroups the kernel side was told to forget.", tally.ends_forgotten),
            ("rows_without_cpu", "Rows whose CPU usage no source could tell.", tally.unknown),
            ("sent_bytes", "Bytes of batches sent.", shipper.bytes_sent),
            ("delivered_rows", "Usage rows a collector answered for.", shipper.rows),
            ("connects", "Streams opened to a collector.", shipper.connects),
        ):
            yield CounterMetricFamily(P + name, text, number)
        answers = CounterMetricFamily(f"{P}answers", "Answers of collectors to batches.", labels=["status"])
        for status in ("accepted", "duplicate", "parked", "rejected", "retry"):
            answers.add_metric([status], shipper.answers[status])
        yield answers
        rejected = CounterMetricFamily(f"{P}rejected", "Batches rejected for ever.", labels=["reason"])
        # From zero on: `increase` does not see the first event of a series that begins with it.
        for reason, count in sorted(({label(r): 0 for r in REJECTIONS} | shipper.rejected.copy()).items()):
            rejected.add_metric([reason], count)
        yield rejected
        failures = CounterMetricFamily(f"{P}label_source_failures", "Failed questions.", labels=["source"])
        for source, count in sorted(self._loop.catalogue.labels.failures.copy().items()):
            failures.add_metric([source], count)
        yield failures
        for name, text, value in (
            ("units", "Metering units at the last reading.", state.units),
            ("last_reading_timestamp_seconds", "Unix time of the last reading.", state.last_reading_unix),
            ("last_commit_timestamp_seconds", "Unix time of the last commit.", state.last_commit_unix),
            ("interval_seconds", "Time the last interval took to meter.", state.tick_seconds),
            ("intervals_in_one", "Configured intervals in a row; above 1 near a full spool.", state.stretch),
            ("row_seconds", "Length of a row as things are.", self._loop.row_seconds),
            ("reading_complete", "1 if every cgroup could be read.", state.complete),
            (
                "clock_synchronised",
                "1 if the kernel holds its clock for synchronised.",
                state.clock is ClockState.SYNCHRONISED,
            ),
            ("connected", "1 if a collector has welcomed this agent.", shipper.connected_since is not None),
            ("in_flight_batches", "Batches sent and not answered.", shipper.in_flight),
            ("reload_failed", "1 if the last reload kept the old settings.", bool(self._reload.error)),
        ):
            yield GaugeMetricFamily(P + name, text, float(value))
        identity = self._identity()
        for name, text, value in (
            ("expiry_timestamp_seconds", "Unix time at which the certificate ends.", identity.not_after),
            ("life_seconds", "How long the certificate lives.", identity.not_after - identity.not_before),
        ):
            yield GaugeMetricFamily(f"{P}certificate_{name}", text, value)
        yield from self._probe_metrics()
        yield from self._spool_metrics()
        yield from self._usage_metrics()

    def _probe_metrics(self) -> Iterator[Metric]:
        probes = self._loop.probes
        state = GaugeMetricFamily(
            f"{P}probes", "1 for the state of the kernel probes.", labels=["state", "walk", "version"]
        )
        state.add_metric([probes.standing.state.value, probes.walk, probes.version], 1)
        yield state
        used = GaugeMetricFamily(f"{P}probe_map_entries", "Entries at the last reading.", labels=["map"])
        most = GaugeMetricFamily(f"{P}probe_map_max_entries", "Entries there is room for.", labels=["map"])
        for name, (entries, at_most) in sorted(probes.sizes.copy().items()):
            used.add_metric([name], entries)
            most.add_metric([name], at_most)
        yield used
        yield most
        lost = CounterMetricFamily(
            f"{P}probe_lost", "What the kernel side had no room for since the load.", labels=["kind"]
        )
        for kind, count in probes.overflow._asdict().items():
            lost.add_metric([kind], count)
        yield lost

    def _spool_metrics(self) -> Iterator[Metric]:
        try:
            fill, quarantined = self._spool.fill(), self._spool.quarantined()
        except SpoolError:
            return
        age = 0.0
        if fill.oldest_interval_end_unix_ns is not None:
            age = max(0.0, time.time() - fill.oldest_interval_end_unix_ns / 1e9)
        for name, text, value in (
            ("spool_bytes", "Bytes of batches nobody took yet.", fill.bytes_used),
            ("spool_max_bytes", "Bound of the spool.", fill.max_bytes),
            ("spool_batches", "Batches nobody took yet.", fill.batches),
            ("spool_oldest_seconds", "Age of the oldest batch nobody took yet.", age),
            ("spool_quarantined_batches", "Batches set aside on this host.", quarantined),
        ):
            yield GaugeMetricFamily(P + name, text, value)

    def _usage_metrics(self) -> Iterator[Metric]:
        tenants = sorted(self._loop.tally.tenants.copy().items())
        for slot, (_, name, text, factor) in enumerate(TOTALS):
            family = CounterMetricFamily(f"weighbridge_tenant_{name}", text, labels=["tenant"])
            for tenant, totals in tenants:
                family.add_metric([tenant], totals[slot] * factor)
            yield family
        if not self.settings.per_container:
            return
        labels = ["tenant", "path", "name"]
        cpu = GaugeMetricFamily("weighbridge_container_cpu_cores", "CPUs used, last interval.", labels=labels)
        memory = GaugeMetricFamily(
            "weighbridge_container_memory_bytes", "Memory, mean of the last interval.", labels=labels
        )
        rows = [usage for usage in self._loop.state.latest if usage.cgroup_id != ROOT_ID]
        duration_ns = self._loop.state.latest_duration_ns
        seen: set[tuple[str, str]] = set()
        for usage in rows[: self.settings.max_containers]:
            described = self._loop.catalogue.describe(usage)
            if (usage.tenant, described.path) in seen:
                continue
            seen.add((usage.tenant, described.path))
            where = [usage.tenant, described.path, described.name]
            if usage.known >> _CPU & 1:
                cpu.add_metric(where, usage.values[_CPU] / duration_ns)
            if usage.known >> _MEMORY & 1:
                memory.add_metric(where, usage.values[_MEMORY] * 1e9 / duration_ns)
        yield cpu
        yield memory
        yield GaugeMetricFamily(
            "weighbridge_containers_without_series",
            "Containers beyond `metrics.max_containers`.",
            max(0, len(rows) - self.settings.max_containers),
        )
