"""The manifests in the store: written once, read back, and compared with what is booked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ledger.errors import LedgerError
from ledger.period_books import PeriodBooks
from ledger.periods.calendar import Length, Period, parse
from ledger.periods.chain import named, verify_chain
from ledger.periods.manifest import Account, Manifest, Range
from ledger.periods.manifest import parse as parse_manifest
from ledger.periods.spans import subtract
from ledger.periods.streams import Span
from ledger.proof.finding import Finding
from ledger.store.batches import booked_digests
from ledger.store.client import Store
from wire.identity import is_agent_id


class Verified(NamedTuple):
    compared: int
    findings: list[Finding]


class Manifests:
    """Of one store, whose periods are of one length. LedgerError names the fix."""

    def __init__(self, store: Store, books: PeriodBooks, length: Length) -> None:
        self._store = store
        self._books = books
        self._length = length

    def all(self) -> list[Manifest]:
        """Oldest period first."""
        return [parse_manifest(document) for document in self._documents()]

    def closed_periods(self) -> list[str]:
        """Names, oldest first: a look needs no more of them, and documents are long."""
        return [
            name for (name,) in self._store.query("SELECT DISTINCT period FROM manifests ORDER BY period")
        ]

    def of(self, name: str) -> Manifest:
        period = parse(name, self._length)
        for manifest in self.all():
            if manifest.period == period.name:
                return manifest
        raise LedgerError(f"{period.name} is not closed: `weighbridge-ledger close {period.name}`")

    def write(self, manifest: Manifest) -> None:
        self._store.insert(
            "manifests",
            ("period", "digest", "closed_at_ns", "manifest"),
            [(manifest.period, manifest.digest(), manifest.closed_at_unix_ns, manifest.canonical().decode())],
        )

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
            findings += self._unlike_the_books(parse(name, self._length), manifests)
        return Verified(len(documents), findings)

    def _unlike_the_books(self, period: Period, manifests: Iterable[Manifest]) -> Iterator[Finding]:
        """What manifests bill of a period against what is booked of it."""
        booked = [r.span for r in self._books.ranges(period)]
        for manifest in manifests:
            bills = [(manifest.ranges, manifest.accounts)] if manifest.period == period.name else []
            bills += [(a.ranges, a.accounts) for a in manifest.adjustments if a.period == period.name]
            for ranges, accounts in bills:
                if wrong := self._not_booked(ranges, booked):
                    text = f"batches of {period.name} that it bills are not booked as it says: {wrong}"
                    yield Finding("manifest", f"{manifest.period}: {text}")
                    continue
                found = self._books.accounts(period, [r.span for r in ranges], booked)
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

    def _documents(self) -> list[bytes]:
        """Manifests as they are stored, oldest period first."""
        return [
            document.encode()
            for (document,) in self._store.query(
                "SELECT manifest FROM manifests FINAL ORDER BY period, closed_at_ns"
            )
        ]


def _tenant(account: Account) -> str:
    return account.tenant
