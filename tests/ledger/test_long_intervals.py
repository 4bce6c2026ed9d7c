"""After an outage an interval is as long as that was: its rows are divided, and memory stays within what ClickHouse may take."""

from __future__ import annotations

from ledger.book.rows import COLUMNS, encode, read
from ledger.proof.rollups import Rollups
from ledger.rollup.hours import Hours
from ledger.store.client import Store
from tests.ledger.site import DAY, HOUR, T0, agent, arrival, batch

BATCHES, ROWS, HOURS = 40, 100, 5


def test_hours_of_rows_that_are_divided_into_a_million_minutes_are_built_within_a_gibibyte(
    store: Store,
) -> None:
    rows = [{"cpu_usage_ns": 7, "memory_byte_seconds": 11}] * ROWS
    arrivals = [arrival(batch(agent(number), 1, T0, T0 + HOURS * HOUR, rows)) for number in range(BATCHES)]
    store.insert_binary("batches", COLUMNS, b"".join(encode(one, read(one)) for one in arrivals))
    hours = Hours(store)
    assert len(hours.dirty) == HOURS
    assert hours.build_settled(T0 + DAY, 24) == HOURS
    assert Rollups(store, hours.built).findings == []
    ((minutes, cpu_ns),) = store.query("SELECT sum(rows), sum(cpu_usage_ns) FROM usage_by_minute")
    assert (minutes, cpu_ns) == (BATCHES * ROWS * HOURS * 60, BATCHES * ROWS * 7)
