"""Rows divided by the formula of `rollup/parts.py`, against Python that does it slowly; any cut of time adds up exactly."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledger.book.rows import COLUMNS, encode, read
from ledger.rollup.hours import Hours
from ledger.rollup.parts import HOUR_NS, MINUTE_NS, parts
from ledger.store.client import Store
from ledger.usage import MAX_SPANS, spans, totals, usage
from tests.ledger.site import DAY, HOUR, SECOND, T0, agent, arrival, batch
from wire.limits import MAX_VALUE
from wire.measures import BIT, MAXIMA, MEASURES
from wire.v1 import usage_pb2 as pb

TENANTS = ("acme", "it's \\ ü", "unattributed")
FEW = ("cpu_usage_ns", "memory_byte_seconds", "memory_peak_bytes", "pids_peak", "net_tx_external_packets")


class Row(NamedTuple):
    tenant: str
    start: int
    end: int
    values: dict[str, int]


INSTANTS = (
    st.integers(T0 - 2 * DAY, T0 + 2 * DAY)
    | st.sampled_from([T0 + n * HOUR + d for n in (-24, -1, 0, 1, 23, 24) for d in (-1, 0, 1)])
    | st.builds(lambda n: T0 + n * MINUTE_NS, st.integers(-90, 90))
)
LENGTHS = st.sampled_from([1, 2, SECOND, 10 * SECOND, MINUTE_NS, HOUR, HOUR + 1, DAY, 3 * DAY]) | st.integers(
    1, 2 * HOUR
)
VALUES = st.integers(0, 2**40) | st.sampled_from([0, 1, 7, MAX_VALUE - 1, MAX_VALUE])
ROWS = st.lists(
    st.builds(
        lambda tenant, start, length, values: Row(tenant, start, start + length, values),
        st.sampled_from(TENANTS),
        INSTANTS,
        LENGTHS,
        st.dictionaries(st.sampled_from(FEW), VALUES),
    ),
    min_size=1,
    max_size=6,
)


def made(rows: Iterable[Row]) -> list[pb.UsageBatch]:
    return [
        batch(agent(1), seq, r.start, r.end, [r.values], tenant=r.tenant) for seq, r in enumerate(rows, 1)
    ]


def put(store: Store, batches: Iterable[pb.UsageBatch]) -> None:
    for table in ("batches", "usage_hours", "usage_minutes", "rollup_builds"):
        store.command(f"TRUNCATE TABLE {table}")
    arrivals = [arrival(one) for one in batches]
    store.insert_binary("batches", COLUMNS, b"".join(encode(a, read(a)) for a in arrivals))


def part(row: Row, name: str, start: int, end: int) -> int:
    """The documented formula, in whole numbers without bounds."""
    value = row.values.get(name, 0)
    if name in MAXIMA:
        return value
    length = row.end - row.start
    a, b = max(row.start, start), min(row.end, end)
    return value * (b - row.start) // length - value * (a - row.start) // length


class Sum(NamedTuple):
    rows: int
    divided: int
    known_all: int
    known_any: int
    sums: tuple[int, ...]


def reference(rows: Iterable[Row], start: int, end: int) -> dict[str, Sum]:
    found: dict[str, Sum] = {}
    for row in rows:
        if row.start >= end or row.end <= start:
            continue
        known = sum(1 << BIT[name] for name in row.values)
        old = found.get(row.tenant, Sum(0, 0, (1 << 64) - 1, 0, (0,) * len(MEASURES)))
        sums = tuple(
            max(was, part(row, name, start, end)) if name in MAXIMA else was + part(row, name, start, end)
            for name, was in zip(MEASURES, old.sums, strict=True)
        )
        divided = not (start <= row.start and row.end <= end)
        found[row.tenant] = Sum(
            old.rows + 1, old.divided + divided, old.known_all & known, old.known_any | known, sums
        )
    return found


def buckets(rows: list[Row], start: int, end: int, step: int) -> dict[tuple[int, str], Sum]:
    out = {}
    first = min((row.start for row in rows), default=start)
    last = max((row.end for row in rows), default=end)
    at = max(start, first) // step * step
    while at < min(end, last):
        for tenant, found in reference(rows, max(start, at), min(end, at + step)).items():
            # A row is divided if a bucket or the span cuts it.
            out[at, tenant] = found
        at += step
    return out


def summed(store: Store, sql: str) -> dict[tuple[int, str], Sum]:
    columns = ", ".join(f"max({m})" if m in MAXIMA else f"sum(toUInt128({m}))" for m in MEASURES)
    return {
        (bucket, tenant): Sum(rows, divided, all_, any_, tuple(map(int, values)))
        for bucket, tenant, rows, divided, all_, any_, *values in store.query(
            f"SELECT bucket, tenant, count(), sum(divided), groupBitAnd(known), groupBitOr(known), {columns} FROM ({sql})"
            " GROUP BY bucket, tenant"
        )
    }


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(rows=ROWS, start=INSTANTS, length=LENGTHS, step=st.sampled_from([MINUTE_NS, HOUR, DAY]))
def test_rows_are_divided_at_boundaries_as_documented(
    store: Store, rows: list[Row], start: int, length: int, step: int
) -> None:
    if step == MINUTE_NS:
        length = min(length, 3 * HOUR)
    put(store, made(rows))
    end = start + length
    assert summed(store, parts(start, end, None)) == {
        (start, t): s for t, s in reference(rows, start, end).items()
    }
    assert summed(store, parts(start, end, step)) == buckets(rows, start, end, step)


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(
    rows=ROWS,
    cuts=st.lists(INSTANTS, max_size=5),
    built=st.booleans(),
    by=st.sampled_from(["tenant", "hour", "day"]),
)
def test_any_partition_of_time_adds_up_to_the_whole(
    store: Store, rows: list[Row], cuts: list[int], built: bool, by: str
) -> None:
    put(store, made(rows))
    hours = Hours(store)
    if built:
        hours.build_settled(T0 + 30 * DAY, 10_000)
        assert hours.dirty == []
    start, end = T0 - 3 * DAY, T0 + 7 * DAY
    whole = reference(rows, start, end)
    assert whole.keys() == {row.tenant for row in rows}
    edges = sorted({start, *cuts, end})
    sums = {tenant: dict.fromkeys(MEASURES, 0) for tenant in whole}
    for a, b in pairwise(edges):
        slow = reference(rows, a, b)
        assert totals(store, hours.dirty, a, b) == {
            tenant: dict(zip(MEASURES, found.sums, strict=True)) for tenant, found in slow.items()
        }
        for line in usage(store, hours.dirty, a, b, by, None, 100_000):  # type: ignore[arg-type]
            for name in MEASURES:
                found = line[name] or 0
                old = sums[line["tenant"]][name]
                sums[line["tenant"]][name] = max(old, found) if name in MAXIMA else old + found
    assert sums == {tenant: dict(zip(MEASURES, found.sums, strict=True)) for tenant, found in whole.items()}


def test_what_nobody_measured_is_null_and_what_some_did_is_named(store: Store) -> None:
    put(store, made([
        Row("acme", T0, T0 + 5, {"cpu_usage_ns": 0, "memory_peak_bytes": 3}),
        Row("acme", T0 + 5, T0 + 9, {"cpu_usage_ns": 0}),
    ]))  # fmt: skip
    (line,) = usage(store, [T0], T0, T0 + HOUR, "tenant", None, 10)
    assert line["cpu_usage_ns"] == 0
    assert line["io_read_bytes"] is None
    assert line["memory_peak_bytes"] == 3
    assert line["known_in_part"] == ["memory_peak_bytes"]
    assert (line["rows"], line["divided_rows"], line["units"]) == (2, 0, 1)


def test_sums_beyond_64_bits_are_exact_from_rows_and_from_hours(store: Store) -> None:
    put(store, made([Row("acme", T0 + n, T0 + HOUR - n, {"cpu_usage_ns": MAX_VALUE}) for n in range(9)]))
    hours = Hours(store)
    assert totals(store, hours.dirty, T0, T0 + HOUR)["acme"]["cpu_usage_ns"] == 9 * MAX_VALUE > 2**64
    assert hours.build_settled(T0 + HOUR, 10) == 1
    (line,) = usage(store, hours.dirty, T0 - DAY, T0 + DAY, "tenant", None, 10)
    assert line["cpu_usage_ns"] == 9 * MAX_VALUE


def test_a_row_over_years_is_divided_without_loss(store: Store) -> None:
    row = Row("acme", 1, MAX_VALUE - 1, {"cpu_usage_ns": MAX_VALUE})
    put(store, made([row]))
    dirty = list(range(0, 2 * T0, HOUR))
    pieces = [
        totals(store, dirty, a, b)["acme"]["cpu_usage_ns"]
        for a, b in ((1, T0), (T0, T0 + 1), (T0 + 1, 2 * T0))
    ]
    assert pieces == [part(row, "cpu_usage_ns", a, b) for a, b in ((1, T0), (T0, T0 + 1), (T0 + 1, 2 * T0))]
    assert all(pieces[:1] + pieces[2:])


@pytest.mark.parametrize("tenant", TENANTS)
def test_a_tenant_sees_its_own_usage(store: Store, tenant: str) -> None:
    rows = [Row(t, T0, T0 + 2 * HOUR, {"cpu_usage_ns": 10 + n}) for n, t in enumerate(TENANTS)]
    put(store, made(rows))
    hours = Hours(store)
    for most in (0, 1, 1):
        hours.build_settled(T0 + DAY, most)
        lines = usage(store, hours.dirty, T0, T0 + 2 * HOUR, "tenant", tenant, 10)
        assert [(line["tenant"], line["cpu_usage_ns"]) for line in lines] == [
            (tenant, 10 + TENANTS.index(tenant))
        ]


def test_units_are_listed_with_their_names_and_no_more_than_asked(store: Store) -> None:
    put(store, [batch(agent(1), 1, T0, T0 + 5, [{"cpu_usage_ns": n} for n in range(5)])])
    lines = usage(store, [T0], T0, T0 + DAY, "unit", None, 3)
    assert [(line["cgroup_id"], line["cgroup_path"], line["cpu_usage_ns"]) for line in lines] == [
        (1, "/c1", 0), (2, "/c2", 1), (3, "/c3", 2)
    ]  # fmt: skip
    assert lines[0]["agent_id"] == agent(1)


@given(
    dirty=st.sets(st.integers(-3, 200)),
    start=st.integers(0, 190 * HOUR_NS),
    length=st.integers(1, 180 * HOUR_NS),
    whole=st.booleans(),
)
def test_spans_cover_all_time_once_and_no_dirty_or_cut_hour_is_read_as_built(
    dirty: set[int], start: int, length: int, whole: bool
) -> None:
    end = start + length
    if whole:
        start, end = start - start % HOUR_NS, end - end % HOUR_NS + HOUR_NS
    raw, hours = spans(sorted(h * HOUR_NS for h in dirty), start, end)
    tiles = sorted(raw + hours)
    assert [tiles[0][0], *(b for _, b in tiles)] == [*(a for a, _ in tiles), end]
    assert tiles[0][0] == start
    assert len(raw) <= MAX_SPANS
    for a, b in hours:
        assert a % HOUR_NS == b % HOUR_NS == 0
        assert not any(a <= h * HOUR_NS < b for h in dirty)
    if len(dirty) + 2 <= MAX_SPANS:
        wrong = [h for a, b in raw for h in range(a - a % HOUR_NS, b, HOUR_NS) if h // HOUR_NS not in dirty]
        assert all(h < start or h + HOUR_NS > end for h in wrong)
