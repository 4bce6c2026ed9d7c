"""Periods tile time, and are called what an operator calls them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.periods.calendar import (
    LAST_UNIX_NS,
    Length,
    PeriodError,
    following,
    length_of,
    parse,
    period_of,
    previous,
)

LENGTHS: tuple[Length, ...] = ("month", "day")


@given(st.integers(0, LAST_UNIX_NS), st.sampled_from(LENGTHS))
def test_every_instant_lies_in_one_period_and_periods_touch(unix_ns: int, length: Length) -> None:
    period = period_of(unix_ns, length)
    assert period.start_unix_ns <= unix_ns < period.end_unix_ns
    assert period.overlaps(unix_ns, unix_ns + 1)
    assert parse(period.name, length) == period
    assert length_of(period.name) == length
    if period.end_unix_ns <= LAST_UNIX_NS:
        after = following(period)
        assert after.start_unix_ns == period.end_unix_ns
        assert after.name > period.name
        assert previous(after) == period
        assert not period.overlaps(after.start_unix_ns, after.end_unix_ns)


@given(st.datetimes(datetime(1970, 1, 1), datetime(2554, 6, 30)), st.sampled_from(LENGTHS))  # noqa: DTZ001
def test_the_name_is_that_of_the_calendar_in_utc(moment: datetime, length: Length) -> None:
    moment = moment.replace(tzinfo=UTC)
    seconds = int(moment.replace(microsecond=0).timestamp())
    wanted = moment.strftime("%Y-%m-%d" if length == "day" else "%Y-%m")
    assert period_of(seconds * 10**9, length).name == wanted


def test_a_leap_day_and_the_turn_of_a_year_are_where_the_calendar_has_them() -> None:
    february = parse("2028-02", "month")
    assert (february.end_unix_ns - february.start_unix_ns) // 86_400_000_000_000 == 29
    assert following(parse("2028-02-28", "day")).name == "2028-02-29"
    assert following(parse("2026-12", "month")).name == "2027-01"
    assert previous(parse("2026-01-01", "day")).name == "2025-12-31"


@pytest.mark.parametrize(
    ("name", "length", "form"),
    [
        ("2026-11-21", "month", "YYYY-MM, as 2026-11"),
        ("2026-11", "day", "YYYY-MM-DD, as 2026-11-21"),
        ("2026-13", "month", "YYYY-MM"),
        ("2026-02-29", "day", "YYYY-MM-DD"),
        ("2026-11\n", "month", "YYYY-MM"),
        ("٢٠٢٦-11", "month", "YYYY-MM"),
        ("", "month", "YYYY-MM"),
        ("1969-12", "month", "1970"),
        ("2554-07", "month", "1970"),
    ],
)
def test_a_wrong_name_is_answered_with_the_form(name: str, length: Length, form: str) -> None:
    with pytest.raises(PeriodError, match=form):
        parse(name, length)


def test_a_time_outside_of_the_calendar_is_refused() -> None:
    for unix_ns in (-1, LAST_UNIX_NS + 1):
        with pytest.raises(PeriodError):
            period_of(unix_ns, "month")
    with pytest.raises(PeriodError):
        length_of("november")
