"""The cadence: read, meter, encode, commit, at every multiple of the interval of wall clock.

Everything here runs in one worker thread, which owns the readers, the baseline and what is written to the
spool; the event loop only tells it when. Between two intervals memory is sampled more finely.

Failure model. What cannot be committed is held in the baseline and merged into the next interval: kernel
counters lose nothing by waiting. Only a commit moves the durable baseline, so a kill at any point repeats
the interval from the last one that was committed.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass, field, replace

import msgspec

from agent import __version__
from agent.config import Settings
from agent.meter import batch, usage
from agent.meter.catalogue import Catalogue
from agent.meter.identity import role
from agent.meter.interval import Cadence
from agent.meter.model import ClockState, Snapshot
from agent.meter.rows import ROOT_ID, Usage
from agent.meter.usage import Baseline, Gap, Outcome
from agent.read import host, plan
from agent.read.cgroupfs import CgroupReader
from agent.read.host import HostError, HostFacts
from agent.read.plan import Plan
from agent.read.probes.bpf import BpfError
from agent.read.probes.reader import Probes
from agent.ship.spool import BatchKey, Spool
from agent.ship.spool_file import Opened, SpoolCorrupt, SpoolError, SpoolFull, SpoolUnavailable
from agent.tally import Tally
from wire.daemon.journal import Journal
from wire.statuses import Meter
from wire.v1 import usage_pb2 as pb

LONGER_WHEN_FULL = ((0.95, 60), (0.90, 30), (0.75, 6))
"""(fill of the spool, intervals in one): near the bound rows become longer, and so fewer."""
LONGEST_INTERVAL_SECONDS = 3_600.0
CLOCK_EPOCHS_APART_NS = 3_600 * 10**9
"""A clock that goes back and forth opens no more epochs than this: a collector keeps a thousand of an agent."""

log = Journal("agent.loop")


@dataclass(slots=True)
class LoopState:
    """For status, metrics, readiness and the watchdog."""

    last_reading_unix: float = 0.0
    last_reading_monotonic: float = 0.0
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
        self.probes = probes_of(settings, self.plan)
        self._reader = self._new_reader(self.plan)
        self.baseline: Baseline
        self._was_down = False
        self._clock_followed_boottime_ns: int | None = None

    def start(self) -> bool:
        """Take up the spool and its baseline, or begin one. Nothing is metered before it is durable.

        False while the disk refuses: `state.trouble` says why, call it again. The kernel goes on counting
        meanwhile, so that waiting here costs what a later start would.
        """
        try:
            self._spool.take_up(time.time_ns())
            try:
                self._take_up_baseline()
            except SpoolCorrupt as error:
                # A large spool is not checked as a whole when it is opened.
                self._spool.recover(time.time_ns(), unusable=str(error))
                self._take_up_baseline()
        except SpoolUnavailable as error:
            self._complain(error)
            return False
        return True

    def tick(self) -> bool:
        """One interval. Whether new batches are in the spool."""
        begun = time.perf_counter()
        snapshot = self._read(frozenset(self.baseline.units))
        self._follow_clock(snapshot)
        outcome = usage.step(self.baseline, snapshot, self.catalogue.tenant_of, self._cadence)
        producer = self._producer(self.plan, self._reader.cpu_source, snapshot.complete)
        committed = self._commit(outcome, producer)
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

    def meet_newborn(self) -> None:
        """Learn the labels of containers while they live: the end of a short one may come before its reading."""
        if not self.catalogue.labels.sources:
            return
        try:
            self.catalogue.learn(self.probes.newborn())
        except BpfError as error:
            self.probes.drop(error)

    @property
    def row_seconds(self) -> float:
        """Length of a row as things are."""
        return float(min(self._settings.meter.interval * self.state.stretch, LONGEST_INTERVAL_SECONDS))

    def due_in_seconds(self, now_unix: float) -> float:
        """Time until the next interval ends."""
        length = self.row_seconds
        return length - now_unix % length

    def open_epoch(self, at_least: int, aside_from: BatchKey | None) -> None:
        """Begin a new epoch in spool and baseline: a collector knows this one differently."""
        reopened = usage.reopen(self.baseline)
        self._spool.open_epoch(at_least, time.time_ns(), aside_from, _encode(reopened))
        self.baseline = reopened
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
        self.probes.close()

    def _read(self, known: frozenset[int] = frozenset()) -> Snapshot:
        snapshot = self._reader.read(known)
        self.state.last_reading_unix, self.state.last_reading_monotonic = time.time(), time.monotonic()
        self.state.complete = snapshot.complete
        self.state.units = len(snapshot.units)
        self.state.clock = host.clock_state()[0]
        ended = [end.reading.path for end in snapshot.ends]
        self.catalogue.learn([*(unit.path for unit in snapshot.units), *ended])
        return snapshot

    def _follow_clock(self, snapshot: Snapshot) -> None:
        """Begin a new epoch at the clock's own time when it was set far back. In the old one time would stand still
        until the clock has caught up, and a collector would refuse it all as lying in the future.
        """
        followed = self._clock_followed_boottime_ns
        if followed is not None and snapshot.boottime_ns - followed < CLOCK_EPOCHS_APART_NS:
            return
        reopened = usage.follow_clock(self.baseline, snapshot)
        if reopened is None:
            return
        try:
            self._spool.open_epoch(self._spool.epoch, snapshot.wall_unix_ns, None, _encode(reopened))
        except SpoolError:
            # The commit of this interval fails for the same reason, and says so.
            return
        seconds_behind = (self.baseline.end_unix_ns - snapshot.wall_unix_ns) // 10**9
        self.baseline = reopened
        self._clock_followed_boottime_ns = snapshot.boottime_ns
        log.warning("clock_set_back", seconds_behind=seconds_behind, epoch=self._spool.epoch)

    def _take_up_baseline(self) -> None:
        data = self._spool.load_baseline()
        if data is not None:
            try:
                self.baseline = msgspec.msgpack.decode(data, type=Baseline)
            except msgspec.DecodeError as error:
                raise SpoolCorrupt(f"the baseline in {self._spool.directory} is damaged: {error}") from error
            self._was_down = True
            self._all_well()
            self._take_up_sources()
            return
        self.baseline = usage.begin(self._read(), self.plan.signature, self.catalogue.tenant_of, [])
        self._spool.commit([], _encode(self.baseline))
        self._all_well()
        self._say_what_was_set_aside()
        log.info("metering_begun", units=len(self.baseline.units), epoch=self._spool.epoch)

    def _commit(self, outcome: Outcome, producer: batch.Producer) -> bool:
        try:
            owed = self._spool.owed_gaps(usage.MAX_GAPS - len(outcome.gaps))
            telling = replace(outcome, gaps=[*outcome.gaps, *owed.values()])
            drafts = batch.drafts(telling, producer, self._flags())
            stored = self._spool.commit(drafts, _encode(outcome.baseline), owed)
        except SpoolCorrupt as error:
            if "spool_unavailable" not in self.state.trouble:
                log.error("spool_corrupt", code=Meter.BUFFER_OVERFLOW, error=str(error))
            self._recover(outcome)
            return False
        except SpoolError as error:
            self._hold(outcome, error)
            return False
        self.baseline = outcome.baseline
        self._forget_ends()
        self._was_down = False
        self._all_well()
        self.state.last_commit_unix = time.time()
        self.tally.committed(telling, len(stored), sum(len(b.body) for b in stored))
        self._stretch()
        return bool(stored)

    def _hold(self, outcome: Outcome, error: SpoolError) -> None:
        """Keep the rows in the baseline, durable if the disk allows at least that."""
        self._complain(error)
        self.tally.held_intervals += 1
        self.baseline = usage.hold(outcome, fold_ended=True)
        if isinstance(error, SpoolFull):
            try:
                self._spool.commit([], _encode(self.baseline))
                self._forget_ends()
            except SpoolError as failed:
                log.error("baseline_not_durable", code=Meter.BUFFER_OVERFLOW, error=str(failed))
        self._stretch()

    def _recover(self, outcome: Outcome) -> None:
        """The spool's file is damaged. The baseline is in memory, so nothing but undelivered batches is at stake."""
        try:
            self._spool.recover(time.time_ns())
        except SpoolError as error:
            # Still without a spool: the next interval finds it closed and comes here again.
            self._hold(outcome, error)
            return
        self._say_what_was_set_aside()
        self.tally.held_intervals += 1
        self.baseline = usage.reopen(usage.hold(outcome, fold_ended=False))
        try:
            if self._spool.opened is Opened.ADOPTED:
                self._spool.open_epoch(self._spool.epoch, time.time_ns(), None, _encode(self.baseline))
            else:
                self._spool.commit([], _encode(self.baseline))
        except SpoolError as error:
            self._complain(error)

    def _forget_ends(self) -> None:
        """The baseline is durable: whose last row is in it or before it, the kernel need not remember."""
        self.tally.ends_forgotten += self._reader.forget_ends(self.baseline.closed)

    def _complain(self, error: SpoolError) -> None:
        reason = "spool_full" if isinstance(error, SpoolFull) else "spool_unavailable"
        if reason not in self.state.trouble:
            log.error(reason, code=Meter.BUFFER_OVERFLOW, error=str(error))
        self.state.trouble = {reason: f"{Meter.BUFFER_OVERFLOW}: {error}"}

    def _all_well(self) -> None:
        if self.state.trouble:
            log.info("spool_recovered")
            self.state.trouble = {}

    def _say_what_was_set_aside(self) -> None:
        if self._spool.opened is Opened.SET_ASIDE:
            log.error(
                "spool_set_aside",
                code=Meter.BUFFER_OVERFLOW,
                file=str(self._spool.set_aside_as),
                epoch=self._spool.epoch,
                error=self._spool.damage,
            )

    def _stretch(self) -> None:
        try:
            fill = self._spool.fill()
        except SpoolError:
            return
        share = fill.bytes_used / fill.max_bytes
        stretch = next((n for above, n in LONGER_WHEN_FULL if share >= above), 1)
        if stretch != self.state.stretch:
            log.warning("interval_changed", spool_fill=round(share, 3), intervals_in_one=stretch)
        self.state.stretch = stretch

    def _flags(self) -> int:
        return int(pb.BATCH_FLAG_AGENT_WAS_DOWN) if self._was_down else 0

    def _producer(self, by: Plan, cpu_source: str, complete: bool) -> batch.Producer:
        # A CPU that was there for a part of the interval may have been used.
        cpus, self._cpus = self._cpus, host.online_cpus(self._settings.read.proc_root)
        cpus = max(cpus, self._cpus)
        return batch.Producer(
            host=self._settings.host_name or self.facts.host,
            version=__version__,
            cpus=cpus,
            coverage=by.coverage | (int(pb.COVERAGE_WHOLE_HOST) if complete else 0),
            cpu_source=cpu_source,
            clock_unsynchronised=self.state.clock is ClockState.UNSYNCHRONISED,
            describe=self.catalogue.describe,
        )

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
            with closing(self._new_reader(earlier)) as reader:
                last = reader.read(frozenset(self.baseline.units))
            outcome = usage.step(self.baseline, last, self.catalogue.tenant_of, self._cadence)
            base = usage.rebase(outcome.baseline, self._read(), new, self.catalogue.tenant_of)
            producer = self._producer(earlier, reader.cpu_source, last.complete)
            self._commit(replace(outcome, baseline=base), producer)
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

    def _new_reader(self, by: Plan) -> CgroupReader:
        files = host.files_to_keep_open(self._settings.read.max_open_files)
        return CgroupReader(by, role, files, self.probes if by.tree_is_v2 else None)


def probes_of(settings: Settings, by: Plan) -> Probes:
    """The kernel probes as far as they speak of the cgroups that are metered."""
    if settings.read.probes == "off":
        return Probes(None)
    if not by.tree_is_v2:
        return Probes(None, "units are those of a v1 hierarchy, and the probes see v2 only")
    if by.tree.stat().st_ino != ROOT_ID:
        return Probes(None, f"{by.tree} is not the whole hierarchy: mount the host's")
    return Probes(settings.read.probes_dir)


def _cadence(settings: Settings) -> Cadence:
    return Cadence(settings.meter.interval.ns, settings.meter.memory_sample.ns * 2)


def _encode(baseline: Baseline) -> bytes:
    try:
        return msgspec.msgpack.encode(baseline)
    except UnicodeEncodeError:
        # Somebody's cgroup has a name that is not UTF-8, which the encoding cannot hold.
        for state in baseline.units.values():
            state.reading = msgspec.structs.replace(state.reading, path=_storable(state.reading.path))
        for stretch in baseline.held:
            for row in stretch.usages:
                row.path = _storable(row.path)
        return msgspec.msgpack.encode(baseline)


def _storable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
