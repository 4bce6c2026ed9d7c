"""Source -> books. What a read gives is booked before the next read's position is written down.

    stale marks -> batches -> verdicts -> lost ranges -> progress

A kill between any two leaves the position behind, so the same is read again, and the table's key makes one of two. What
could not be booked stays in hand and is tried again before anything else is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ledger.book.booking import VERDICT_COLUMNS, Chunk, book, repeated
from ledger.book.held import HeldBack
from ledger.book.rows import COLUMNS
from ledger.book.streams import Streams
from ledger.consume.arrival import Arrival, Kind, Source
from ledger.progress import Progress
from ledger.rollup.hours import Hours
from ledger.store.batches import booked_digests
from ledger.store.client import Store, StoreTrouble
from ledger.tally import SOURCE_UNAVAILABLE, STORE_UNAVAILABLE, Tally
from wire.daemon.journal import Journal

CHUNK_BYTES = 8 << 20
"""Of batches: booked as soon as so much is in hand."""
LINGER_SECONDS = 2.0
"""Or when the first of them has waited so long: ClickHouse likes few parts."""

log = Journal("ledger.intake")


class Intake:
    """Of one source and one store."""

    def __init__(
        self,
        source: Source,
        store: Store,
        streams: Streams,
        held: HeldBack,
        hours: Hours,
        progress: Progress,
        tally: Tally,
        trouble: dict[str, str],
        now_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._store = store
        self._streams = streams
        self._held = held
        self._hours = hours
        self._progress = progress
        self._tally = tally
        self._now_seconds = now_seconds
        self._in_hand: list[Arrival] = []
        self._bytes = 0
        self._since = 0.0
        """When the first of them came."""
        self.trouble = trouble
        """Reason -> sentence with the fix, for whoever shows it; empty if all is well."""

    def turn(self, wait_seconds: float) -> int:
        """Read for at most so long and book what is due; how many arrivals were booked. LedgerError: the source needs a
        person. A store that is away is trouble, not an error.
        """
        if self._bytes < CHUNK_BYTES:
            found = self._source.read(CHUNK_BYTES - self._bytes, wait_seconds)
            if found and not self._in_hand:
                self._since = self._now_seconds()
            self._in_hand += found
            self._bytes += sum(len(arrival.body) for arrival in found)
        self._say(SOURCE_UNAVAILABLE, self._source.trouble)
        due = self._bytes >= CHUNK_BYTES or self._now_seconds() - self._since >= LINGER_SECONDS
        if self._in_hand and not due:
            return 0
        return self.finish()

    def finish(self) -> int:
        """Book what is in hand."""
        count = len(self._in_hand)
        try:
            if self._in_hand:
                self._book()
                self._in_hand, self._bytes = [], 0
            if self._source.lost:
                self._progress.lose(self._source.lost)
                for place, (first, last) in self._source.lost.items():
                    log.error("source_lost", place=place, first=first, last=last, code="METER-002")
                self._source.lost.clear()
            self._progress.write(self._source.positions())
        except StoreTrouble as error:
            self._tally.failed_inserts += 1
            self._say(STORE_UNAVAILABLE, str(error))
            return 0
        self._say(STORE_UNAVAILABLE, "")
        return count

    def _book(self) -> None:
        arrivals, tally = self._in_hand, self._tally
        chunk = book(arrivals, self._streams, booked_digests(self._store, repeated(arrivals, self._streams)))
        started = self._now_seconds()
        if chunk.data:
            self._hours.touch(chunk.hours)
            self._store.insert_binary("batches", COLUMNS, b"".join(chunk.data))
        self._store.insert("verdicts", VERDICT_COLUMNS, chunk.verdicts)
        tally.inserted(self._now_seconds() - started)
        for batch in chunk.new:
            self._streams.add(*batch)
        self._held.take(chunk, self._streams)
        self._count(chunk)

    def _count(self, chunk: Chunk) -> None:
        tally = self._tally
        tally.booked_batches += len(chunk.new)
        tally.booked_rows += chunk.rows
        tally.duplicates += chunk.duplicates
        for verdict in chunk.verdicts:
            if verdict.kind == "conflict":
                tally.conflicts += 1
                log.error(
                    "identity_conflict",
                    code="METER-006",
                    agent_id=verdict.agent_id,
                    epoch=verdict.epoch,
                    seq=verdict.seq,
                    digest=verdict.digest.hex(),
                    reason=verdict.reason,
                )
            else:
                tally.verdicts[verdict.kind] = tally.verdicts.get(verdict.kind, 0) + 1
        adopted = sum(1 for arrival in self._in_hand if arrival.kind is Kind.ADOPTED)
        if adopted:
            tally.verdicts["adopted"] = tally.verdicts.get("adopted", 0) + adopted

    def _say(self, reason: str, text: str) -> None:
        if text and self.trouble.get(reason) != text:
            log.error(reason, code="METER-001", trouble=text)
        if not text and reason in self.trouble:
            log.info(f"{reason}_over")
        if text:
            self.trouble[reason] = text
        else:
            self.trouble.pop(reason, None)
