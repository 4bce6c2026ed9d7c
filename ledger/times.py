"""Instants as people write and read them: RFC 3339, or a date; always UTC."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

NS = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def unix_ns(text: str) -> int:
    """Of `2026-11-21T23:00:00Z`, of any other offset, or of `2026-11-21`, which is its midnight in UTC. ValueError
    if it is neither, or before 1970. Finer than a microsecond is cut off."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        pass
    else:
        return _ns(datetime(day.year, day.month, day.day, tzinfo=UTC))
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ValueError(
            f"`{text}` is neither a date such as 2026-11-21 nor an instant such as 2026-11-21T23:00:00Z"
        )
    return _ns(at)


def _ns(at: datetime) -> int:
    # Whole microseconds: a float of seconds has no room for them.
    micros = (at - _EPOCH) // timedelta(microseconds=1)
    if micros < 0:
        raise ValueError(f"`{at.isoformat()}` is before 1970")
    return micros * 1_000


def iso(at_unix_ns: int) -> str:
    """RFC 3339, as exactly as it takes; the number itself where no calendar has it."""
    seconds, rest = divmod(at_unix_ns, NS)
    try:
        text = (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    except OverflowError:
        return str(at_unix_ns)
    fraction = f".{rest:09d}".rstrip("0") if rest else ""
    return f"{text}{fraction}Z"


def clock(at_unix_ns: int, now_unix_ns: int) -> str:
    """For a line that is read now: the time of today, the day too of any other."""
    text = iso(at_unix_ns - at_unix_ns % NS)
    return text[11:19] if text[:10] == iso(now_unix_ns)[:10] else text
