"""Agents that produce batches, and what becomes of these; and a slow judge of what may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from hypothesis import strategies as st

from ledger.periods.calendar import Period
from ledger.periods.streams import Held, HeldKind, Run, Stream

HORIZON = 60
"""No history reaches further. Its times are small numbers, so that the judge can try every interval there is."""
FATES = (
    "booked",
    "booked",
    "booked",
    "booked",
    "lost",
    "parked",
    "rejected",
    "unreadable",
    "conflict",
    "disputed",
)
"""Conflict: booked, and other bytes came under its identity. Disputed: those came, and it did not."""

HELD = {
    **{str(kind): kind for kind in HeldKind},
    "unreadable": HeldKind.REJECTED,
    "disputed": HeldKind.CONFLICT,
}


@dataclass(frozen=True)
class Produced:
    agent_id: str
    epoch: int
    seq: int
    start: int
    end: int
    fate: str


@dataclass
class History:
    batches: list[Produced] = field(default_factory=list)
    retired: dict[str, int] = field(default_factory=dict)

    @property
    def streams(self) -> list[Stream]:
        out = []
        booked = sorted(
            (b for b in self.batches if b.fate in ("booked", "conflict")),
            key=lambda b: (b.agent_id, b.epoch, b.seq),
        )
        for (agent_id, epoch), of_stream in groupby(booked, lambda b: (b.agent_id, b.epoch)):
            out.append(Stream(agent_id, epoch, tuple(runs((b.seq, b.start, b.end) for b in of_stream))))
        return out

    @property
    def held(self) -> list[Held]:
        return [
            Held(
                HELD[b.fate],
                *(b.agent_id, b.epoch, b.seq, "acme"),
                *((None, None) if b.fate == "unreadable" else (b.start, b.end)),
                "REASON_TENANT",
            )
            for b in self.batches
            if b.fate not in ("booked", "lost")
        ]


def runs(batches: Iterable[tuple[int, int, int]]) -> Iterator[Run]:
    """(seq, start, end) in order of seq -> runs, as the ledger's table gives them."""
    for _, run in groupby(enumerate(batches), lambda item: item[1][0] - item[0]):
        rows = [row for _, row in run]
        starts, ends = [row[1] for row in rows], [row[2] for row in rows]
        yield Run(rows[0][0], rows[-1][0], min(starts), min(ends), max(starts), max(ends))


@st.composite
def histories(draw: st.DrawFn, *, clocks_are_set_back: bool) -> History:
    history = History()
    for agent in range(draw(st.integers(1, 2))):
        agent_id = f"agent-{agent}"
        at = draw(st.integers(1, 12))
        for epoch in range(1, draw(st.integers(1, 3)) + 1):
            if clocks_are_set_back and draw(st.booleans()):
                at = max(1, at - draw(st.integers(1, 15)))
            seq = 0
            for _ in range(draw(st.integers(1, 4))):
                start, end = at, at + draw(st.integers(1, 4))
                for _ in range(draw(st.integers(1, 3))):
                    seq += 1
                    fate = draw(st.sampled_from(FATES))
                    history.batches.append(Produced(agent_id, epoch, seq, start, end, fate))
                at = end + draw(st.sampled_from((0, 0, 0, 3)))
        if draw(st.sampled_from((False, False, True))):
            history.retired[agent_id] = draw(st.integers(1, HORIZON))
    return history


def periods() -> st.SearchStrategy[Period]:
    return st.tuples(st.integers(0, HORIZON - 1), st.integers(1, HORIZON)).map(
        lambda pair: Period("any", pair[0], min(pair[0] + pair[1], HORIZON))
    )


def judged(history: History, period: Period) -> set[tuple[str, str, int, int]]:
    """(kind, agent, epoch, seq) of all that blocks the period; for a silence, the seq that would come next is 0.

    By trying every interval that a batch which nobody has read could have had, next to every batch that somebody
    has: one of its stream is the same interval, or lies wholly before, or wholly behind, as their numbers do.
    """
    out: set[tuple[str, str, int, int]] = set()
    for agent_id in {b.agent_id for b in history.batches if b.fate != "lost"}:
        seen = [b for b in history.batches if b.agent_id == agent_id and b.fate != "lost"]
        newest = max(b.epoch for b in seen)
        before = 0
        for epoch in sorted({b.epoch for b in seen}):
            of_epoch = [b for b in seen if b.epoch == epoch]
            read = {b.seq: (b.start, b.end) for b in of_epoch if b.fate not in ("unreadable", "disputed")}
            top = max(b.seq for b in of_epoch)
            fates = {b.seq: b.fate for b in of_epoch}
            front = before if not read or read[min(read)][0] >= before else 0

            def may_overlap(seq: int, read: dict[int, tuple[int, int]] = read, front: int = front) -> bool:
                floor = front if not read or seq < min(read) else 0
                return any(
                    period.overlaps(start, end)
                    for start in range(floor, HORIZON + 4)
                    for end in range(start + 1, HORIZON + 5)
                    if all(
                        (start, end) == known or (end <= known[0] if seq < other else start >= known[1])
                        for other, known in read.items()
                    )
                )

            for seq in range(1, top + 1):
                if fates.get(seq) in (None, "disputed") and may_overlap(seq):
                    out.add(("missing", agent_id, epoch, seq))
                match fates.get(seq):
                    case "disputed" if any(period.overlaps(b.start, b.end) for b in of_epoch if b.seq == seq):
                        out.add(("conflict", agent_id, epoch, seq))
                    case "unreadable" if may_overlap(seq):
                        out.add(("rejected", agent_id, epoch, seq))
                    case "parked" | "rejected" | "conflict" as kind if period.overlaps(*read[seq]):
                        out.add((kind, agent_id, epoch, seq))
            if epoch == newest and may_overlap(top + 1):
                gone = history.retired.get(agent_id)
                if gone is None or (read and max(start for start, _ in read.values()) >= gone):
                    out.add(("silent", agent_id, epoch, 0))
            before = read[max(read)][1] if read else before
    return out
