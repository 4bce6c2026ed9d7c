"""Parked batches come back: read from their place in the log, appended to it once more, as released.

The log is the truth. A PARKED record puts a batch at the end of its tenant's queue, a RELEASED record with the
same bytes takes it, and all before it, out. So the queues are a function of the log (`restore`), and a crash
between the two records leaves the batch in the queue: released once, whatever happens.

Failure model. A group that the disk refuses goes back to the heads of its queues. A PARKED record that no
longer verifies is named in the journal and skipped; its place in the log stays for a person to mend.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

from collector.decide.admission import Account, Admission, Parked, weight
from collector.handoff.log import DurableLog, Kind, Record, frame, records_at
from collector.handoff.park_notes import read_note
from collector.tally import Tally
from wire.daemon.journal import Journal

GROUP_BATCHES, GROUP_BYTES = 256, 4 << 20
"""Released in one go: what arrives meanwhile waits for one such write at most."""
LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.02, 0.25
TROUBLE_SECONDS = 1.0

log = Journal("collector.park")


def restore(admission: Admission, record: Record, now_ns: int) -> None:
    """Take up a PARKED or RELEASED record that the checkpoint does not know."""
    note = read_note(record.note)
    if record.kind is Kind.PARKED:
        size = len(record.body)
        batch = Parked(record.offset, size, weight(size, note.rows), record.received_at_unix_ns)
        admission.restore_parked(note.tenant, batch, False, now_ns)
    else:
        admission.restore_released(note.tenant, note.parked_at)


class Releaser:
    """Carries out what admission allows, one group at a time."""

    def __init__(
        self,
        admission: Admission,
        durable_log: DurableLog,
        tally: Tally,
        durable: Callable[[int], None],
    ) -> None:
        self._admission = admission
        self._log = durable_log
        self._tally = tally
        self._durable = durable
        """Told how far the log is marked in the queues."""
        self._trouble = ""

    async def run(self) -> None:
        """Release until cancelled."""
        while True:
            await asyncio.sleep(self._pause())
            picked = self._admission.pick(time.monotonic_ns(), GROUP_BATCHES, GROUP_BYTES)
            if picked and not await self._release(picked):
                await asyncio.sleep(TROUBLE_SECONDS)

    def _pause(self) -> float:
        due_ns = self._admission.next_due_ns()
        if due_ns is None:
            return MOST_PAUSE_SECONDS
        return min(MOST_PAUSE_SECONDS, max(LEAST_PAUSE_SECONDS, (due_ns - time.monotonic_ns()) / 1e9))

    async def _release(self, picked: list[tuple[Account, Parked]]) -> bool:
        """Read, append, wait. False if the disk refused; then nothing has left a queue."""
        places = [(batch.offset, batch.size) for _, batch in picked]
        try:
            records = await asyncio.to_thread(records_at, self._log.directory, places)
        except OSError as error:
            self._admission.put_back(picked, was_appended=False)
            if str(error) != self._trouble:
                log.error("parked_unavailable", code="METER-001", error=str(error))
            self._trouble = str(error)
            return False
        self._trouble = ""
        frames: list[bytes] = []
        for (account, batch), record in zip(picked, records, strict=True):
            if record is None or record.kind is not Kind.PARKED:
                self._tally.unreadable_parked += 1
                log.error("parked_batch_unreadable", tenant=account.tenant, offset=batch.offset)
                continue
            frames.extend(
                frame(
                    Kind.RELEASED,
                    record.received_at_unix_ns,
                    uuid.UUID(record.agent_id).bytes,
                    record.epoch,
                    record.seq,
                    record.digest,
                    b"%s %d" % (record.note, record.offset),
                    record.body,
                    record.flags,
                )
            )
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()
        self._log.append(
            frames,
            lambda end: loop.call_soon_threadsafe(self._written, picked, records, end, done),
        )
        self._admission.appended(picked)
        return await done

    def _written(
        self,
        picked: list[tuple[Account, Parked]],
        records: list[Record | None],
        end: int | None,
        done: asyncio.Future[bool],
    ) -> None:
        """In the log's order, before anything later is marked: a checkpoint never covers half of this."""
        if end is None:
            self._admission.put_back(picked, was_appended=True)
        else:
            self._admission.released(picked)
            self._durable(end)
            for record in records:
                if record is not None:
                    note = read_note(record.note)
                    self._tally.released(note.tenant, note.rows, note.cpu_usage_ns)
        if not done.done():
            done.set_result(end is not None)
