"""The host's own counter against the rows: Σ rows = host + change of the deficit, per agent and interval.

Asked of intervals that are certainly whole: all their batches are booked, and so are a batch before and one behind them in the
stream. The deficit before an epoch's first interval is not in the epoch, so that interval is left out.
"""

from __future__ import annotations

from ledger.proof.finding import Finding, bounded
from ledger.store.client import Store

_INTERVALS = """
    SELECT agent_id, epoch, interval_start_ns, any(host) AS host_name,
        sum(arraySum(ns -> toUInt128(ns), units.cpu_usage_ns)) AS rows_ns,
        sum(toUInt128(host_cpu_usage_ns)) AS host_ns, sum(toUInt128(host_cpu_deficit_ns)) AS deficit_ns,
        countIf(has_host_totals) AS totals,
        min(seq) AS first, max(seq) AS last, count() AS batches,
        min(interval_start_ns) AS start_ns
    FROM batches FINAL
    GROUP BY agent_id, epoch, interval_start_ns, interval_end_ns"""
_CHECKED = f"""
    SELECT *, toInt128(rows_ns) - toInt128(host_ns) - (toInt128(deficit_ns) - toInt128(deficit_before)) AS difference_ns
    FROM (
        SELECT *,
            lagInFrame(last) OVER w AS last_before, lagInFrame(deficit_ns) OVER w AS deficit_before,
            lagInFrame(totals) OVER w AS totals_before, leadInFrame(first) OVER w AS first_behind
        FROM ({_INTERVALS})
        WINDOW w AS (PARTITION BY agent_id, epoch ORDER BY first ROWS BETWEEN 1 PRECEDING AND 1 FOLLOWING)
    )
    WHERE totals = 1 AND totals_before = 1 AND batches = last - first + 1
        AND first = last_before + 1 AND first_behind = last + 1"""


class Conservation:
    """What was compared, and what did not add up."""

    def __init__(self, store: Store) -> None:
        ((self.intervals, differing, difference),) = store.query(
            f"SELECT count(), countIf(difference_ns != 0), sum(abs(difference_ns)) FROM ({_CHECKED})"
        )
        self.difference_ns = int(difference or 0)
        """Σ |difference| of all intervals compared."""
        texts = []
        if differing:
            texts = [
                f"agent {agent} ({host}), epoch {epoch}, batches {first} to {last}: rows have {int(ns):+d} ns more than the host"
                for agent, host, epoch, first, last, ns in store.query(
                    f"SELECT toString(agent_id), host_name, epoch, first, last, difference_ns FROM ({_CHECKED})"
                    " WHERE difference_ns != 0 ORDER BY abs(difference_ns) DESC LIMIT 100"
                )
            ]
        self.findings: list[Finding] = bounded("conservation", texts, differing)
