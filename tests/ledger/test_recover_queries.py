"""The queries give the facts that a list of batches does, and so the same is recovered."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ledger.book.rows import COLUMNS, encode, read
from ledger.consume.arrival import Arrival, Kind
from ledger.recover import queries
from ledger.recover.facts import Beginning, Booked, Opening
from ledger.recover.recovered import recovered
from ledger.store.client import Store
from ledger.store.migrate import migrate
from tests.ledger.books import facts
from tests.ledger.metered import AGENT
from tests.ledger.test_recovered import Story, by_path
from wire.identity import AgentId
from wire.v1 import usage_pb2 as pb


def arrival(batch: pb.UsageBatch) -> Arrival:
    body = batch.SerializeToString(deterministic=True)
    digest = hashlib.sha256(body).digest()
    agent_id = AgentId(batch.agent_id)
    return Arrival(Kind.BOOKABLE, 1, agent_id, batch.epoch, batch.seq, digest, "", body)


def eventful() -> list[pb.UsageBatch]:
    """Lost, restored, held and folded; sources and the clock changed; one incarnation's batch missing here and there."""
    story = Story("ci", "job", "box", "solo")
    story.kernel.root_lag_ns = 3
    story.book({"box": 10}, 5)
    story.book({"box": 10, "job": 4}, 5)
    older = len(story.agent.copies) - 1
    story.interval({"solo": 20}, 7)
    story.live({"solo": 300, "pod": 5}, alive={"ci", "job", "solo", "web", "pod"})
    story.agent.lose_spool()
    story.booked += story.interval({"pod": 1})[1:]
    story.booked += story.agent.change_sources()
    story.book({"pod": 4_000})
    story.book({"pod": 4_000})
    story.agent.restore(older)
    story.agent.tick(hold=True, fold=True)
    story.book({"solo": 50_000}, 600_000, alive={"ci", "solo", "web"})
    story.book({"solo": 50_000})
    story.kernel.clock_offset_seconds -= 7_200
    story.interval({"solo": 1})
    story.book({"solo": 8})
    story.agent.conflict()
    story.book({})
    story.book({})
    return story.booked


def test_the_facts_of_the_books_are_those_of_the_batches(tmp_path: Path) -> None:
    batches = eventful()
    store = Store(tmp_path / "db", "", "", "ledger", 1 << 30)
    try:
        migrate(store)
        data = b"".join(encode(a, read(a)) for a in map(arrival, batches))
        store.insert_binary("batches", COLUMNS, data)
        agents = [str(agent_id) for (agent_id,) in store.query(queries.AGENTS)]
        parameters = {"agent_id": AGENT}
        openings = [Opening(*row) for row in store.query(queries.OPENINGS, parameters)]
        booked = [Booked(*row) for row in store.query(queries.BOOKED, parameters)]
        beginnings = [Beginning(*row) for row in store.query(queries.BEGINNINGS, parameters)]
    finally:
        store.close()
    expected = facts(batches)
    assert agents == [AGENT]
    assert openings == expected.openings
    assert sorted(booked) == sorted(expected.booked)
    assert beginnings == expected.beginnings
    assert any(o.span_start_ns for o in openings)
    assert {b.whole for b in beginnings} == {True, False}
    found = recovered(openings, booked, beginnings)
    assert found == recovered(*expected)
    assert by_path(found)
