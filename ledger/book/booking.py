"""What to do with what arrived. Pure: arrivals and what is booked -> rows to write.

bookable, not booked          a row of `batches`
bookable, booked              nothing if the digest is the booked one; else a conflict, and what is booked stays
bookable, unreadable          refused: no collector wrote it
no agent's id                 refused, as nobody's: ids stand in SQL from here on
parked, rejected, refused     a verdict, so that completeness can name it
adopted                       nothing: the log's own
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.message import DecodeError

from ledger.book.rows import Unreadable, encode, read
from ledger.book.streams import StreamId, Streams
from ledger.consume.arrival import NOBODY, Arrival, Kind
from wire.identity import AgentId, is_agent_id
from wire.v1 import usage_pb2 as pb

HOUR_NS = 3_600 * 10**9
MAX_REASON_CHARACTERS = 1_000
_VERDICTS = {Kind.PARKED: "parked", Kind.REJECTED: "rejected", Kind.REFUSED: "refused"}

Identity = tuple[str, int, int]
"""agent_id, epoch, seq."""

VERDICT_COLUMNS = (
    *("agent_id", "epoch", "seq", "digest", "kind", "tenant", "interval_start_ns", "interval_end_ns"),
    *("received_at_ns", "reason"),
)


class Verdict(NamedTuple):
    """A row of `verdicts`."""

    agent_id: AgentId
    epoch: int
    seq: int
    digest: bytes
    kind: str
    tenant: str
    interval_start_ns: int
    interval_end_ns: int
    received_at_ns: int
    reason: str


@dataclass(slots=True)
class Chunk:
    """What one read of the source comes to."""

    new: list[tuple[StreamId, int, int, int]] = field(default_factory=list)
    """Of the batches in `data`, in order: stream, number, start and end in Unix ns."""
    data: list[bytes] = field(default_factory=list)
    """RowBinary of `batches`."""
    rows: int = 0
    hours: set[int] = field(default_factory=set)
    """Starts of the hours that the batches lie in, Unix ns."""
    verdicts: list[Verdict] = field(default_factory=list)
    duplicates: int = 0


def repeated(arrivals: Iterable[Arrival], streams: Streams) -> list[Identity]:
    """Identities of bookable arrivals that are booked already: their digests have to be looked up."""
    return [
        (a.agent_id, a.epoch, a.seq)
        for a in arrivals
        if a.kind is Kind.BOOKABLE
        and is_agent_id(a.agent_id)
        and streams.booked(StreamId(a.agent_id, a.epoch), a.seq)
    ]


def book(arrivals: Sequence[Arrival], streams: Streams, booked: Mapping[Identity, set[bytes]]) -> Chunk:
    """The chunk. `booked`: digests of what `repeated` named. `streams` is not changed."""
    chunk = Chunk()
    here: dict[Identity, set[bytes]] = {}
    spans: set[range] = set()
    for arrival in arrivals:
        if not is_agent_id(arrival.agent_id):
            nobodys = arrival._replace(agent_id=NOBODY, epoch=0, seq=0)
            chunk.verdicts.append(
                _verdict(nobodys, "refused", "its agent's id is none: a lower-case UUID is")
            )
            continue
        if arrival.kind in _VERDICTS:
            chunk.verdicts.append(_verdict(arrival, _VERDICTS[arrival.kind], arrival.reason))
        if arrival.kind is not Kind.BOOKABLE:
            continue
        identity = (arrival.agent_id, arrival.epoch, arrival.seq)
        known = booked.get(identity) or here.get(identity)
        if known and arrival.digest in known:
            chunk.duplicates += 1
        elif known:
            reason = f"booked with a digest that begins {min(known).hex()[:16]}"
            chunk.verdicts.append(_verdict(arrival, "conflict", reason))
        else:
            try:
                batch = read(arrival)
            except Unreadable as error:
                chunk.verdicts.append(_verdict(arrival, "refused", str(error)))
                continue
            here[identity] = {arrival.digest}
            start, end = batch.interval_start_unix_ns, batch.interval_end_unix_ns
            chunk.new.append((StreamId(arrival.agent_id, arrival.epoch), arrival.seq, start, end))
            chunk.data.append(encode(arrival, batch))
            chunk.rows += len(batch.known)
            spans.add(hours_of(start, end))
    # Each span once, and from where the last one ended: a clock that started in 1970 makes one of half a million hours.
    behind = 0
    for span in sorted(spans, key=lambda hours: (hours.start, hours.stop)):
        chunk.hours.update(range(max(span.start, behind), span.stop, HOUR_NS))
        behind = max(behind, span[-1] + HOUR_NS)
    return chunk


def hours_of(start_unix_ns: int, end_unix_ns: int) -> range:
    """Starts of the hours (UTC) that [start, end) lies in."""
    return range(start_unix_ns - start_unix_ns % HOUR_NS, end_unix_ns, HOUR_NS)


def _verdict(arrival: Arrival, kind: str, reason: str) -> Verdict:
    try:
        batch = pb.UsageBatch.FromString(arrival.body)
    except DecodeError:
        batch = pb.UsageBatch()
    return Verdict(
        arrival.agent_id,
        arrival.epoch,
        arrival.seq,
        arrival.digest,
        kind,
        batch.tenant[:256],
        batch.interval_start_unix_ns,
        batch.interval_end_unix_ns,
        arrival.received_at_unix_ns,
        reason[:MAX_REASON_CHARACTERS],
    )
