"""ClickHouse alone: delimited batches through its own protobuf reader into a table of rows, with a view by tenant and hour.

A process of its own, so that its CPU time is all there is: `python -m bench.peers.plain_insert DIRECTORY FILE PROTO MEASURE...`
prints rows per CPU-second, and rows.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from chdb.session import Session

HOUR_NS = 3_600 * 10**9


def main(directory: str, data: str, schema: str, measures: list[str]) -> None:
    session: Any = Session(directory)  # type: ignore[no-untyped-call]
    session.query("CREATE DATABASE plain")
    columns = ", ".join(f"{m} UInt64" for m in measures)
    session.query(f"""CREATE TABLE plain.usage (agent_id String, epoch UInt64, seq UInt64, tenant LowCardinality(String),
        start_ns UInt64, end_ns UInt64, cgroup_id UInt64, container_id LowCardinality(String), known UInt64, {columns})
        ENGINE = MergeTree ORDER BY (tenant, start_ns)""")
    totals = ", ".join(f"{m} SimpleAggregateFunction(sum, UInt64)" for m in measures)
    session.query(f"""CREATE TABLE plain.hours (tenant LowCardinality(String), hour UInt64, {totals})
        ENGINE = AggregatingMergeTree ORDER BY (tenant, hour)""")
    sums = ", ".join(f"sum({m}) AS {m}" for m in measures)
    session.query(f"""CREATE MATERIALIZED VIEW plain.by_hour TO plain.hours AS
        SELECT tenant, intDiv(start_ns, {HOUR_NS}) AS hour, {sums} FROM plain.usage GROUP BY tenant, hour""")
    arrays = ", ".join(f"{m} Array(UInt64)" for m in measures)
    values = [f"v_{m}" for m in measures]
    joined = ", ".join(f"{m} AS {value}" for m, value in zip(measures, values, strict=True))
    begun = time.process_time()
    session.query(f"""INSERT INTO plain.usage
        SELECT agent_id, epoch, seq, tenant, interval_start_unix_ns, interval_end_unix_ns, cgroup, container, known_of_row,
            {", ".join(values)}
        FROM file('{data}', 'Protobuf', 'agent_id String, epoch UInt64, seq UInt64, tenant String,
            interval_start_unix_ns UInt64, interval_end_unix_ns UInt64, `containers.cgroup_id` Array(UInt64),
            `containers.container_id` Array(String), known Array(UInt64), {arrays}')
        ARRAY JOIN `containers.cgroup_id` AS cgroup, `containers.container_id` AS container, known AS known_of_row, {joined}
        SETTINGS format_schema = '{schema}:UsageBatch', async_insert = 0""")
    seconds = time.process_time() - begun
    rows = int(session.query("SELECT count() FROM plain.usage", "CSV").bytes())
    print(rows / seconds, rows)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
