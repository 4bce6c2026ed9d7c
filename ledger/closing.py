"""Periods: what keeps them open, and the manifest that closes one. The tables' side of `periods/`, which decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ledger.completeness import Completeness
from ledger.errors import LedgerError
from ledger.periods.bill import bill_lines
from ledger.periods.blockers import Blocker, Waiver, blockers, excused, open_and_waived
from ledger.periods.blockers import Waived as WaivedBlocker
from ledger.periods.calendar import Length, Period, following, parse, period_of
from ledger.periods.chain import billed, late, named, verify_chain
from ledger.periods.manifest import Account, Adjustment, Manifest, Range, Recovered
from ledger.periods.manifest import parse as parse_manifest
from ledger.periods.spans import subtract
from ledger.periods.streams import Span, Stream
from ledger.periods.unknown import Kind, unknowns
from ledger.periods.watermark import watermark
from ledger.proof.chain import booked_twice
from ledger.proof.finding import Finding, bounded
from ledger.recovery import recovered_until
from ledger.rollup.hours import Hours
from ledger.rollup.parts import parts, sums
from ledger.store.batches import booked_digests
from ledger.store.client import Store, now_ns
from ledger.usage import totals
from wire.daemon.journal import Journal
from wire.identity import is_agent_id
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


class Verified(NamedTuple):
    compared: int
    findings: list[Finding]


class Closing:
    """Of one store. LedgerError names the fix; StoreTrouble from everything."""

    def __init__(self, store: Store, completeness: Completeness, hours: Hours, length: Length) -> None:
        self._store = store
        self._completeness = completeness
        self._hours = hours
        self._length = length

    def look(self, now_unix_ns: int) -> Seen:
        streams, held = self._completeness.streams(), self._completeness.held()
        retired, waivers = self._completeness.retired(), self._waivers()
        closed = self._closed_periods()
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
            f"agent {u.agent_id}, epoch {u.epoch}: batch {u.first_seq} was rejected ({u.reason})"
            for u in open_ones
            if u.kind is Kind.REJECTED
        ]
        return [*bounded("missing", missing, len(missing)), *bounded("rejected", rejected, len(rejected))]

    def periods(self, now_unix_ns: int) -> list[Answer]:
        """The last that were closed, and those behind them up to the running one, oldest first: MAX_PERIODS_SHOWN of each."""
        streams, held = self._completeness.streams(), self._completeness.held()
        retired, waivers, manifests = self._completeness.retired(), self._waivers(), self._manifests()
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
        period, manifests = self._parse(name), self._manifests()
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
        self._write(manifest)
        log.info("period_closed", period=period.name, digest=manifest.digest().hex(), by=by)
        return {"closed": True, "period": period.name, "digest": manifest.digest().hex(), "by": by}

    def waive(self, name: str, blocker_id: str, reason: str, by: str) -> Answer:
        """Take a blocker of a period upon oneself. It has to stand, and the period to be open."""
        period = self._parse(name)
        if any(manifest.period == period.name for manifest in self._manifests()):
            raise LedgerError(f"{period.name} is closed: what comes now is an adjustment of the next period")
        found = blockers(
            period, self._completeness.streams(), self._completeness.held(), self._completeness.retired()
        )
        chosen = next((blocker for blocker in found if blocker.id == blocker_id), None)
        if chosen is None:
            raise LedgerError(
                f"{period.name} has no blocker {blocker_id!r}: `weighbridge-ledger periods` lists them"
            )
        self._store.insert(
            "waivers",
            ("period", "blocker", "reason", "waived_by", "waived_at_ns"),
            [(period.name, blocker_id, reason, by, now_ns())],
        )
        log.info(
            "waived", period=period.name, blocker=blocker_id, sentence=chosen.sentence, reason=reason, by=by
        )
        return {"period": period.name, "blocker": _shown([chosen])[0], "reason": reason, "by": by}

    def manifest(self, name: str) -> Answer:
        """The document of a closed period and its digest."""
        manifest = self._closed(name)
        return {"manifest": manifest.canonical().decode(), "digest": manifest.digest().hex()}

    def lines(self, name: str) -> list[Answer]:
        return bill_lines(self._closed(name))

    def verify(self) -> Verified:
        """Manifests as documents, and against what is booked: the same batches, the same sums."""
        documents = self._documents()
        findings = [
            Finding(f"manifest_{fault}", f"{period}: {text}")
            for fault, period, text in verify_chain(documents)
        ]
        if any(finding.kind == "manifest_unreadable" for finding in findings):
            return Verified(len(documents), findings)
        manifests = [parse_manifest(document) for document in documents]
        for name in sorted({p for m in manifests for p in (m.period, *(a.period for a in m.adjustments))}):
            findings += self._unlike_the_books(self._parse(name), manifests)
        return Verified(len(documents), findings)

    def _unlike_the_books(self, period: Period, manifests: Iterable[Manifest]) -> Iterator[Finding]:
        """What manifests bill of a period against what is booked of it."""
        booked = [r.span for r in self._ranges(period, None)]
        for manifest in manifests:
            bills = [(manifest.ranges, manifest.accounts)] if manifest.period == period.name else []
            bills += [(a.ranges, a.accounts) for a in manifest.adjustments if a.period == period.name]
            for ranges, accounts in bills:
                if wrong := self._not_booked(ranges, booked):
                    text = f"batches of {period.name} that it bills are not booked as it says: {wrong}"
                    yield Finding("manifest", f"{manifest.period}: {text}")
                    continue
                found = self._accounts(period, [r.span for r in ranges], booked)
                if sorted(found, key=_tenant) != sorted(accounts, key=_tenant):
                    text = f"what it bills of {period.name} is not the sum of its batches"
                    yield Finding("manifest", f"{manifest.period}: {text}")

    def _not_booked(self, ranges: Sequence[Range], booked: Sequence[Span]) -> str:
        """The first that is not there, or ends with another digest; empty: all are as they say."""
        if strange := next((r for r in ranges if not is_agent_id(r.agent_id)), None):
            return f"there is no agent {strange.agent_id[:64]!r}"
        if gone := subtract([r.span for r in ranges], booked):
            return named(gone[0])
        ends = {(r.agent_id, r.epoch, r.last_seq): r for r in ranges}
        found = booked_digests(self._store, list(ends))
        other = next((r for at, r in ends.items() if found.get(at) != {r.last_digest}), None)
        return f"the last of {named(other.span)} has another digest" if other else ""

    def _manifest(
        self,
        period: Period,
        manifests: Sequence[Manifest],
        waived: Sequence[WaivedBlocker],
        by: str,
        now_unix_ns: int,
    ) -> Manifest:
        accounts = self._accounts(period, None, ())
        self._compare_with_hours(period, accounts)
        adjustments = []
        for other in self._earlier(period, manifests):
            ranges = self._ranges(other, None)
            booked = [r.span for r in ranges]
            spans = late(booked, billed(manifests, other.name))
            if spans:
                adjustments.append(
                    Adjustment(
                        other.name,
                        tuple(self._ranges(other, _only(spans, booked))),
                        tuple(self._accounts(other, spans, booked)),
                    )
                )
        return Manifest(
            period=period.name,
            previous_digest=manifests[-1].digest() if manifests else b"",
            closed_at_unix_ns=now_unix_ns,
            by=by,
            ranges=tuple(self._ranges(period, None)),
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
        found = booked_twice(self._store, _within(period, None))
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

    def _ranges(self, period: Period, only: str | None) -> list[Range]:
        """What is booked of a period (and meets a condition), as maximal ranges."""
        found = self._store.query(f"""
            SELECT toString(agent_id), epoch, min(seq), max(seq), count(), argMax(hex(digest), seq)
            FROM (
                SELECT agent_id, epoch, seq, digest,
                    seq - row_number() OVER (PARTITION BY agent_id, epoch ORDER BY seq) AS island
                FROM (
                    SELECT agent_id, epoch, seq, min(digest) AS digest FROM batches WHERE {_within(period, only)}
                    GROUP BY agent_id, epoch, seq
                )
            )
            GROUP BY agent_id, epoch, island ORDER BY agent_id, epoch, min(seq)""")
        return [
            Range(agent, epoch, first, last, batches, bytes.fromhex(digest))
            for agent, epoch, first, last, batches, digest in found
        ]

    def _accounts(
        self, period: Period, spans: Sequence[Span] | None, booked: Sequence[Span]
    ) -> list[Account]:
        """By tenant. Of these spans only, if given: of the period's spans in `booked`, which have to contain them."""
        start, end = period.start_unix_ns, period.end_unix_ns
        only = None if spans is None else _only(spans, booked)
        values = {
            tenant: dict(zip(MEASURES, found, strict=True))
            for tenant, *found in self._store.query(
                f"SELECT tenant, {sums()} FROM ({parts(start, end, None, only or '')}) GROUP BY tenant"
            )
        }
        return [
            Account(tenant, batches, rows, {m: int(v) for m, v in values.get(tenant, {}).items() if v})
            for tenant, batches, rows in self._store.query(
                "SELECT tenant, count(), sum(length(units.known)) FROM batches FINAL"
                f" WHERE {_within(period, only)} GROUP BY tenant ORDER BY tenant"
            )
        ]

    def _write(self, manifest: Manifest) -> None:
        self._store.insert(
            "manifests",
            ("period", "digest", "closed_at_ns", "manifest"),
            [(manifest.period, manifest.digest(), manifest.closed_at_unix_ns, manifest.canonical().decode())],
        )

    def _closed(self, name: str) -> Manifest:
        period = self._parse(name)
        for manifest in self._manifests():
            if manifest.period == period.name:
                return manifest
        raise LedgerError(f"{period.name} is not closed: `weighbridge-ledger close {period.name}`")

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

    def _documents(self) -> list[bytes]:
        """Manifests as they are stored, oldest period first."""
        return [
            document.encode()
            for (document,) in self._store.query(
                "SELECT manifest FROM manifests FINAL ORDER BY period, closed_at_ns"
            )
        ]

    def _closed_periods(self) -> list[str]:
        """Names, oldest first: a look needs no more of them, and documents are long."""
        return [
            name for (name,) in self._store.query("SELECT DISTINCT period FROM manifests ORDER BY period")
        ]

    def _manifests(self) -> list[Manifest]:
        return [parse_manifest(document) for document in self._documents()]


