"""Every kind of batch has its named answer and metric, over real mutual TLS."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench.fleet import Stream
from tests.collector.door import Door, statuses
from wire.statuses import Reason
from wire.v1 import ingest_pb2 as pb


def test_batches_are_accepted_once_and_are_duplicates_ever_after(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(60)]
    assert statuses(door.deliver(agent, stream, items)) == ["ACCEPTED"] * 60
    assert statuses(door.deliver(agent, stream, items)) == ["DUPLICATE"] * 60
    mine = [line for line in door.log() if line["agent_id"] == agent.agent_id]
    assert [line["seq"] for line in mine] == list(range(1, 61))
    assert [line["digest"] for line in mine] == [item.digest.hex() for item in items]


def test_the_same_batch_twice_in_one_delivery_is_stored_once(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    item = stream.next()
    assert statuses(door.deliver(agent, stream, [item, item, item])) == ["ACCEPTED", "DUPLICATE", "DUPLICATE"]


def test_a_sequence_gap_is_taken_and_the_late_batch_too(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    first, second, third = (stream.next() for _ in range(3))
    assert statuses(door.deliver(agent, stream, [first, third])) == ["ACCEPTED", "ACCEPTED"]
    assert statuses(door.deliver(agent, stream, [second])) == ["ACCEPTED"]


def test_beyond_the_window_the_answer_is_retry_and_leaves_no_mark(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(300)]
    (answer,) = door.deliver(agent, stream, [items[-1]])
    assert statuses([answer]) == ["RETRY"]
    assert answer.reason == Reason.REASON_OUT_OF_WINDOW
    assert answer.retry_after_ms > 0
    assert statuses(door.deliver(agent, stream, items[:150])) == ["ACCEPTED"] * 150
    assert statuses(door.deliver(agent, stream, items[150:])) == ["ACCEPTED"] * 150


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (lambda b: setattr(b, "agent_id", "00000000-0000-4000-8000-000000000000"), "METER-003", "foreign_agent"),
        (lambda b: setattr(b, "tenant", "initech"), "METER-005", "unknown_tenant"),
        (lambda b: setattr(b, "interval_end_unix_ns", time.time_ns() + 365 * 86_400 * 10**9), "METER-005", "clock_skew"),
        (lambda b: b.cpu_user_ns.__setitem__(0, 2**64 - 1), "METER-005", "out_of_bounds"),
        (lambda b: b.cpu_usage_ns.__setitem__(0, 2**50), "METER-005", "implausible"),
        (lambda b: b.containers.name.__setitem__(0, "\x1b]0;owned\x07"), "METER-005", "out_of_bounds"),
        (lambda b: b.containers.name.__setitem__(0, "n" * 65_536), "METER-005", "out_of_bounds"),
        (lambda b: setattr(b, "previous_digest", b"x" * 32), "METER-005", "chain_broken"),
    ],
    ids=["foreign agent", "unknown tenant", "clock a year off", "negative", "impossible", "escape", "64 KiB", "chain"],
)  # fmt: skip
def test_an_invalid_batch_is_rejected_by_name_kept_and_counted_and_its_neighbours_go_on(
    door: Door, spoil: Any, code: str, reason: str
) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    good = stream.next()
    message = stream.plain_message()
    spoil(message)
    bad = stream.seal(message)
    after = stream.next()
    before = door.refusals(code, reason)
    answers = door.deliver(agent, stream, [good, bad, after])
    assert statuses(answers) == ["ACCEPTED", "REJECTED", "ACCEPTED"]
    assert Reason.Name(answers[1].reason) == f"REASON_{reason.upper()}"
    assert answers[1].detail.isprintable()
    assert door.refusals(code, reason) == before + 1
    (kept,) = [line for line in door.log("--rejected") if line["digest"] == bad.digest.hex()]
    assert kept["reason"] == f"REASON_{reason.upper()}"
    assert kept["agent_id"] == agent.agent_id


def test_a_tenant_the_agent_may_not_report_is_refused(door: Door) -> None:
    agent = door.agent(frozenset({"globex"}))
    stream = Stream(agent.agent_id, 1, tenant="acme")
    (answer,) = door.deliver(agent, stream, [stream.next()])
    assert answer.reason == Reason.REASON_TENANT_NOT_PERMITTED
    assert door.refusals("METER-003", "tenant_not_permitted") >= 1


def test_bytes_that_do_not_fit_their_digest_leave_the_identity_open_for_the_right_ones(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    item = stream.next()
    spoiled = pb.Item(epoch=1, seq=1, digest=item.digest, batch=item.batch[:-1] + b"\x00")
    (answer,) = door.deliver(agent, stream, [spoiled])
    assert (statuses([answer]), answer.reason) == (["REJECTED"], Reason.REASON_DIGEST_MISMATCH)
    assert statuses(door.deliver(agent, stream, [item])) == ["ACCEPTED"]


def test_the_same_identity_with_other_content_is_a_conflict_and_both_are_kept(door: Door) -> None:
    agent = door.agent()
    one, other = Stream(agent.agent_id, 1), Stream(agent.agent_id, 1, rows=4)
    first, second = one.next(), other.next()
    assert statuses(door.deliver(agent, one, [first])) == ["ACCEPTED"]
    (answer,) = door.deliver(agent, other, [second])
    assert (statuses([answer]), answer.reason) == (["REJECTED"], Reason.REASON_IDENTITY_CONFLICT)
    assert door.refusals("METER-006", "identity_conflict") >= 1
    kinds = {line["digest"]: line["kind"] for line in door.log("--rejected")}
    assert kinds[second.digest.hex()] == "refused"
    assert statuses(door.deliver(agent, one, [first])) == ["DUPLICATE"]


def test_a_stream_that_another_collector_answered_so_far_goes_on_here(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    for _ in range(1_000):
        stream.next()
    item = stream.next()
    assert statuses(door.deliver(agent, stream, [item], oldest_seq=1_001)) == ["ACCEPTED"]
    assert door.metrics()["weighbridge_collector_adopted_streams_total"] >= 1


def test_a_batch_larger_than_a_batch_may_be_is_rejected_by_name(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    (answer,) = door.deliver(agent, stream, [pb.Item(epoch=1, seq=1, digest=b"x" * 32, batch=bytes(2 << 20))])
    assert answer.reason == Reason.REASON_TOO_LARGE


def test_a_batch_refused_for_its_size_is_kept_once_however_often_it_comes(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    huge = pb.Item(epoch=1, seq=1, digest=b"x" * 32, batch=bytes(2 << 20))
    assert statuses(door.deliver(agent, stream, [huge])) == ["REJECTED"]
    assert statuses(door.deliver(agent, stream, [huge])) == ["DUPLICATE"]
    assert len([line for line in door.log("--rejected") if line["agent_id"] == agent.agent_id]) == 1
