"""Instants as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def iso(unix_ns: int) -> str:
    """ISO 8601 with milliseconds; the number itself where no calendar has it."""
    try:
        return (
            datetime.fromtimestamp(unix_ns / 1e9, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
    except (ValueError, OverflowError, OSError):
        return str(unix_ns)
