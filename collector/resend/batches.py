"""One batch on its way, whatever it was read from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from wire.identity import BatchId


class Found(NamedTuple):
    """A batch at its place, or a place where there is none."""

    place: str
    """For people: which file, and where in it."""
    end: int
    """How much of the source has been read with it, in bytes; of Kafka, in records."""
    identity: BatchId | None
    tenant: str
    interval_start_unix_ns: int
    interval_end_unix_ns: int
    rows: int
    body: bytes
    trouble: str
    """Why it cannot be sent; empty if it can."""


Source = Iterator[Found]


def unreadable(place: str, end: int, trouble: str) -> Found:
    return Found(place, end, None, "", 0, 0, 0, b"", trouble)
