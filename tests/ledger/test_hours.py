"""Hours against the rows they are built of: whatever fails between two statements, and whether it was done or not."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from ledger.completeness import booked_streams
from ledger.proof.rollups import Rollups
from ledger.rollup.hours import Hours
from ledger.store.client import Store, StoreTrouble
from ledger.usage import totals
from tests.ledger.site import DAY, HOUR, T0, agent, batch, failing, insert
from tests.ledger.tampering import rewrite
from wire.v1 import usage_pb2 as pb

NOW = T0 + DAY


def one(seq: int, hour: int, cpu: int, tenant: str = "acme") -> pb.UsageBatch:
    start = T0 + hour * HOUR + seq
    return batch(agent(1), seq, start, start + HOUR // 2, [{"cpu_usage_ns": cpu}], tenant=tenant)


def by_rows(store: Store) -> int:
    ((found,),) = store.query("SELECT sum(cpu_usage_ns) FROM usage_rows")
    return int(found)


def by_hours(store: Store, hours: Hours) -> int:
    return sum(one["cpu_usage_ns"] for one in totals(store, hours.dirty, T0 - DAY, T0 + 3 * DAY).values())


pytestmark = pytest.mark.usefixtures("few_measures")


def views_agree_with_rows(store: Store) -> None:
    """What counts as built on disk is what its rows add up to, by both views."""
    built = [
        h for (h,) in store.query("SELECT start_ns FROM rollup_builds FINAL WHERE state = 'built' ORDER BY 1")
    ]
    assert Rollups(store, built).findings == []


def test_an_hour_is_built_once_it_has_settled_and_the_latest_first(store: Store) -> None:
    insert(store, one(1, 0, 5), one(2, 1, 6), one(3, 5, 7))
    hours = Hours(store)
    assert hours.dirty == [T0, T0 + HOUR, T0 + 5 * HOUR]
    assert hours.build_settled(T0 + 6 * HOUR - 1, 10) == 2
    assert hours.built == [T0, T0 + HOUR]
    assert hours.build_settled(NOW, 1) == 1
    assert hours.dirty == []
    assert by_hours(store, hours) == 18
    views_agree_with_rows(store)


def test_an_hour_is_stale_before_a_batch_is_booked_into_it_and_built_anew(store: Store) -> None:
    insert(store, one(1, 0, 5))
    hours = Hours(store)
    hours.build_settled(NOW, 10)
    hours.touch([T0])
    assert store.query("SELECT count() FROM usage_by_hour") == [(0,)]
    assert store.query("SELECT count() FROM usage_by_minute") == [(0,)]
    insert(store, one(2, 0, 6, "umbrella"))
    assert by_hours(store, hours) == 11
    hours.build_settled(NOW, 10)
    assert by_hours(store, hours) == 11
    assert store.query("SELECT count() FROM usage_by_hour") == [(2,)]
    views_agree_with_rows(store)


def test_what_was_booked_behind_its_back_is_found_at_the_next_start(store: Store) -> None:
    insert(store, one(1, 0, 5), one(2, 1, 5))
    Hours(store).build_settled(NOW, 10)
    insert(store, one(3, 0, 6))
    rewrite(store, "batches", "seq = 2")
    hours = Hours(store)
    assert hours.dirty == [T0, T0 + HOUR]
    assert by_hours(store, hours) == by_rows(store) == 11
    hours.build_settled(NOW, 10)
    assert (Hours(store).dirty, hours.differing()) == ([], [])
    assert by_hours(store, hours) == 11


WAYS = [(killed, done) for killed in (False, True) for done in (False, True)]
"""Whether it is killed then, and whether the statement was done although the answer was lost."""


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_hours_are_the_rows_wherever_a_statement_fails(store: Store, way: int) -> None:
    """Every statement fails in one of the four ways, which one depends on its number."""
    killed, done = WAYS[way]
    for at in itertools.count(1 + way, len(WAYS)):
        for table in ("batches", "usage_hours", "usage_minutes", "rollup_builds"):
            store.command(f"TRUNCATE TABLE {table}")
        insert(store, one(1, 0, 5), one(2, 1, 7))
        hours = Hours(store)
        hours.build_settled(NOW, 10)
        hours.touch([T0])  # Then killed: booked into all the same.
        insert(store, one(3, 0, 11))
        with failing(store, at, done=done) as count, contextlib.suppress(StoreTrouble):
            hours.build_settled(NOW, 10)
            hours.touch([T0, T0 + 2 * HOUR])
            insert(store, one(4, 0, 13), one(5, 2, 17))
            hours.build_settled(NOW, 10)
        views_agree_with_rows(store)
        if killed:
            hours = Hours(store)
        # Goes on as the intake does: the same again.
        hours.touch([T0, T0 + 2 * HOUR])
        insert(store, one(4, 0, 13), one(5, 2, 17))
        assert by_hours(store, hours) == by_rows(store) == 53
        hours.build_settled(NOW, 10)
        assert by_hours(store, hours) == 53
        views_agree_with_rows(store)
        assert (hours.dirty, hours.differing(), Hours(store).dirty) == ([], [], [])
        if count[0] < at:
            assert at > 10
            return


def test_a_store_that_was_away_leaves_no_hour_half_built(store: Store) -> None:
    insert(store, one(1, 0, 5))
    hours = Hours(store)
    for at in (1, 2, 3):
        with failing(store, at), contextlib.suppress(StoreTrouble):
            hours.build_settled(NOW, 10)
        assert store.query("SELECT count() FROM usage_by_hour") == [(0,)]
    assert hours.build_settled(NOW, 10) == 1
    assert by_hours(store, hours) == 5
    assert len(booked_streams(store)) == 1
