"""From a collector's log into the books: each batch once, whatever fails, and no position ahead of what is booked."""

from __future__ import annotations

import time
import uuid

import pytest

from collector.handoff.log import Kind as Written
from ledger.completeness import booked_streams, held_back
from ledger.consume.log import LogSource
from ledger.ledger import MUCH_UNREAD
from ledger.progress import Progress
from ledger.store.client import Store
from tests.ledger.site import HOUR, T0, Chain, Place, agent, batch, failing
from wire.v1 import usage_pb2 as pb

pytestmark = pytest.mark.usefixtures("few_measures")


def identities(store: Store) -> list[tuple[str, int, int]]:
    return store.query("SELECT toString(agent_id), epoch, seq FROM batches FINAL ORDER BY 1, 2, 3")  # type: ignore[return-value]


def verdicts(store: Store) -> list[tuple[str, int]]:
    return store.query("SELECT toString(kind), seq FROM verdicts FINAL ORDER BY seq, kind")  # type: ignore[return-value]


def remembered_is_derived(place: Place) -> None:
    """What the ledger remembers is what it would derive from the tables."""
    ledger = place.ledger
    assert {s: list(r) for s, r in ledger._streams} == {s: list(r) for s, r in booked_streams(place.store)}
    assert list(ledger._held) == list(held_back(place.store))


def some(place: Place) -> list[pb.UsageBatch]:
    one, two = Chain(agent(1)), Chain(agent(2))
    good = [one.next(T0 + n * HOUR, T0 + (n + 1) * HOUR) for n in range(3)] + [two.next(T0, T0 + 5)]
    place.write(*good[:2])
    place.write(batch(agent(1), 7, T0, T0 + 9), kind=Written.PARKED, note=b"acme 1 2")
    place.write(batch(agent(1), 8, T0, T0 + 9), kind=Written.REJECTED, note=b"REASON_OUT_OF_BOUNDS x")
    place.write(*good[1:])  # The second one again.
    place.write(batch(agent(1), 3, T0 + 2 * HOUR, T0 + 3 * HOUR, [{"cpu_usage_ns": 9}], previous=bytes(32)))
    place.seal()
    return good


WANTED = [(agent(1), 1, 1), (agent(1), 1, 2), (agent(1), 1, 3), (agent(2), 1, 1)]
VERDICTS = [("conflict", 3), ("parked", 7), ("rejected", 8)]


def test_what_is_in_the_log_is_booked_once_and_the_rest_has_verdicts(place: Place) -> None:
    some(place)
    place.book()
    assert identities(place.store) == WANTED
    assert verdicts(place.store) == VERDICTS
    remembered_is_derived(place)
    tally = place.ledger.recorded()
    assert (tally.booked_batches, tally.duplicates, tally.conflicts) == (4, 1, 1)
    place.ledger.reread()
    place.book()
    assert identities(place.store) == WANTED
    assert verdicts(place.store) == VERDICTS
    assert place.store.query("SELECT count(), uniqExact(agent_id, epoch, seq) FROM batches FINAL") == [(4, 4)]
    remembered_is_derived(place)


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done, and the answer lost"])
@pytest.mark.parametrize("killed", [False, True], ids=["goes on", "killed"])
def test_a_store_that_fails_at_any_statement_loses_and_doubles_nothing(
    place: Place, done: bool, killed: bool
) -> None:
    some(place)
    at = 0
    failed = True
    while failed:
        at += 1
        ledger = place.ledger
        for table in ("batches", "verdicts", "progress", "rollup_builds"):
            place.store.command(f"TRUNCATE TABLE {table}")
        ledger = place.forget()
        ledger._hours.touch([T0])
        ledger._hours.build_settled(T0 + 24 * HOUR, 5)  # So that there is something to mark stale.
        with failing(place.store, at, done=done) as count:
            for _ in range(3):  # The source gives the log in one read; what fails stays in hand.
                ledger.consume(0)
            ledger._intake.finish()
            failed = count[0] >= at
            assert bool(ledger.trouble) == failed
        position = Progress(place.store).positions
        if position:  # Whatever lies before it is booked.
            reader = LogSource(place.settings.source.log_directory, position)
            assert reader.read(1 << 20, 0) == []
            assert identities(place.store) == WANTED
            assert verdicts(place.store) == VERDICTS
        if killed:
            place.forget()
        place.book()
        assert identities(place.store) == WANTED
        assert verdicts(place.store) == VERDICTS
        remembered_is_derived(place)
        assert Progress(place.store).positions == place.ledger._source.positions()
    assert at > 4


def test_what_was_parked_is_held_until_it_is_booked(place: Place) -> None:
    chain = Chain(agent(1))
    first, second = chain.next(T0, T0 + 5), chain.next(T0 + 5, T0 + 9)
    place.write(first, kind=Written.PARKED, note=b"acme 1 2")
    place.write(second)
    place.write(first, kind=Written.RELEASED, note=b"acme 1 2 3")
    place.seal()
    place.book()
    assert identities(place.store) == [(agent(1), 1, 1), (agent(1), 1, 2)]
    assert list(place.ledger._held) == []
    remembered_is_derived(place)
    status = place.ledger.status()
    assert (status["parked_batches"], status["missing_batches"], status["streams"]) == (0, 0, 1)


def test_one_poisonous_batch_does_not_stop_the_others(place: Place) -> None:
    chain = Chain(agent(1))
    poison = chain.next(T0, T0 + 5)
    poison.gaps.add(reason=-7)
    other = batch(agent(2), 1, T0, T0 + 5)
    other.containers.name.extend(["too", "many"])
    place.write(poison, other, batch(agent(3), 1, T0, T0 + 5))
    place.seal()
    place.book()
    assert identities(place.store) == [(agent(1), 1, 1), (agent(3), 1, 1)]
    assert verdicts(place.store) == [("refused", 1)]


def test_a_clock_that_is_set_back_does_not_bring_an_older_position_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(place.store)
    progress.write({"log": 100})
    monkeypatch.setattr("ledger.progress.now_ns", lambda: time.time_ns() - 10**15)
    progress.write({"log": 200})
    assert Progress(place.store).positions == {"log": 200}
    progress.forget()
    assert Progress(place.store).positions == {}
    Progress(place.store).write({"log": 50, "usage-metering/0": 0})
    assert Progress(place.store).positions == {"log": 50, "usage-metering/0": 0}


def test_what_a_source_lost_is_written_down(place: Place) -> None:
    progress = Progress(place.store)
    progress.lose({"usage-metering/0": (5, 9)})
    progress.lose({"usage-metering/0": (5, 9)})
    assert Progress(place.store).lost() == [("usage-metering/0", 5, 9)]
    place.write(batch(str(uuid.UUID(int=7)), 1, T0, T0 + 1))
    place.book()
    place.ledger.roll_up()
    assert place.ledger.recorded().lost_positions == 4
    assert not place.ledger.reconcile()["ok"]


def test_hours_are_not_built_while_much_is_unread(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next chunk would make them stale."""
    some(place)
    place.book()
    assert place.ledger.status()["source_lag"] == [{"source": "log", "unit": "bytes", "lag": 0}]
    monkeypatch.setitem(MUCH_UNREAD, "bytes", -1)
    assert place.ledger.roll_up() == 0
    monkeypatch.setattr("ledger.ledger.MOST_DIRTY_HOURS", 0)
    assert place.ledger.roll_up() == 3
