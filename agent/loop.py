"""The cadence: read, meter, encode, commit, at every multiple of the interval of wall clock.

Everything here runs in one worker thread, which owns the readers, the baseline and what is written to the
spool; the event loop only tells it when. Between two intervals memory is sampled more finely.

Failure model. What cannot be committed is held in the baseline and merged into the next interval: kernel
counters lose nothing by waiting. Only a commit moves the durable baseline, so a kill at any point repeats
the interval from the last one that was committed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import msgspec

from agent import __version__
from agent.config import Settings
from agent.meter import batch, usage
from agent.meter.catalogue import Catalogue
from agent.meter.identity import role
from agent.meter.interval import Cadence
from agent.meter.model import ClockState, Snapshot
from agent.meter.rows import Usage
from agent.meter.usage import Baseline, Gap, Outcome
from agent.read import host, plan
from agent.read.cgroupfs import CgroupReader
from agent.read.host import HostError, HostFacts
from agent.read.plan import Plan
from agent.ship.spool import BatchKey, Opened, Spool, SpoolCorrupt, SpoolError, SpoolFull
from agent.tally import Tally
from wire.daemon.journal import Journal
from wire.statuses import Meter
from wire.v1 import usage_pb2 as pb

LONGER_WHEN_FULL = ((0.95, 60), (0.90, 30), (0.75, 6))
"""(fill of the spool, intervals in one): near the bound rows become longer, and so fewer."""
LONGEST_INTERVAL_SECONDS = 3_600.0

log = Journal("agent.loop")


@dataclass(slots=True)
class LoopState:
    """For status, metrics, readiness and the watchdog."""

    last_reading_unix: float = 0.0
    last_commit_unix: float = 0.0
    complete: bool = True
    units: int = 0
    trouble: dict[str, str] = field(default_factory=dict)
    """Reason -> sentence of what keeps rows from being committed."""
    stretch: int = 1
    """Configured intervals in one row at the moment."""
    tick_seconds: float = 0.0
    clock: ClockState = ClockState.UNKNOWN
    latest: list[Usage] = field(default_factory=list)
    latest_duration_ns: int = 1


class MeterLoop:
    """Call every method from the same thread."""

    def __init__(self, settings: Settings, spool: Spool, catalogue: Catalogue, tally: Tally) -> None:
        self.state = LoopState()
        self.catalogue = catalogue
        self.tally = tally
        self._settings = settings
        self._spool = spool
        self._cadence = _cadence(settings)
        self.facts: HostFacts = host.probe(settings.read.cgroup_root, settings.read.proc_root)
        self.plan: Plan = plan.make(self.facts, settings.read.hierarchy)
        self._cpus = self.facts.cpus
        self._reader = self._new_reader(self.plan)
        self.baseline: Baseline
        self._was_down = False

    def start(self) -> None:
        """Take up the baseline of the spool, or begin one. Nothing is metered before it is durable."""
        data = self._spool.load_baseline()
        if data is not None:
            self.baseline = msgspec.msgpack.decode(data, type=Baseline)
            self._was_down = True
            self._take_up_sources()
            return
        gaps = []
        if self._spool.opened is Opened.SET_ASIDE:
            gaps.append(self._lost_spool())
        self.baseline = usage.begin(self._read(), self.plan.signature, self.catalogue.tenant_of, gaps)
        self._spool.commit([], _encode(self.baseline))
        log.info("metering_begun", units=len(self.baseline.units), epoch=self._spool.epoch)

    def tick(self) -> bool:
        """One interval. Whether new batches are in the spool."""
        begun = time.perf_counter()
        snapshot = self._read()
        self.baseline.gaps.extend(self._damaged_batches())
        outcome = usage.step(self.baseline, snapshot, self.catalogue.tenant_of, self._cadence)
        committed = self._commit(outcome, snapshot.complete)
        self.state.latest, self.state.latest_duration_ns = outcome.usages, outcome.interval.duration_ns
        self.state.tick_seconds = time.perf_counter() - begun
        return committed

    def sample(self) -> None:
        """Extend the memory integrals between two intervals."""
        samples = {
            s.cgroup_id: (s.memory_current_bytes, s.memory_inactive_file_bytes, s.pids_current)
            for s in self._reader.sample_memory()
        }
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        usage.observe(self.baseline, now, samples, self._cadence)

    def due_in_seconds(self, now_unix: float) -> float:
        """Time until the next interval ends."""
        length = min(self._settings.meter.interval * self.state.stretch, LONGEST_INTERVAL_SECONDS)
        return float(length - now_unix % length)

    def open_epoch(self, at_least: int, aside_from: BatchKey | None) -> None:
        """Begin a new epoch in spool and baseline: a collector knows this one differently."""
        now = time.time_ns()
        gaps = []
        if aside_from is not None:
            gaps.append(
                Gap(
                    self.baseline.end_unix_ns,
                    max(now, self.baseline.end_unix_ns),
                    int(pb.GAP_REASON_CONFLICT),
                    0,
                    f"batches of epoch {aside_from.epoch} from {aside_from.seq} on are in quarantine on this host",
                )
            )
        self.baseline = usage.reopen(self.baseline, gaps)
        self._spool.open_epoch(at_least, now, aside_from, _encode(self.baseline))
        log.warning(
            "epoch_opened",
            code=Meter.IDENTITY_CONFLICT if aside_from else None,
            epoch=self._spool.epoch,
            set_aside_from=aside_from,
        )

    def reconfigure(self, settings: Settings, catalogue: Catalogue) -> None:
        """Take up new settings. Rules and cadence apply from the next interval on."""
        self._settings, self.catalogue = settings, catalogue
        self._cadence = _cadence(settings)

    def close(self) -> None:
        self._reader.close()

    def _read(self) -> Snapshot:
        snapshot = self._reader.read()
        self.state.last_reading_unix = time.time()
        self.state.complete = snapshot.complete
        self.state.units = len(snapshot.units)
        self.state.clock = host.clock_state()[0]
        self.catalogue.learn(snapshot.units)
        return snapshot

    def _commit(self, outcome: Outcome, complete: bool) -> bool:
        drafts = batch.drafts(outcome, self._producer(complete), self._flags())
        try:
            stored = self._spool.commit(drafts, _encode(outcome.baseline))
        except SpoolCorrupt as error:
            log.error("spool_corrupt", code=Meter.BUFFER_OVERFLOW, error=str(error))
            self._recover(outcome)
            return False
        except SpoolError as error:
            self._hold(outcome, error)
            return False
        self.baseline = outcome.baseline
        self._was_down = False
        if self.state.trouble:
            log.info("spool_recovered")
            self.state.trouble = {}
        self.state.last_commit_unix = time.time()
        self.tally.committed(outcome, len(stored), sum(len(b.body) for b in stored))
        self._stretch()
        return bool(stored)

    def _hold(self, outcome: Outcome, error: SpoolError) -> None:
        """Keep the rows in the baseline, durable if the disk allows at least that."""
        full = isinstance(error, SpoolFull)
        reason = "spool_full" if full else "spool_unavailable"
        if reason not in self.state.trouble:
            log.error(reason, code=Meter.BUFFER_OVERFLOW, error=str(error))
        self.state.trouble = {reason: f"{Meter.BUFFER_OVERFLOW}: {error}"}
        self.tally.held_intervals += 1
        self.baseline = usage.hold(outcome, fold_ended=True)
        if full:
            try:
                self._spool.commit([], _encode(self.baseline))
            except SpoolError as failed:
                log.error("baseline_not_durable", code=Meter.BUFFER_OVERFLOW, error=str(failed))
        self._stretch()

    def _recover(self, outcome: Outcome) -> None:
        """The spool's file is damaged. The baseline is in memory, so nothing but undelivered batches is at stake."""
        held = usage.hold(outcome, fold_ended=False)
        self._spool.recover(time.time_ns())
        gaps = [self._lost_spool()] if self._spool.opened is Opened.SET_ASIDE else []
        self.baseline = usage.reopen(held, gaps)
        if self._spool.opened is Opened.SET_ASIDE:
            self._spool.commit([], _encode(self.baseline))
        else:
            self._spool.open_epoch(self._spool.epoch, time.time_ns(), None, _encode(self.baseline))

    def _stretch(self) -> None:
        fill = self._spool.fill()
        share = fill.bytes_used / fill.max_bytes
        stretch = next((n for above, n in LONGER_WHEN_FULL if share >= above), 1)
        if stretch != self.state.stretch:
            log.warning("interval_changed", spool_fill=round(share, 3), intervals_in_one=stretch)
        self.state.stretch = stretch

    def _flags(self) -> int:
        return int(pb.BATCH_FLAG_AGENT_WAS_DOWN) if self._was_down else 0

    def _producer(self, complete: bool) -> batch.Producer:
        # A CPU that was there for a part of the interval may have been used.
        cpus, self._cpus = self._cpus, host.online_cpus(self._settings.read.proc_root)
        cpus = max(cpus, self._cpus)
        return batch.Producer(
            host=self._settings.host_name or self.facts.host,
            version=__version__,
            cpus=cpus,
            coverage=self.plan.coverage | (int(pb.COVERAGE_WHOLE_HOST) if complete else 0),
            cpu_source=self._reader.cpu_source,
            clock_unsynchronised=self.state.clock is ClockState.UNSYNCHRONISED,
            describe=self.catalogue.describe,
        )

    def _damaged_batches(self) -> list[Gap]:
        return [
            Gap(
                lost.interval_end_unix_ns - self._cadence.interval_ns,
                lost.interval_end_unix_ns,
                int(pb.GAP_REASON_SPOOL_LOST),
                1,
                f"batch {lost.epoch}/{lost.seq} is damaged on this host's disk",
            )
            for lost in self._spool.take_damaged()
        ]

    def _take_up_sources(self) -> None:
        """Change over from the sources of the baseline to those of now, at one instant."""
        old, new = self.baseline.sources, self.plan.signature
        if old == new:
            return
        if self.facts.boot_id != self.baseline.boot_id:
            # Everything counts from zero at the boot anyway.
            self.baseline.sources = new
            return
        earlier = self._plan_of(old)
        if earlier is not None:
            reader = self._new_reader(earlier)
            outcome = usage.step(self.baseline, reader.read(), self.catalogue.tenant_of, self._cadence)
            reader.close()
            base = usage.rebase(outcome.baseline, self._read(), new, self.catalogue.tenant_of)
            self._commit(replace(outcome, baseline=base), complete=True)
        else:
            snapshot = self._read()
            end = self.baseline.end_unix_ns
            gap = Gap(
                end,
                max(end, snapshot.wall_unix_ns),
                int(pb.GAP_REASON_SOURCE_CHANGED),
                len(self.baseline.units),
                f"counters were {old}, are {new}",
            )
            gaps = [*self.baseline.gaps, gap]
            fresh = usage.begin(snapshot, new, self.catalogue.tenant_of, gaps)
            # Rows that wait for a commit are usage already metered: they go on waiting.
            self.baseline = msgspec.structs.replace(
                fresh, held=self.baseline.held, end_unix_ns=max(end, fresh.end_unix_ns)
            )
            self._spool.commit([], _encode(self.baseline))
        log.warning("sources_changed", before=old, now=new)

    def _plan_of(self, signature: str) -> Plan | None:
        for hierarchy in ("v2", "v1"):
            try:
                candidate = plan.make(self.facts, hierarchy)
            except HostError:
                continue
            if candidate.signature == signature:
                return candidate
        return None

    def _lost_spool(self) -> Gap:
        """The undelivered batches of a spool that was set aside: between its last write and now."""
        now = time.time_ns()
        aside = self._spool.set_aside_as
        written = aside.stat().st_mtime_ns if aside is not None and aside.exists() else now
        log.error("spool_set_aside", code=Meter.BUFFER_OVERFLOW, file=str(aside), epoch=self._spool.epoch)
        return Gap(
            min(written, now),
            now,
            int(pb.GAP_REASON_SPOOL_LOST),
            0,
            f"damaged spool kept as {aside.name if aside else 'nothing'}",
        )

    def _new_reader(self, by: Plan) -> CgroupReader:
        return CgroupReader(by, role, host.files_to_keep_open(self._settings.read.max_open_files))


def _cadence(settings: Settings) -> Cadence:
    return Cadence(settings.meter.interval.ns, settings.meter.memory_sample.ns * 2)


def _encode(baseline: Baseline) -> bytes:
    return msgspec.msgpack.encode(baseline)
