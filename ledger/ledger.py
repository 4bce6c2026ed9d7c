"""The ledger: one store, one source, and what can be asked of them. Blocking, and of one thread.

intake      source -> table `batches`, each batch once          intake.py, book/, consume/
rollup      rows -> hours, whole and provable                   rollup/
closing     what is complete -> periods, manifests              closing.py, manifests.py, periods/
proof       does it add up, at every hop                        proof/
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ledger.closing import Closing
from ledger.completeness import Completeness, booked_streams, held_back, hops
from ledger.config import Settings
from ledger.consume.arrival import Source
from ledger.consume.log import LogSource
from ledger.errors import LedgerError
from ledger.intake import CHUNK_BYTES, Intake
from ledger.manifests import Manifests
from ledger.period_books import PeriodBooks
from ledger.periods.bill import bill_lines
from ledger.progress import Progress
from ledger.proof.chain import booked_twice, broken_chains
from ledger.proof.conservation import Conservation
from ledger.proof.finding import Finding
from ledger.proof.rollups import Rollups
from ledger.rollup.hours import Hours
from ledger.store.client import Store
from ledger.store.migrate import migrate
from ledger.tally import Tally
from ledger.usage import By, usage
from wire.daemon.journal import Journal

Answer = dict[str, Any]

MUCH_UNREAD = {"bytes": CHUNK_BYTES, "records": 1_000}
MOST_DIRTY_HOURS = 48
"""Beyond it hours are built all the same: a source that is never caught up with must not keep all of them waiting."""
HOURS_AT_ONCE = 24
"""Built in one turn, so that batches do not wait for long behind a backlog."""
SILENT_SECONDS = 900
"""An agent of which nothing newer is booked is called silent; it has to be asked, not billed differently."""

log = Journal("ledger.ledger")


class Ledger:
    """Open until `close`. LedgerAway from whatever needs a store or a disk that is not there now."""

    def __init__(self, settings: Settings) -> None:
        """Open the store, migrate, derive what is booked. The caller holds the lock."""
        self._settings = settings
        self._store = _store(settings)
        try:
            for name in migrate(self._store):
                log.info("migrated", migration=name)
            self._progress = Progress(self._store)
            self._streams = booked_streams(self._store)
            self._held = held_back(self._store)
            self._completeness = Completeness(self._store, self._streams, self._held)
            self._hours = Hours(self._store)
            books = PeriodBooks(self._store)
            self._manifests = Manifests(self._store, books, settings.periods.length)
            self._closing = Closing(
                self._store, self._completeness, self._hours, books, self._manifests, settings.periods.length
            )
            self._tally = Tally()
            ((reconciled,),) = self._store.query(
                "SELECT max(at_ns) FROM reconciliations WHERE differences = 0"
            )
            self._tally.reconcile_success_unix_ns = reconciled or None
            self._source = _source(settings, self._progress)
        except BaseException:
            self._store.close()
            raise
        self.trouble: dict[str, str] = {}
        """Reason -> sentence with the fix; empty if all is well."""
        self._intake = self._new_intake()
        with contextlib.suppress(LedgerError):  # Reading it says so, and again until it is mended.
            self._measure_lag()

    def _new_intake(self) -> Intake:
        return Intake(
            self._source,
            self._store,
            self._streams,
            self._held,
            self._hours,
            self._progress,
            self._tally,
            self.trouble,
        )

    def consume(self, wait_seconds: float) -> int:
        """Book what came; how many arrivals. LedgerError: the source needs a person."""
        count = self._intake.turn(wait_seconds)
        self._measure_lag()
        return count

    def _measure_lag(self) -> None:
        kafka = self._settings.source.kafka
        name = (kafka.topic, "records") if kafka.brokers else ("log", "bytes")
        self._tally.source_lag = {name: self._source.lag()}

    def roll_up(self) -> int:
        """Build hours that have settled, and look anew at what is complete. How many hours were built."""
        built = 0
        if not self._catches_up or len(self._hours.dirty) > MOST_DIRTY_HOURS:
            before_ns = time.time_ns() - self._settings.rollup.settle.ns
            built = self._hours.build_settled(before_ns, HOURS_AT_ONCE)
        self._tally.rollup_built += built
        self._look()
        return built

    @property
    def _catches_up(self) -> bool:
        """Whether so much is unread that the next chunk would make most hours stale that are built now."""
        return any(lag > MUCH_UNREAD[unit] for (_, unit), lag in self._tally.source_lag.items())

    def _look(self) -> None:
        tally, seen = self._tally, self._closing.look(time.time_ns())
        tally.watermark_unix_ns = seen.watermark_unix_ns
        tally.agents = seen.agents
        tally.silent_agents = sum(
            1 for end in seen.newest_unix_ns.values() if end < time.time_ns() - SILENT_SECONDS * 10**9
        )
        tally.missing_batches = self._streams.missing
        tally.parked_batches = seen.parked
        tally.rejected_batches = seen.rejected
        tally.period = seen.period
        tally.period_end_unix_ns = seen.period_end_unix_ns
        tally.blockers = seen.blockers
        tally.periods_closed = seen.periods_closed
        tally.rollup_dirty_hours = len(self._hours.dirty)
        tally.lost_positions = sum(last - first for _, first, last in self._progress.lost())

    def take_up(self, settings: Settings) -> None:
        """What a reload may change: when hours settle."""
        self._settings = settings

    def recorded(self) -> Tally:
        return self._tally

    def status(self) -> Answer:
        """How far it is, and what it waits for."""
        self._look()
        tally = self._tally
        return {
            "watermark_unix_ns": tally.watermark_unix_ns,
            "agents": tally.agents,
            "silent_agents": tally.silent_agents,
            "streams": len(self._streams),
            "missing_batches": tally.missing_batches,
            "parked_batches": tally.parked_batches,
            "rejected_batches": tally.rejected_batches,
            "source_lag": [
                {"source": name, "unit": unit, "lag": lag} for (name, unit), lag in tally.source_lag.items()
            ],
            "positions": self._progress.positions,
            "period": tally.period,
            "blockers": tally.blockers,
            "periods_closed": tally.periods_closed,
            "rollup_dirty_hours": tally.rollup_dirty_hours,
            "rollup_built_hours": len(self._hours.built),
            "trouble": dict(self.trouble),
        }

    def reconcile(self) -> Answer:
        """Hop by hop: what agents counted against what is booked, batches against numbers, hours against rows."""
        self._intake.finish()
        conservation = Conservation(self._store)
        findings = [*conservation.findings, *broken_chains(self._store), *booked_twice(self._store)]
        findings += [
            Finding(
                "lost", f"{place}: the source deleted {first} to {last} before they were read", last - first
            )
            for place, first, last in self._progress.lost()
        ]
        findings += self._closing.unaccounted()
        stale = self._hours.differing()
        findings += [
            Finding("rollup", f"the hour {hour} was built of other batches than are booked") for hour in stale
        ]
        by_tenant = hops(self._store)
        findings += [
            Finding(
                "refused",
                f"tenant {hop.tenant!r}: {hop.refused} refused, {hop.conflicts} in conflict",
                hop.refused + hop.conflicts,
            )
            for hop in by_tenant
            if hop.refused + hop.conflicts
        ]
        differences = sum(finding.weight for finding in findings)
        now_unix_ns = time.time_ns()
        self._store.insert("reconciliations", ("at_ns", "differences"), [(now_unix_ns, differences)])
        self._tally.reconcile_differences = differences
        if not differences:
            self._tally.reconcile_success_unix_ns = now_unix_ns
        return {
            "ok": not findings,
            "hops": [hop._asdict() for hop in by_tenant],
            "intervals_compared": conservation.intervals,
            "conservation_difference_ns": conservation.difference_ns,
            "streams": len(self._streams),
            "waiting": {"parked": self._tally.parked_batches, "source_lag": self._source.lag()},
            "findings": [finding.as_dict() for finding in findings],
        }

    def verify(self) -> Answer:
        """Everything computed anew: hours from rows, chains, manifests from what is booked."""
        self._intake.finish()
        rollups = Rollups(self._store, self._hours.built)
        self._tally.conservation_difference_ns = rollups.difference_ns
        manifests = self._manifests.verify()
        findings = [
            *rollups.findings,
            *broken_chains(self._store),
            *booked_twice(self._store),
            *manifests.findings,
        ]
        return {
            "ok": not findings,
            "hours_compared": rollups.hours,
            "manifests_compared": manifests.compared,
            "findings": [finding.as_dict() for finding in findings],
        }

    def usage(
        self, start_unix_ns: int, end_unix_ns: int, by: By, tenant: str | None, limit: int
    ) -> list[Answer]:
        """What was used in [start, end), booked so far; sums are numbers of any size."""
        self._intake.finish()
        return usage(self._store, self._hours.dirty, start_unix_ns, end_unix_ns, by, tenant, limit)

    def periods(self) -> list[Answer]:
        return self._closing.periods(time.time_ns())

    def close_period(self, name: str, by: str) -> Answer:
        """The manifest's digest if the period is complete, or its blockers."""
        self._intake.finish()
        return self._closing.close(name, by, time.time_ns())

    def waive(self, period: str, blockers: list[str], reason: str, by: str) -> Answer:
        return self._closing.waive(period, blockers, reason, by)

    def retire(self, agent_id: str, at_unix_ns: int, reason: str, by: str) -> Answer:
        """From then on nothing of this agent is waited for. What comes all the same is booked."""
        if agent_id not in {stream.agent_id for stream, _ in self._streams}:
            raise LedgerError(
                f"no batch of an agent {agent_id!r} is booked: `weighbridge-ledger periods` names those that are"
            )
        self._completeness.retire(agent_id, at_unix_ns, reason, by)
        log.info("agent_retired", agent_id=agent_id, at_unix_ns=at_unix_ns, reason=reason, by=by)
        return {"agent_id": agent_id, "retired_at_unix_ns": at_unix_ns}

    def manifest(self, name: str) -> Answer:
        """The document of a closed period and its digest."""
        manifest = self._manifests.of(name)
        return {"manifest": manifest.canonical().decode(), "digest": manifest.digest().hex()}

    def export(self, name: str) -> list[Answer]:
        """The bill's lines of a closed period."""
        return bill_lines(self._manifests.of(name))

    def reread(self) -> None:
        """Read the source from its beginning. What is booked stays booked, once."""
        self._intake.finish()
        self._progress.forget()
        self._source.close()
        self._source = _source(self._settings, self._progress)
        self._intake = self._new_intake()

    def close(self) -> None:
        """Book what is in hand, if that goes, and let everything go. What was not booked is read again."""
        self._intake.finish()
        self._source.close()
        self._store.close()


def _store(settings: Settings) -> Store:
    memory = int(settings.store.memory)
    server = settings.store.server
    if server is None:
        return Store(settings.database_directory, "", "", settings.store.database, memory)
    password = ""
    if settings.store.password_file is not None:
        try:
            password = settings.store.password_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise LedgerError(
                f"store.password_file {settings.store.password_file}: {error.strerror}; make it readable for this user"
            ) from error
    return Store(None, settings.store.dsn, password, server.database, memory)


def _source(settings: Settings, progress: Progress) -> Source:
    if settings.source.kafka.brokers:
        # One machine needs no Kafka, and then does not load its client.
        from ledger.consume.kafka import KafkaSource

        return KafkaSource(settings.source.kafka, progress.positions)
    return LogSource(settings.source.log_directory, progress.positions)
