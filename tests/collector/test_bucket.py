"""The token bucket against rational arithmetic, and the plans that fill it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from collector.config import AdmissionSettings, TenantPlan
from collector.decide.admission import HEAVIEST, weight
from collector.decide.bucket import MICRO, UNLIMITED, Bucket, Plan
from collector.errors import CollectorError
from collector.plans import Plans, load_overrides, save_overrides
from wire.limits import MAX_BATCH_BYTES, MAX_BATCH_ROWS

SECOND = 1_000_000_000

plans = st.builds(Plan, st.integers(1, 10**12), st.integers(1, 10**15), st.just(1 << 30), st.just(100_000))
steps = st.lists(
    st.tuples(st.integers(0, 10**9) | st.integers(0, 10**15), st.integers(0, 10**9) | st.integers(0, 10**15)),
    max_size=30,
)


class Exact:
    """`B = min(capacity, B + rate * dt) - weight` in fractions of a micro-token."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.balance = plan, Fraction(plan.capacity)

    def step(self, elapsed_ns: int, weight: int) -> None:
        gained = Fraction(self.plan.rate * elapsed_ns, SECOND)
        self.balance = min(Fraction(self.plan.capacity), self.balance + gained) - weight


def exactly(bucket: Bucket) -> Fraction:
    return bucket.balance + Fraction(bucket.remainder, SECOND)


@given(plans, steps)
def test_the_balance_is_the_formula_s_to_the_last_fraction(plan: Plan, steps: list[tuple[int, int]]) -> None:
    bucket, exact, now_ns = Bucket(plan.capacity, 0, 0), Exact(plan), 0
    for elapsed_ns, charge in steps:
        now_ns += elapsed_ns
        exact.step(elapsed_ns, charge)
        assert bucket.at(plan, now_ns) - charge == exact.balance // 1
        bucket.refill(plan, now_ns)
        bucket.balance -= charge
        assert exactly(bucket) == exact.balance


@given(plans, st.integers(-(10**15), 10**15), st.lists(st.integers(0, 10**12), min_size=1, max_size=50))
@example(Plan(1, 10**15, 0, 0), 0, [1] * 50)
def test_any_split_of_a_stretch_of_time_gives_the_same(plan: Plan, balance: int, parts: list[int]) -> None:
    often, once = Bucket(balance, 0, 0), Bucket(balance, 0, 0)
    now_ns = 0
    for part in parts:
        now_ns += part
        often.refill(plan, now_ns)
    once.refill(plan, now_ns)
    assert exactly(often) == exactly(once)


@given(plans, st.integers(0, 10**12), st.integers(0, 10**12))
def test_time_that_has_passed_already_changes_nothing(plan: Plan, now_ns: int, back_ns: int) -> None:
    bucket = Bucket(-5, 7, now_ns)
    bucket.refill(plan, now_ns - back_ns)
    assert (bucket.balance, bucket.remainder, bucket.last_ns) == (-5, 7, now_ns)


@given(plans, st.integers(-(10**15), 0), st.integers(0, SECOND - 1), st.integers(0, 10**6))
def test_a_balance_is_reached_at_the_nanosecond_that_was_said_and_not_before(
    plan: Plan, balance: int, remainder: int, wanted: int
) -> None:
    wanted = min(wanted, plan.capacity)
    wait_ns = Bucket(balance, remainder, 0).ns_until(plan, wanted)
    assert Bucket(balance, remainder, 0).at(plan, wait_ns) >= wanted
    if wait_ns:
        assert Bucket(balance, remainder, 0).at(plan, wait_ns - 1) < wanted


def test_an_unlimited_plan_is_full_again_within_a_nanosecond() -> None:
    plan = Plan(UNLIMITED, UNLIMITED, 0, 0)
    bucket = Bucket(0, 0, 0)
    bucket.refill(plan, 1)
    assert bucket.balance > 1_000_000 * HEAVIEST / MICRO


def test_a_small_batch_weighs_far_less_than_a_large_one() -> None:
    assert weight(1_000, 5) == pytest.approx(0.2 * MICRO, rel=0.05)
    assert weight(500_000, 1_000) == pytest.approx(34.5 * MICRO, rel=0.01)
    assert weight(MAX_BATCH_BYTES, MAX_BATCH_ROWS) == HEAVIEST < 62 * MICRO


@given(
    st.integers(0, MAX_BATCH_BYTES), st.integers(0, MAX_BATCH_ROWS), st.integers(0, 5_000), st.integers(0, 50)
)
def test_more_bytes_or_rows_never_weigh_less(size: int, rows: int, more_bytes: int, more_rows: int) -> None:
    assert weight(size, rows) <= weight(size + more_bytes, rows + more_rows)


DEFAULT = AdmissionSettings(rate=10.0, burst=100.0)


@pytest.mark.parametrize(
    ("override", "settings", "rate", "capacity"),
    [
        (None, None, 10, 100),
        (None, TenantPlan(rate=2.5), 2.5, 150),
        (None, TenantPlan(rate=0.001), 0.001, HEAVIEST / MICRO),
        (None, TenantPlan(burst=70), 10, 70),
        (None, TenantPlan(rate=3, burst=70), 3, 70),
        (TenantPlan(rate=5), TenantPlan(rate=3, burst=70), 5, 300),
        (TenantPlan(burst=99), TenantPlan(rate=3, burst=70), 3, 99),
        (TenantPlan(burst=99), None, 10, 99),
    ],
)  # fmt: skip
def test_an_override_lies_over_the_tenant_s_plan_and_that_over_the_default(
    override: TenantPlan | None, settings: TenantPlan | None, rate: float, capacity: float
) -> None:
    said = Plans(
        AdmissionSettings(rate=10.0, burst=100.0, tenants={"acme": settings} if settings else {}),
        {"acme": override} if override else {},
    )
    plan = said.of("acme")
    assert (plan.rate, plan.capacity) == (round(rate * MICRO), round(capacity * MICRO))
    assert said.of("globex") == Plans(DEFAULT, {}).of("globex")
    assert said.source("acme") == ("override" if override else "settings" if settings else "default")


def test_without_settings_nobody_is_limited_and_a_tenant_can_be_let_off() -> None:
    assert Plans(AdmissionSettings(), {}).of("acme").rate == UNLIMITED
    free = AdmissionSettings(rate=1.0, tenants={"acme": TenantPlan(rate="unlimited", park_batches=3)})
    plan = Plans(free, {}).of("acme")
    assert (plan.rate, plan.park_batches, plan.park_bytes) == (UNLIMITED, 3, 1 << 30)


def test_overrides_are_the_same_after_they_were_stored(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    assert load_overrides(path) == {}
    overrides = {"acme": TenantPlan(rate=2.5, park_batches=7), "globex": TenantPlan(rate="unlimited")}
    save_overrides(path, overrides)
    assert load_overrides(path) == overrides
    path.write_text('{"acme": {"rate": "fast"}}')
    with pytest.raises(CollectorError, match="move it away"):
        load_overrides(path)
    with pytest.raises(CollectorError, match="the override was not made"):
        save_overrides(tmp_path / "missing" / "plans.json", overrides)
