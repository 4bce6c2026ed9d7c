"""Are the sums those of the rows? All measures, hour by hour and tenant by tenant, computed anew."""

from __future__ import annotations

from ledger.proof.finding import Finding, bounded
from ledger.rollup.parts import DAY_NS, DIVIDING, HOUR_NS, MINUTE_NS, parts
from ledger.store.client import Store
from wire.measures import MAXIMA, MEASURES


class Rollups:
    """What was compared, and which hours differ. `built`: starts of hours whose builds count."""

    def __init__(self, store: Store, built: list[int]) -> None:
        self.hours = len(built)
        self.difference_ns = 0
        """Σ |CPU time of rows - CPU time of hours| over the hours that differ."""
        texts = []
        # A day at a time, so that memory is bounded by a day's rows.
        for day in sorted({hour - hour % DAY_NS for hour in built}):
            hours = [hour for hour in built if day <= hour < day + DAY_NS]
            for hour, tenant, wrong_ns in self._differing(store, hours):
                self.difference_ns += wrong_ns
                texts.append(
                    f"the hour {hour} of tenant {tenant!r} is not the sum of its rows ({wrong_ns} ns of CPU time)"
                )
        self.findings: list[Finding] = bounded("rollup", texts, len(texts))

    def _differing(self, store: Store, hours: list[int]) -> list[tuple[int, str, int]]:
        start, end = hours[0], hours[-1] + HOUR_NS
        listed = ", ".join(map(str, hours))
        total = ", ".join(
            f"max({m}) AS t{i}" if m in MAXIMA else f"sum(toUInt128({m})) AS t{i}"
            for i, m in enumerate(MEASURES)
        )
        columns = ", ".join(f"t{i}" for i in range(len(MEASURES)))
        cpu = MEASURES.index("cpu_usage_ns")
        raw = f"""SELECT bucket AS hour, tenant, count() AS n, {total} FROM ({parts(start, end, HOUR_NS)})
            WHERE bucket IN ({listed}) GROUP BY hour, tenant"""
        by_hour = f"""SELECT start_ns AS hour, tenant, sum(rows) AS n, {total} FROM usage_by_hour
            WHERE start_ns IN ({listed}) GROUP BY hour, tenant"""
        # A row that crosses minutes is in several of them: their number of rows is not that of the hour.
        by_minute = f"""SELECT intDiv(start_ns, {HOUR_NS}) * {HOUR_NS} AS hour, tenant, 0 AS n, {total} FROM usage_by_minute
            WHERE start_ns >= {start} AND start_ns < {end} AND intDiv(start_ns, {HOUR_NS}) * {HOUR_NS} IN ({listed})
            GROUP BY hour, tenant"""
        assert HOUR_NS % MINUTE_NS == 0
        found = store.query(f"""
            SELECT hour, tenant, max(t{cpu}) - min(t{cpu})
            FROM (
                SELECT hour, tenant, n, {columns} FROM ({raw}) UNION ALL
                SELECT hour, tenant, n, {columns} FROM ({by_hour}) UNION ALL
                SELECT hour, tenant, 0 AS n, {columns} FROM ({by_minute})
            )
            GROUP BY hour, tenant
            HAVING count() != 3 OR uniqExact({columns}) != 1 OR uniqExactIf(n, n > 0) != 1
            ORDER BY hour, tenant
            {DIVIDING}""")
        return [(int(hour), str(tenant), int(wrong)) for hour, tenant, wrong in found]
