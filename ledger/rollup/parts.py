"""SQL text: the part of every row of usage that lies in a span, divided at multiples of a step. Pure.

A row that crosses a boundary is divided by its share of wall-clock time, and said to be (`divided`). The part from a to b
of a value v over [s, e) is

    floor(v * (b - s) / (e - s)) - floor(v * (a - s) / (e - s))

so parts add up to v exactly, whatever the boundaries are; minutes add up to their hour, and hours to their period. A
maximum counts whole in each part. v < 2**62 and e - s < 2**62, hence 128 bits.
"""

from __future__ import annotations

from wire.measures import MAXIMA, MEASURES

MINUTE_NS = 60 * 10**9
HOUR_NS = 60 * MINUTE_NS
DAY_NS = 24 * HOUR_NS

UNIT = ("agent_id", "boot_id", "cgroup_id")
NAMES = ("host", "kind", "runtime", "container_id", "pod_uid", "name", "cgroup_path")
"""Of a unit; where they change within a bucket, the greatest stands for all."""

_BATCH = (
    *("agent_id", "epoch", "seq", "tenant", "interval_start_ns", "interval_end_ns", "interval_duration_ns"),
    *("boot_id", "host"),
)
_ROW = (*(name for name in NAMES if name != "host"), "cgroup_id", "known", *MEASURES)

DIVIDING = "SETTINGS max_block_size = 1024"
"""At the end of a statement that divides rows. A row of a block is a batch: up to a thousand rows of usage, and after an
outage each of those is divided into an hour's minutes or more, all of them at once."""


def parts(start_ns: int, end_ns: int, step_ns: int | None, only: str = "") -> str:
    """A SELECT of rows' parts within [start_ns, end_ns): `bucket` (Unix ns of its start; start_ns where there is no step),
    `divided`, `cpus_used`, tenant, unit, names, known, measures. `only`: a condition on columns of `batches`.
    """
    condition = f"interval_end_ns > {start_ns} AND interval_start_ns < {end_ns}" + (
        f" AND ({only})" if only else ""
    )
    rows = f"""
        SELECT {", ".join(_BATCH)}, {", ".join(f"u.{name} AS {name}" for name in _ROW)}
        FROM (SELECT {", ".join(_BATCH)}, {", ".join(f"`units.{name}`" for name in _ROW)} FROM batches FINAL WHERE {condition})
        ARRAY JOIN units AS u"""
    inside = f"interval_start_ns >= {start_ns} AND interval_end_ns <= {end_ns}"
    bucket = str(start_ns)
    buckets = f"[toUInt64({start_ns})]"
    bucket_end = str(end_ns)
    if step_ns is not None:
        # Buckets are counted up to the first one behind the end: a difference of unsigned numbers is a signed one.
        inside += f" AND intDiv(interval_start_ns, {step_ns}) + 1 = intDiv(interval_end_ns + {step_ns - 1}, {step_ns})"
        bucket = f"intDiv(interval_start_ns, {step_ns}) * {step_ns}"
        first = f"intDiv(greatest(interval_start_ns, {start_ns}), {step_ns})"
        behind = f"intDiv(least(interval_end_ns, {end_ns}) + {step_ns - 1}, {step_ns})"
        buckets = f"arrayMap(n -> n * {step_ns}, range({first}, {behind}))"
        bucket_end = f"bucket + {step_ns}"
    kept = ", ".join(("tenant", *UNIT, *NAMES, "known"))
    used = "cpu_usage_ns / greatest(interval_duration_ns, 1) AS cpus_used"
    return f"""
    SELECT toUInt64({bucket}) AS bucket, 0 AS divided, {used}, {kept}, {", ".join(MEASURES)}
    FROM ({rows}) WHERE {inside}
    UNION ALL
    SELECT bucket, 1 AS divided, {used}, {kept}, {", ".join(map(_part, MEASURES))}
    FROM (
        SELECT *, interval_end_ns - interval_start_ns AS length,
            greatest(interval_start_ns, bucket, {start_ns}) - interval_start_ns AS from_ns,
            least(interval_end_ns, {bucket_end}, {end_ns}) - interval_start_ns AS to_ns
        FROM (SELECT *, arrayJoin({buckets}) AS bucket FROM ({rows}) WHERE NOT ({inside}))
    )"""


def _part(measure: str) -> str:
    if measure in MAXIMA:
        return measure
    up_to = "intDiv(toUInt128({m}) * {at}, length)"
    return f"toUInt64({up_to.format(m=measure, at='to_ns')} - {up_to.format(m=measure, at='from_ns')})"


def sums(columns_are_sums: bool = False) -> str:
    """Aggregates of all measures in order, under their names: of parts (UInt64, added up as UInt128), or of sums of them."""
    return ", ".join(
        f"max({m}) AS {m}" if m in MAXIMA else f"sum({m if columns_are_sums else f'toUInt128({m})'}) AS {m}"
        for m in MEASURES
    )


AGGREGATES = (
    "count() AS rows, sum(divided) AS divided_rows, groupBitAnd(known) AS known_all, groupBitOr(known) AS known_any,"
    " uniqExactState(boot_id, cgroup_id) AS units, quantilesDDState(0.01, 0.5, 0.95, 0.99)(cpus_used) AS cpus_used"
)
"""Of parts, besides the measures: the columns that all rollups have, in order."""
COMMON = ("rows", "divided_rows", "known_all", "known_any", "units", "cpus_used")


def unit_sums(start_ns: int, end_ns: int, step_ns: int | None, only: str = "") -> str:
    """A SELECT of parts added up by bucket, tenant and unit, with the columns of table `usage_hours` under their names, and
    `bucket` for its start."""
    names = ", ".join(f"max({name}) AS {name}" for name in NAMES)
    keys = ", ".join(("bucket", "tenant", *UNIT))
    return f"SELECT {keys}, {names}, {AGGREGATES}, {sums()} FROM ({parts(start_ns, end_ns, step_ns, only)}) GROUP BY {keys}"