def _within(period: Period, only: str | None) -> str:
    overlaps = f"interval_end_ns > {period.start_unix_ns} AND interval_start_ns < {period.end_unix_ns}"
    return overlaps if only is None else f"{overlaps} AND ({only})"


def _only(spans: Sequence[Span], booked: Sequence[Span]) -> str:
    """A condition that of `booked` holds for `spans`, which are among them. ClickHouse keeps each batch that it names in
    memory: so it names the fewer, those or the others. Most often a manifest bills everything, and there are none."""
    others = subtract(booked, spans)
    if _batches(others) < _batches(spans):
        return f"NOT ({_among(others)})"
    return _among(spans)


def _batches(spans: Iterable[Span]) -> int:
    return sum(span.last_seq - span.first_seq + 1 for span in spans)


def _among(spans: Sequence[Span]) -> str:
    if not spans:
        return "false"
    assert all(is_agent_id(span.agent_id) for span in spans)
    listed = ", ".join(f"('{s.agent_id}', {s.epoch}, {s.first_seq}, {s.last_seq})" for s in spans)
    return (
        "(agent_id, epoch, seq) IN (SELECT toUUID(s.1), toUInt64(s.2), arrayJoin(range(toUInt64(s.3), toUInt64(s.4) + 1))"
        f" FROM (SELECT arrayJoin([{listed}]) AS s))"
    )


def _tenant(account: Account) -> str:
    return account.tenant


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
