"""The facts of one agent out of ClickHouse: what `recovered` is computed from. Each takes {agent_id:UUID}.

They read all that is booked of an agent. That is for agents that lost something: `AGENTS` names them, and where every
agent has had one epoch and one boot it names none.
"""

from __future__ import annotations

from ledger.recover.facts import RECOVERABLE
from wire.v1 import usage_pb2 as pb

AGENTS = "SELECT agent_id FROM batches GROUP BY agent_id HAVING uniqExact(epoch) > 1"
"""Agents that began an epoch after another."""

_CHANGES = """
    SELECT DISTINCT o.epoch AS epoch, o.interval_start_ns AS span_start_ns
    FROM (SELECT * FROM opening_rows WHERE agent_id = {agent_id:UUID}) AS o
    INNER JOIN (
        SELECT epoch, boot_id, cgroup_id, min(interval_start_ns) AS first_start_ns
        FROM usage_rows WHERE agent_id = {agent_id:UUID} GROUP BY epoch, boot_id, cgroup_id
    ) AS f ON f.epoch = o.epoch AND f.boot_id = o.boot_id AND f.cgroup_id = o.cgroup_id
    WHERE o.interval_start_ns > f.first_start_ns AND (o.epoch, o.interval_start_ns) NOT IN (
        SELECT epoch, interval_start_ns FROM usage_rows
        WHERE agent_id = {agent_id:UUID} AND cgroup_id = 1 AND (epoch, seq) NOT IN (
            SELECT epoch, seq FROM opening_rows WHERE agent_id = {agent_id:UUID} AND cgroup_id = 1))"""
"""Where a span begins within an epoch: an incarnation opens that has rows before in that epoch, and so does the host, if its
row is booked."""

_COUNTERS = ", ".join(f"t.{name}" for name in RECOVERABLE)
_SUMS = ", ".join(f"sum(t.{name})" for name in RECOVERABLE)

OPENINGS = f"""
SELECT toString(t.agent_id), t.epoch, c.span_start_ns, t.interval_start_ns, t.tenant, t.boot_id, t.cgroup_id, t.cgroup_path,
    t.kind, t.known, ({_COUNTERS})
FROM (SELECT * FROM opening_rows WHERE agent_id = {{agent_id:UUID}}) AS t
ASOF LEFT JOIN ({_CHANGES}) AS c ON c.epoch = t.epoch AND c.span_start_ns <= t.interval_start_ns
ORDER BY t.epoch, t.seq, t.row"""
"""Columns as in `facts.Opening`."""

BOOKED = f"""
SELECT toString(t.agent_id), t.epoch, c.span_start_ns, t.boot_id, t.cgroup_id, min(t.cgroup_path), min(t.kind),
    min(t.interval_start_ns), max(t.interval_end_ns), max(bitAnd(t.row_flags, {int(pb.ROW_FLAG_COUNTER_RESET)})) > 0,
    ({_SUMS})
FROM (SELECT * FROM usage_rows WHERE agent_id = {{agent_id:UUID}}) AS t
ASOF LEFT JOIN ({_CHANGES}) AS c ON c.epoch = t.epoch AND c.span_start_ns <= t.interval_start_ns
GROUP BY t.agent_id, t.epoch, c.span_start_ns, t.boot_id, t.cgroup_id
ORDER BY t.epoch, c.span_start_ns, t.boot_id, t.cgroup_id"""
"""Columns as in `facts.Booked`. Sums of UInt64 wrap at 2**64 ns, which is 584 years of one CPU."""

BEGINNINGS = f"""
WITH
    -- Each interval of an epoch is a run of batches; it is whole if the runs before and after it touch it.
    intervals AS (
        SELECT epoch, interval_start_ns, any(boot_id) AS boot_id, min(seq) AS first_seq, max(seq) AS last_seq,
            uniqExact(seq) AS batches_booked, groupBitAnd(coverage) AS covered, max(has_host_totals) AS has_totals,
            max(host_cpu_usage_ns) AS host_cpu_usage_ns, max(host_cpu_deficit_ns) AS host_cpu_deficit_ns,
            max(host_cpu_source) AS cpu_source, sum(arraySum(units.cpu_usage_ns)) AS cpu_usage_ns
        FROM batches FINAL WHERE agent_id = {{agent_id:UUID}}
        GROUP BY epoch, interval_start_ns
    ),
    runs AS (
        SELECT *, last_seq - first_seq + 1 = batches_booked
                AND first_seq = 1 + lagInFrame(last_seq, 1, 0) OVER in_order
                AND last_seq + 1 = leadInFrame(first_seq, 1, 0) OVER in_order AS all_booked
        FROM intervals
        WINDOW in_order AS (PARTITION BY epoch ORDER BY interval_start_ns
            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
    )
SELECT toString({{agent_id:UUID}}), t.epoch, c.span_start_ns, t.boot_id,
    t.all_booked AND bitAnd(t.covered, {int(pb.COVERAGE_WHOLE_HOST)}) > 0,
    if(t.all_booked AND t.has_totals,
        toInt64(t.host_cpu_deficit_ns) + toInt64(t.host_cpu_usage_ns) - toInt64(t.cpu_usage_ns), NULL),
    t.cpu_source
FROM runs AS t
ASOF LEFT JOIN ({_CHANGES}) AS c ON c.epoch = t.epoch AND c.span_start_ns <= t.interval_start_ns
WHERE (t.epoch, t.interval_start_ns) IN (
    SELECT epoch, interval_start_ns FROM opening_rows WHERE agent_id = {{agent_id:UUID}} AND cgroup_id = 1)
ORDER BY t.epoch, t.interval_start_ns"""
"""Columns as in `facts.Beginning`."""
