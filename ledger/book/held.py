"""What arrived and is not booked: parked, rejected, in conflict. Pure.

Derived from the tables at start and kept up, as `streams`. What was parked or rejected and is booked after all is held no
more; a conflict stays one, for it is about other bytes; what was refused used no identity up, and is evidence only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ledger.book.booking import Chunk, Identity, Verdict
from ledger.book.streams import StreamId, Streams

HELD_KINDS = ("parked", "rejected", "conflict")


class HeldBack:
    """Of all streams. Memory: one verdict for each identity that waits."""

    def __init__(self, verdicts: Iterable[Verdict] = ()) -> None:
        """`verdicts`: of HELD_KINDS, and not booked unless in conflict."""
        self._held: dict[Identity, dict[tuple[str, bytes], Verdict]] = {}
        for verdict in verdicts:
            self._add(verdict)

    def take(self, chunk: Chunk, streams: Streams) -> None:
        """A chunk is booked, and in `streams`."""
        for verdict in chunk.verdicts:
            stream = StreamId(verdict.agent_id, verdict.epoch)
            if verdict.kind == "conflict" or (
                verdict.kind in HELD_KINDS and not streams.booked(stream, verdict.seq)
            ):
                self._add(verdict)
        if self._held:
            for (agent_id, epoch), seq, *_ in chunk.new:
                self._settle((agent_id, epoch, seq))

    def __iter__(self) -> Iterator[Verdict]:
        """By agent, epoch, number and kind."""
        for identity in sorted(self._held):
            of_it = self._held[identity]
            yield from (of_it[key] for key in sorted(of_it))

    def _add(self, verdict: Verdict) -> None:
        of_it = self._held.setdefault((verdict.agent_id, verdict.epoch, verdict.seq), {})
        of_it[verdict.kind, verdict.digest] = verdict

    def _settle(self, identity: Identity) -> None:
        of_it = self._held.pop(identity, None)
        conflicts = {key: v for key, v in (of_it or {}).items() if v.kind == "conflict"}
        if conflicts:
            self._held[identity] = conflicts
