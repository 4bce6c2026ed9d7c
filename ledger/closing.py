"""Periods: what keeps them open, and the manifest that closes one. The tables' side of `periods/`, which decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ledger.completeness import Completeness
from ledger.errors import LedgerError
from ledger.manifests import Manifests
from ledger.period_books import PeriodBooks
from ledger.periods.blockers import Blocker, Waiver, blockers, excused, open_and_waived
from ledger.periods.blockers import Waived as WaivedBlocker
from ledger.periods.calendar import Length, Period, following, parse, period_of
from ledger.periods.chain import billed, late
from ledger.periods.manifest import Account, Adjustment, Manifest, Recovered
from ledger.periods.streams import Stream
from ledger.periods.unknown import Kind, unknowns
from ledger.periods.watermark import watermark
from ledger.proof.finding import Finding, bounded
from ledger.recovery import recovered_until
from ledger.rollup.hours import Hours
from ledger.store.client import Store, now_ns
from ledger.usage import totals
from wire.daemon.journal import Journal
from wire.measures import MEASURES

Answer = dict[str, Any]
MAX_BLOCKERS_SHOWN = 1_000
MAX_PERIODS_SHOWN = 400

log = Journal("ledger.closing")


class Seen(NamedTuple):
    """How complete the books are at one instant."""

    watermark_unix_ns: int | None
    agents: int
    newest_unix_ns: dict[str, int]
    """Agent that is not retired -> end of its last interval that is booked."""
    parked: int
    rejected: int
    period: str
    """The oldest that has ended and is not closed; empty: none."""
    period_end_unix_ns: int | None
    blockers: int
    """Of it, not waived."""
    periods_closed: int


class Closing:
    """Of one store. LedgerError names the fix; StoreTrouble from everything."""

    def __init__(
        self,
        store: Store,
        completeness: Completeness,
        hours: Hours,
        books: PeriodBooks,
        manifests: Manifests,
        length: Length,
    ) -> None:
        self._store = store
        self._completeness = completeness
        self._hours = hours
        self._length = length
        self._books = books
        self._manifests = manifests

    def look(self, now_unix_ns: int) -> Seen:
        streams, held = self._completeness.streams(), self._completeness.held()
        retired, waivers = self._completeness.retired(), self._waivers()
        closed = self._manifests.closed_periods()
        newest: dict[str, int] = {}
        for stream in streams:
            if stream.agent_id not in retired:
                end = max(run.end_unix_ns for run in stream.runs)
                newest[stream.agent_id] = max(end, newest.get(stream.agent_id, 0))
        period = self._due(streams, closed, now_unix_ns)
        still: list[Blocker] = []
        if period is not None:
            still, _ = open_and_waived(period, blockers(period, streams, held, retired), waivers)
        marks = watermark(streams, held, retired, {waiver.blocker_id for waiver in waivers})
        return Seen(
            marks.overall,
            len(newest),
            newest,
            sum(1 for one in held if one.kind == "parked"),
            sum(1 for one in held if one.kind == "rejected"),
            period.name if period else "",
            period.end_unix_ns if period else None,
            len(still),
            len(closed),
        )

    def unaccounted(self) -> list[Finding]:
        """Batches that nobody waived and that will not come by themselves: later ones of their stream arrived, or the
        collector rejected them. Parked ones are on their way."""
        waived = {waiver.blocker_id for waiver in self._waivers()}
        found = unknowns(
            self._completeness.streams(), self._completeness.held(), self._completeness.retired()
        )
        open_ones = [u for one in found.values() for u in one if u.id not in waived]
        missing = [
            f"agent {u.agent_id}, epoch {u.epoch}: batches {u.first_seq} to {u.last_seq} have not arrived"
            for u in open_ones
            if u.kind is Kind.MISSING
        ]
        rejected = [
            f"agent {u.agent_id}, epoch {u.epoch}: batch {u.first_seq} was rejected ({u.reason}):"
            " `weighbridge-collector log readmit` lets it in, `waive` closes without it"
            for u in open_ones
            if u.kind is Kind.REJECTED
        ]
        return [*bounded("missing", missing, len(missing)), *bounded("rejected", rejected, len(rejected))]

    def periods(self, now_unix_ns: int) -> list[Answer]:
        """The last that were closed, and those behind them up to the running one, oldest first: MAX_PERIODS_SHOWN of each."""
        streams, held = self._completeness.streams(), self._completeness.held()
        retired, waivers, manifests = self._completeness.retired(), self._waivers(), self._manifests.all()
        out = [
            {
                "period": manifest.period,
                "state": "closed",
                "closed_at_unix_ns": manifest.closed_at_unix_ns,
                "by": manifest.by,
                "digest": manifest.digest().hex(),
                "batches": sum(account.batches for account in manifest.accounts),
                "waived": len(manifest.waived),
                "adjustments": len(manifest.adjustments),
            }
            for manifest in manifests[-MAX_PERIODS_SHOWN:]
        ]
        most = len(out) + MAX_PERIODS_SHOWN
        period = self._first_open(streams, [manifest.period for manifest in manifests])
        while period is not None and period.start_unix_ns <= now_unix_ns and len(out) < most:
            still, waived = open_and_waived(period, blockers(period, streams, held, retired), waivers)
            ended = period.end_unix_ns <= now_unix_ns
            out.append(
                {
                    "period": period.name,
                    "state": "running" if not ended else "incomplete" if still else "complete",
                    "start_unix_ns": period.start_unix_ns,
                    "end_unix_ns": period.end_unix_ns,
                    "blockers": _shown(still) if ended else [],
                    "waived": len(waived),
                }
            )
            period = following(period)
        return out

    def close(self, name: str, by: str, now_unix_ns: int) -> Answer:
        """{"closed": True, "digest": …} once it is closed, by whomever; {"closed": False, "blockers": […]} while it is not
        complete. Periods are closed in order."""
        period, manifests = self._parse(name), self._manifests.all()
        for manifest in manifests:
            if manifest.period == period.name:
                return {
                    "closed": True,
                    "period": period.name,
                    "digest": manifest.digest().hex(),
                    "by": manifest.by,
                }
        if period.end_unix_ns > now_unix_ns:
            raise LedgerError(f"{period.name} has not ended: a running period cannot be closed")
        if manifests and following(self._parse(manifests[-1].period)) != period:
            after = following(self._parse(manifests[-1].period)).name
            raise LedgerError(f"periods are closed in order, and {after} comes next: close that one first")
        streams, held, retired = (
            self._completeness.streams(),
            self._completeness.held(),
            self._completeness.retired(),
        )
        if not manifests and (first := self._first_open(streams, [])) is not None and first < period:
            raise LedgerError(
                f"periods are closed in order, and there is usage of {first.name}: close that one first"
            )
        still, waived = open_and_waived(period, blockers(period, streams, held, retired), self._waivers())
        if still:
            return {"closed": False, "period": period.name, "blockers": _shown(still)}
        words = self._completeness.retirements()
        gone = [
            WaivedBlocker(b, f"retired: {words[b.agent_id].reason}", words[b.agent_id].by)
            for b in excused(period, streams, held, retired)
        ]
        self._refuse_doubles(period)
        manifest = self._manifest(period, manifests, [*waived, *gone], by, now_unix_ns)
        self._manifests.write(manifest)
        log.info("period_closed", period=period.name, digest=manifest.digest().hex(), by=by)
        return {"closed": True, "period": period.name, "digest": manifest.digest().hex(), "by": by}

    def waive(self, name: str, blocker_ids: Sequence[str], reason: str, by: str) -> Answer:
        """Take blockers of a period upon oneself, all or none. They have to stand, and the period to be open."""
        period = self._parse(name)
        if any(manifest.period == period.name for manifest in self._manifests.all()):
            raise LedgerError(f"{period.name} is closed: what comes now is an adjustment of the next period")
        standing = blockers(
            period, self._completeness.streams(), self._completeness.held(), self._completeness.retired()
        )
        found = {blocker.id: blocker for blocker in standing}
        if strange := next((each for each in blocker_ids if each not in found), None):
            raise LedgerError(
                f"{period.name} has no blocker {strange!r}: `weighbridge-ledger close {period.name}` lists them."
                " Nothing is waived"
            )
        chosen = [found[each] for each in dict.fromkeys(blocker_ids)]
        self._store.insert(
            "waivers",
            ("period", "blocker", "reason", "waived_by", "waived_at_ns"),
            [(period.name, blocker.id, reason, by, now_ns()) for blocker in chosen],
        )
        for blocker in chosen:
            log.info(
                "waived",
                period=period.name,
                blocker=blocker.id,
                sentence=blocker.sentence,
                reason=reason,
                by=by,
            )
        return {"period": period.name, "waived": _shown(chosen), "reason": reason, "by": by}

    def _manifest(
        self,
        period: Period,
        manifests: Sequence[Manifest],
        waived: Sequence[WaivedBlocker],
        by: str,
        now_unix_ns: int,
    ) -> Manifest:
        accounts = self._books.accounts(period)
        self._compare_with_hours(period, accounts)
        adjustments = []
        for other in self._earlier(period, manifests):
            ranges = self._books.ranges(other)
            booked = [r.span for r in ranges]
            spans = late(booked, billed(manifests, other.name))
            if spans:
                adjustments.append(
                    Adjustment(
                        other.name,
                        tuple(self._books.ranges(other, spans, booked)),
                        tuple(self._books.accounts(other, spans, booked)),
                    )
                )
        return Manifest(
            period=period.name,
            previous_digest=manifests[-1].digest() if manifests else b"",
            closed_at_unix_ns=now_unix_ns,
            by=by,
            ranges=tuple(self._books.ranges(period)),
            accounts=tuple(accounts),
            waived=tuple(waived),
            adjustments=tuple(adjustments),
            recovered=tuple(self._recovered(period, manifests)),
        )

    def _earlier(self, period: Period, manifests: Sequence[Manifest]) -> Iterator[Period]:
        """Periods that come no more: those that are closed, and those from before the first that was. Usage of the latter is
        billed as late, or it would never be."""
        if not manifests:
            return
        other = self._parse(manifests[0].period)
        if (oldest := self._oldest(self._completeness.streams())) is not None:
            other = min(other, period_of(oldest, self._length))
        while other < period:
            yield other
            other = following(other)

    def _refuse_doubles(self, period: Period) -> None:
        """LedgerError: an identity that is there twice must not be billed twice, and nobody here can tell which is right."""
        found = self._books.booked_twice(period)
        if found:
            raise LedgerError(
                f"{period.name} cannot be closed: {found[0].text}. Two ledgers wrote to one store. Stop one, find out with the"
                " agent's spool or the collector's log which bytes are right, and delete the others from table `batches`"
            )

    def _recovered(self, period: Period, manifests: Iterable[Manifest]) -> list[Recovered]:
        """What openings up to the period's end say, less what earlier manifests have billed of it."""
        found = recovered_until(self._store, period.end_unix_ns)
        for manifest in manifests:
            for one in manifest.recovered:
                of_tenant = found.setdefault(one.tenant, {})
                for measure, value in one.sums.items():
                    of_tenant[measure] = of_tenant.get(measure, 0) - value
        return [
            Recovered(tenant, {measure: value for measure, value in values.items() if value})
            for tenant, values in sorted(found.items())
            if any(values.values())
        ]

    def _compare_with_hours(self, period: Period, accounts: Iterable[Account]) -> None:
        """Two ways to the same sums. LedgerError if they differ: then nothing is closed."""
        one = totals(self._store, self._hours.dirty, period.start_unix_ns, period.end_unix_ns)
        other = {account.tenant: {m: account.sums.get(m, 0) for m in MEASURES} for account in accounts}
        if one != other:
            raise LedgerError(
                f"{period.name}: its hours are not the sums of its batches; `weighbridge-ledger verify` names them"
            )

    def _parse(self, name: str) -> Period:
        return parse(name, self._length)

    def _due(self, streams: Sequence[Stream], closed: Sequence[str], now_unix_ns: int) -> Period | None:
        period = self._first_open(streams, closed)
        return period if period is not None and period.end_unix_ns <= now_unix_ns else None

    def _first_open(self, streams: Sequence[Stream], closed: Sequence[str]) -> Period | None:
        """The oldest that is not closed; None while nothing is booked."""
        if closed:
            return following(self._parse(closed[-1]))
        oldest = self._oldest(streams)
        return None if oldest is None else period_of(oldest, self._length)

    def _oldest(self, streams: Sequence[Stream]) -> int | None:
        return min((run.start_unix_ns for stream in streams for run in stream.runs), default=None)

    def _waivers(self) -> list[Waiver]:
        return [
            Waiver(*row)
            for row in self._store.query(
                "SELECT period, blocker, reason, waived_by FROM waivers FINAL ORDER BY waived_at_ns"
            )
        ]


def _shown(found: Sequence[Blocker]) -> list[Answer]:
    return [
        {
            "id": b.id,
            "kind": str(b.kind),
            "agent_id": b.agent_id,
            "epoch": b.epoch,
            "first_seq": b.first_seq,
            "last_seq": b.last_seq,
            "sentence": b.sentence,
        }
        for b in found[:MAX_BLOCKERS_SHOWN]
    ]
