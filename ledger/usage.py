"""How much was used between two times: sums of hours that are built, and of rows where none is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from ledger.rollup.parts import AGGREGATES, DAY_NS, HOUR_NS, NAMES, UNIT, parts, sums
from ledger.store.client import Store
from wire.measures import MEASURES

By = Literal["tenant", "hour", "day", "unit"]
MAX_LINES = 1_000_000
MAX_SPANS = 32
"""Spans to add up from rows, each a part of the statement; with more of them those that lie closest become one."""

_STEPS = {"hour": HOUR_NS, "day": DAY_NS}


def usage(
    store: Store,
    dirty: Sequence[int],
    start_ns: int,
    end_ns: int,
    by: By,
    tenant: str | None,
    limit: int,
) -> list[dict[str, Any]]:
    """Lines with tenant, rows, units (how many), p50/p95/p99 of CPUs in use, and every measure; `start_unix_ns` by hour and
    day; the unit's names by unit. `dirty`: starts of the hours that have batches and no build that counts, ascending. A row
    that crosses an end of the span counts in part.
    """
    names, found = _summed(store, dirty, start_ns, end_ns, by, tenant, limit)
    return [_line(names, row) for row in found]


def totals(store: Store, dirty: Sequence[int], start_ns: int, end_ns: int) -> dict[str, dict[str, int]]:
    """Tenant -> measure -> what all of it comes to, also where no row says that it was measured."""
    names, found = _summed(store, dirty, start_ns, end_ns, "tenant", None, MAX_LINES)
    assert names == ["tenant"]
    return {row[0]: dict(zip(MEASURES, map(int, row[-len(MEASURES) :]), strict=True)) for row in found}


def _summed(
    store: Store,
    dirty: Sequence[int],
    start_ns: int,
    end_ns: int,
    by: By,
    tenant: str | None,
    limit: int,
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The first columns' names, and rows: those, rows, divided_rows, known_all, known_any, units, cpus_used, measures."""
    raw, hours = spans(dirty, start_ns, end_ns)
    of_tenant = "" if tenant is None else "tenant = {tenant:String}"
    keys, names = ["tenant"], ["tenant"]
    if by in _STEPS:
        keys.append(f"intDiv(bucket, {_STEPS[by]}) * {_STEPS[by]}")
        names.append("start_unix_ns")
    if by == "unit":
        keys += UNIT
        names += UNIT
    keyed = ", ".join(f"{key} AS {name}" for key, name in zip(keys, names, strict=True))
    grouped = ", ".join(names)
    called = "".join(f", max({name}) AS {name}" for name in NAMES) if by == "unit" else ""
    # Both are added up by what is asked for and nothing finer, so that memory is that of the answer.
    sources = []
    if hours:
        where = " OR ".join(f"start_ns >= {a} AND start_ns < {b}" for a, b in hours)
        sources.append(f"""
            SELECT {keyed}{called}, sum(rows) AS rows, sum(divided_rows) AS divided_rows,
                groupBitAnd(known_all) AS known_all, groupBitOr(known_any) AS known_any,
                uniqExactMergeState(units) AS units,
                quantilesDDMergeState(0.01, 0.5, 0.95, 0.99)(cpus_used) AS cpus_used, {sums(columns_are_sums=True)}
            FROM (SELECT *, start_ns AS bucket FROM usage_by_hour)
            WHERE ({where}){" AND " + of_tenant if of_tenant else ""} GROUP BY {grouped}""")
    sources += [
        f"SELECT {keyed}{called}, {AGGREGATES}, {sums()} FROM ({parts(a, b, HOUR_NS, of_tenant)}) GROUP BY {grouped}"
        for a, b in raw
    ]
    found = store.query(
        f"""
        SELECT {grouped}{called}, sum(rows) AS rows, sum(divided_rows) AS divided_rows,
            groupBitAnd(known_all) AS known_all, groupBitOr(known_any) AS known_any, uniqExactMerge(units) AS units,
            quantilesDDMerge(0.01, 0.5, 0.95, 0.99)(cpus_used) AS cpus_used, {sums(columns_are_sums=True)}
        FROM ({" UNION ALL ".join(sources)})
        GROUP BY {grouped} ORDER BY {grouped} LIMIT {min(limit, MAX_LINES)}""",
        {"tenant": tenant} if tenant is not None else None,
    )
    return names + list(NAMES if by == "unit" else ()), found


def _line(names: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    line = dict(zip(names, row[: len(names)], strict=True))
    if "agent_id" in line:
        line["agent_id"] = str(line["agent_id"])
    rows, divided, known_all, known_any, units, used, *values = row[len(names) :]
    line |= {"rows": rows, "divided_rows": divided, "units": units}
    line |= {f"cpus_p{p}": round(v, 4) for p, v in zip((50, 95, 99), used, strict=True)}
    # Missing is not zero: what nobody measured is null, and what only some rows know is named.
    line |= {
        name: value if known_any >> bit & 1 else None
        for bit, (name, value) in enumerate(zip(MEASURES, values, strict=True))
    }
    partly = [name for bit, name in enumerate(MEASURES) if known_any >> bit & 1 and not known_all >> bit & 1]
    line["known_in_part"] = partly
    return line


def spans(
    dirty: Iterable[int], start_ns: int, end_ns: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """[start, end) as (spans to add up from rows, spans of hours to read), each ascending and disjoint; together they are all
    of it. Rows: the hours that are dirty, and those that the ends cut. In every other hour is nothing, or a build.
    """
    first, last = start_ns - start_ns % HOUR_NS, end_ns - end_ns % HOUR_NS
    cut = {hour for hour, end in ((first, start_ns), (last, end_ns)) if hour != end}
    raw: list[tuple[int, int]] = []
    for hour in sorted(cut.union(hour for hour in dirty if first <= hour < end_ns)):
        if raw and raw[-1][1] == hour:
            raw[-1] = (raw[-1][0], hour + HOUR_NS)
        else:
            raw.append((hour, hour + HOUR_NS))
    gaps = sorted(range(1, len(raw)), key=lambda at: raw[at][0] - raw[at - 1][1], reverse=True)
    cuts = [0, *sorted(gaps[: MAX_SPANS - 1]), len(raw)]
    raw = [(raw[a][0], raw[b - 1][1]) for a, b in pairwise(cuts) if a < b]
    raw = [(max(start_ns, a), min(end_ns, b)) for a, b in raw]
    edges = [start_ns, *(edge for span in raw for edge in span), end_ns]
    return raw, [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
