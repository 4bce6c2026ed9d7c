"""Target: the bytes of a Delivery, as an agent sends them, up to the decision and what is made of an accepted batch.

An input brings its own history: what its first batches teach the validator, the later ones are compared with. So
every input is judged from nothing, and a failure is one file.
"""

from __future__ import annotations

import uuid

from google.protobuf.message import DecodeError

from collector.decide.admission import HEAVIEST, weight
from collector.decide.dedup import Seen, StreamState
from collector.decide.validate import Bounds, Checked, Refusal, Validator, check_bytes
from collector.handoff.kafka.messages import message_of
from collector.log_commands import field_of
from tests.fuzz.reference import Circumstances, decoded, faults
from wire.identity import AgentId, BatchId, digest
from wire.kafka.topics import Topics
from wire.limits import MAX_BATCH_BYTES, MAX_DETAIL_BYTES, MAX_VALUE
from wire.log.records import Kind, frame, record_at
from wire.measures import MEASURES
from wire.statuses import Reason
from wire.v1 import ingest_pb2

AGENT = AgentId("11111111-2222-4333-8444-555555555555")
NOW_UNIX_NS = 1_700_003_600 * 10**9
TENANTS = frozenset(("acme", "globex", "host"))
PERMITTED = frozenset(("acme", "host", "elsewhere"))
MOST_ITEMS = 3
"""So many of an input are looked at."""

_COLUMNS = ("row_flags", "known", *MEASURES)
_TOPICS = Topics.of("usage-metering")
_GIANTS = {"globex": 4}


def delivery(data: bytes) -> None:
    """Judge what an agent sent. AssertionError where the judge breaks its word."""
    try:
        items = ingest_pb2.Delivery.FromString(data).items[:MOST_ITEMS]
    except DecodeError:
        return  # gRPC ends the stream
    validator = Validator(Bounds(tenants=TENANTS))
    streams: dict[int, StreamState] = {}
    accepted: dict[BatchId, bytes] = {}
    for item in items:
        if 0 < item.epoch < MAX_VALUE and 0 < item.seq < MAX_VALUE:
            _judge(item, validator, streams.setdefault(item.epoch, StreamState()), accepted)


def _judge(
    item: ingest_pb2.Item, validator: Validator, stream: StreamState, accepted: dict[BatchId, bytes]
) -> None:
    body, claimed = item.batch, item.digest
    identity = BatchId(AGENT, item.epoch, item.seq)
    refusal = check_bytes(body, claimed)
    if refusal is not None:
        too_large = len(body) > MAX_BATCH_BYTES
        assert too_large or digest(body) != claimed
        assert (refusal.reason == Reason.REASON_TOO_LARGE) == too_large
        _is_said_well(refusal)
        return
    seen = stream.judge(item.seq, claimed)
    if seen is not Seen.NEW:
        assert identity in accepted or seen is Seen.OUT_OF_WINDOW
        assert seen is not Seen.DUPLICATE or accepted[identity] == body
        assert seen is not Seen.CONFLICT or accepted[identity] != body
        return
    assert identity not in accepted
    checked = validator.check(body, AGENT, item.epoch, item.seq, PERMITTED, NOW_UNIX_NS)
    is_right(checked, body, identity)
    if checked.refusal is None:
        accepted[identity] = body
        stream.mark(item.seq, claimed)
        _goes_on(checked, body, identity)


def is_right(checked: Checked, body: bytes, identity: BatchId) -> None:
    """The verdict is that of the contract, and what the pipeline is told is what the batch says."""
    batch = decoded(body)
    wrong = faults(batch, Circumstances(*identity, PERMITTED, TENANTS, NOW_UNIX_NS))
    if checked.refusal is not None:
        _is_said_well(checked.refusal)
        reason = Reason.Name(checked.refusal.reason)
        said = reason, field_of(reason, checked.refusal.detail)
        assert said in {(Reason.Name(reason), field) for reason, field in wrong}, (checked.refusal, wrong)
        return
    assert not wrong, wrong
    assert batch is not None
    columns = [(name, column) for name in _COLUMNS if (column := getattr(batch, name))]
    rows = [{name: column[row] for name, column in columns} for row in range(len(batch.known))]
    assert checked.rows == len(rows)
    assert checked.cpu_usage_ns == sum(row.get("cpu_usage_ns", 0) for row in rows)
    assert (checked.tenant, checked.previous_digest) == (batch.tenant, batch.previous_digest)
    assert list(checked.gaps) == list(batch.gaps)


def _is_said_well(refusal: Refusal) -> None:
    assert 0 < len(refusal.detail.encode()) <= MAX_DETAIL_BYTES
    assert refusal.detail.isprintable()


def _goes_on(checked: Checked, body: bytes, identity: BatchId) -> None:
    """An accepted batch can be weighed, kept and published, as it is."""
    assert 0 < weight(len(body), checked.rows) <= HEAVIEST
    agent = uuid.UUID(identity.agent_id).bytes
    data = b"".join(
        frame(Kind.ACCEPTED, NOW_UNIX_NS, agent, identity.epoch, identity.seq, digest(body), b"", body)
    )
    record = record_at(data, 0, 0)
    assert record is not None
    assert BatchId(record.agent_id, record.epoch, record.seq) == identity
    message = message_of(record, _TOPICS, _GIANTS)
    assert message is not None
    assert message.value == body
    assert message.key.partition(b"/")[0] == checked.tenant.encode()
