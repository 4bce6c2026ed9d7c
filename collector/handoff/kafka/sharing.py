"""What the publisher asks of the other collectors before it publishes, and tells them afterwards.

`decide/claims.py` has the rules. A record that was the first word on its identity may be another collector's as well;
what follows from it in this log (a release, a readmission) and what is kept as evidence is this collector's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress

from collector.decide.claims import AWAY, Claimed, Fate, Ledger, Numbered, Standing, StreamId
from collector.handoff.log import UNVERIFIED, Kind, Record
from wire.daemon.journal import Journal
from wire.statuses import Meter

log = Journal("collector.kafka")

_DELIVERS = frozenset((Fate.PUBLISH, Fate.UNVERIFIED))

Fated = tuple[Record, Fate, Claimed | None]


class Sharing:
    """Of one thread. Without `ledger` there is no other collector."""

    def __init__(self, ledger: Ledger | None, handed_over_end: int) -> None:
        """`handed_over_end`: records before this offset may have been given to a producer."""
        self._ledger = ledger
        self.handed_over_end = handed_over_end
        self._awaited = -1
        """Offset of the record that another collector held when it was asked about last."""
        self.skipped = 0
        """Records that another collector had delivered meanwhile, since the start."""

    def fates(self, records: Sequence[Record], now_ns: int) -> list[Fated]:
        """What to do with each, up to the first that another collector holds. `now_ns`: wall clock."""
        if records and records[0].offset == self._awaited:
            # Claims behind it are left to run out: two collectors that wait for each other must not renew theirs.
            records = [records[0]]
        standings = [self._standing(record, now_ns) for record in records]
        must_claim = [standing.must_claim for standing in standings]
        asked = list(compress(records, must_claim))
        answers = self._ledger.claim_and_wait(by_stream(asked)) if self._ledger is not None and asked else {}
        fates: list[Fated] = []
        for record, standing, must in zip(records, standings, must_claim, strict=True):
            claimed = answers.get((_stream(record), record.seq), AWAY) if must else None
            fate = standing.fate(claimed)
            if fate is Fate.WAIT:
                self._await(record)
                break
            self._tell(record, fate, claimed)
            fates.append((record, fate, claimed))
        return fates

    def to_mark(self, fates: Iterable[Fated]) -> dict[StreamId, list[Numbered]]:
        """What the others are to be told once it is delivered."""
        if self._ledger is None:
            return {}
        return by_stream(record for record, fate, _ in fates if fate in _DELIVERS and first_word(record))

    def delivered(self, batches: dict[StreamId, list[Numbered]]) -> None:
        """The brokers have these. Whoever is answered now, the others know first."""
        if self._ledger is not None and batches:
            self._ledger.mark_and_wait(batches)

    def _standing(self, record: Record, now_ns: int) -> Standing:
        return Standing(
            shared=self._ledger is not None and first_word(record),
            handed_over=record.offset < self.handed_over_end,
            flagged=bool(record.flags & UNVERIFIED),
            claimed_before_ns=now_ns - record.received_at_unix_ns,
        )

    def _await(self, record: Record) -> None:
        if self._awaited != record.offset:
            self._awaited = record.offset
            name = {"agent_id": record.agent_id, "epoch": record.epoch, "seq": record.seq}
            log.warning("claim_awaited", offset=record.offset, **name)

    def _tell(self, record: Record, fate: Fate, claimed: Claimed | None) -> None:
        if fate is Fate.SKIP:
            self.skipped += 1
        elif fate is Fate.REFUSE:
            assert claimed is not None
            log.error(
                "conflict_published",
                code=Meter.IDENTITY_CONFLICT,
                agent_id=record.agent_id,
                epoch=record.epoch,
                seq=record.seq,
                digest=record.digest.hex(),
                known=claimed.known.hex(),
            )


def first_word(record: Record) -> bool:
    """Whether this record is what made its identity known."""
    if record.kind is Kind.ACCEPTED:
        return not record.note  # else it says how the batch came in after all
    return record.kind in (Kind.PARKED, Kind.REJECTED)


def by_stream(records: Iterable[Record]) -> dict[StreamId, list[Numbered]]:
    batches: dict[StreamId, list[Numbered]] = {}
    for record in records:
        batches.setdefault(_stream(record), []).append((record.seq, record.digest))
    return batches


def _stream(record: Record) -> StreamId:
    return StreamId(record.agent_id, record.epoch)
