"""Billing periods: calendar months or days of UTC, which tile time without overlap. Pure.

Time is unix time in nanoseconds, integers throughout: a float cannot hold it. Unix days all have 86,400 seconds,
so a leap second belongs to no period of its own.
"""

from __future__ import annotations

import re
from datetime import date, timedelta
from typing import Literal, NamedTuple

from ledger.errors import LedgerError

Length = Literal["month", "day"]

_DAY_NS = 86_400_000_000_000
_EPOCH = date(1970, 1, 1)
LAST_UNIX_NS = (date(2554, 7, 1) - _EPOCH).days * _DAY_NS - 1
"""The last whole month whose nanoseconds fit 64 bits; nothing beyond it has a period."""

_FORM: dict[Length, tuple[re.Pattern[str], str]] = {
    "month": (re.compile(r"([0-9]{4})-([0-9]{2})"), "YYYY-MM, as 2026-11"),
    "day": (re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})"), "YYYY-MM-DD, as 2026-11-21"),
}


class PeriodError(LedgerError):
    """A name or a time that is no period; the message shows the form."""


class Period(NamedTuple):
    """[start_unix_ns, end_unix_ns), under the name "2026-11" or "2026-11-21"."""

    name: str
    start_unix_ns: int
    end_unix_ns: int

    def overlaps(self, start_unix_ns: int, end_unix_ns: int) -> bool:
        """Whether some of [start_unix_ns, end_unix_ns) lies in this period."""
        return start_unix_ns < self.end_unix_ns and end_unix_ns > self.start_unix_ns


def period_of(unix_ns: int, length: Length) -> Period:
    """The period in which an instant lies."""
    if not 0 <= unix_ns <= LAST_UNIX_NS:
        raise PeriodError(f"{unix_ns} ns is no time from 1970 to 2554: times are unix time in nanoseconds")
    return _beginning(_EPOCH + timedelta(days=unix_ns // _DAY_NS), length)


def parse(name: str, length: Length) -> Period:
    """The period of that name. PeriodError names the form that this length has."""
    pattern, form = _FORM[length]
    match = pattern.fullmatch(name)
    try:
        if match is None:
            raise ValueError(name)
        numbers = [int(group) for group in match.groups()]
        first = date(numbers[0], numbers[1], numbers[2] if length == "day" else 1)
    except ValueError as error:
        raise PeriodError(f"{name[:40]!r} is no {length}: write {form}") from error
    start = (first - _EPOCH).days * _DAY_NS
    if not 0 <= start <= LAST_UNIX_NS:
        raise PeriodError(f"{name!r} is not from 1970-01 to 2554-06")
    return _beginning(first, length)


def length_of(name: str) -> Length:
    """Of which length a period of this name is; PeriodError when it is of none."""
    length: Length = "day" if name.count("-") == 2 else "month"
    parse(name, length)
    return length


def following(period: Period) -> Period:
    return period_of(period.end_unix_ns, length_of(period.name))


def previous(period: Period) -> Period:
    return period_of(period.start_unix_ns - 1, length_of(period.name))


def _beginning(day: date, length: Length) -> Period:
    if length == "day":
        after = day + timedelta(days=1)
        name = f"{day.year:04}-{day.month:02}-{day.day:02}"
    else:
        day = day.replace(day=1)
        after = (day + timedelta(days=31)).replace(day=1)
        name = f"{day.year:04}-{day.month:02}"
    return Period(name, (day - _EPOCH).days * _DAY_NS, (after - _EPOCH).days * _DAY_NS)
