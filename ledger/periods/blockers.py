"""What keeps a period from being complete, each with a name that an operator can waive. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from ledger.periods.calendar import Period
from ledger.periods.streams import ENDLESS_UNIX_NS, UNKNOWN_START_UNIX_NS, Held, Stream
from ledger.periods.unknown import Kind, Unknown, unknowns

_FIX = {
    Kind.SILENT: "start it, wait for its spool to drain, or `retire` it if the host is gone",
    Kind.MISSING: "they wait in the agent's spool, or in its quarantine: `usage-replay` sends them again",
    Kind.PARKED: "they are booked as the tenant's tokens refill; a larger rate in its plan makes it sooner",
    Kind.REJECTED: "mend what the reason says and let them in: `weighbridge-collector log readmit`",
    Kind.CONFLICT: "one of two spools with the same identity is a copy: see the agent's quarantine",
}


class Blocker(Unknown, frozen=True, forbid_unknown_fields=True):
    """An `Unknown` that may lie in a period. What nothing bounds ends with the period."""

    @property
    def sentence(self) -> str:
        """For an operator: what, whose, when, and what can be done."""
        many = self.last_seq > self.first_seq
        batches = f"batches {self.first_seq} to {self.last_seq}" if many else f"batch {self.first_seq}"
        stream = f"of epoch {self.epoch} of agent {self.agent_id}"
        since, until = utc(self.start_unix_ns), utc(self.end_unix_ns)
        if self.kind is Kind.SILENT:
            known = self.start_unix_ns != UNKNOWN_START_UNIX_NS
            has = f"has told nothing from {since} on" if known else "has told nothing that could be read"
            return f"agent {self.agent_id} {has} (epoch {self.epoch}): {_FIX[self.kind]}"
        if self.kind is Kind.MISSING:
            what = f"{batches} {stream} did not arrive"
        else:
            whose = f" for tenant {self.tenant}" if self.tenant else ""
            why = f" ({self.reason})" if self.reason else ""
            verdict = "in conflict" if self.kind is Kind.CONFLICT else str(self.kind)
            what = f"{batches} {stream}{whose} {'are' if many else 'is'} {verdict}{why}"
        when = f"until {until}" if self.start_unix_ns == UNKNOWN_START_UNIX_NS else f"from {since} to {until}"
        return f"{what}, {when} at most: {_FIX[self.kind]}"


class Waiver(msgspec.Struct, frozen=True):
    """An operator's word that a period may be closed without something."""

    period: str
    blocker_id: str
    reason: str
    by: str


class Waived(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A blocker that a period was closed over; part of its manifest."""

    blocker: Blocker
    reason: str
    by: str


def blockers(
    period: Period, streams: Iterable[Stream], held: Iterable[Held], retired: Mapping[str, int]
) -> list[Blocker]:
    """What may lie in the period and is not booked, in the order of (agent_id, epoch, first_seq, kind). Empty: the
    period is complete. `retired` is agent -> unix ns, see `unknowns`.
    """
    return [
        _clipped(unknown, period)
        for found in unknowns(streams, held, retired).values()
        for unknown in found
        if period.overlaps(unknown.start_unix_ns, unknown.end_unix_ns)
    ]


def excused(
    period: Period, streams: Sequence[Stream], held: Sequence[Held], retired: Mapping[str, int]
) -> list[Blocker]:
    """The silences that only retirement keeps from blocking. A manifest names them among what was waived, or the last
    minutes of a host would leave no trace.
    """
    blocking = {blocker.id for blocker in blockers(period, streams, held, retired)}
    return [b for b in blockers(period, streams, held, {}) if b.id not in blocking]


def open_and_waived(
    period: Period, found: Iterable[Blocker], waivers: Iterable[Waiver]
) -> tuple[list[Blocker], list[Waived]]:
    """Blockers of `period` that nobody waived, and those that somebody did, in their order. A waiver for another
    period or for a blocker that is no longer there does nothing; of two for the same one the first counts.
    """
    words: dict[str, Waiver] = {}
    for waiver in waivers:
        if waiver.period == period.name:
            words.setdefault(waiver.blocker_id, waiver)
    still: list[Blocker] = []
    waived: list[Waived] = []
    for blocker in found:
        word = words.get(blocker.id)
        if word is None:
            still.append(blocker)
        else:
            waived.append(Waived(blocker, word.reason, word.by))
    return still, waived


def utc(unix_ns: int) -> str:
    """As an operator reads it, to the second and rounded down: 2026-11-21T14:00:00Z."""
    return datetime.fromtimestamp(unix_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _clipped(unknown: Unknown, period: Period) -> Blocker:
    fields = msgspec.structs.asdict(unknown)
    if unknown.end_unix_ns == ENDLESS_UNIX_NS:
        fields["end_unix_ns"] = period.end_unix_ns
    return Blocker(**fields)
