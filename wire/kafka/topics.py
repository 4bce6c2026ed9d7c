"""The topics, and what their messages may weigh."""

from __future__ import annotations

from typing import NamedTuple

from wire.log.records import MAX_BODY_BYTES

MAX_VALUE_BYTES = MAX_BODY_BYTES
OVERHEAD_BYTES = 64 << 10
"""More than the key, the headers and Kafka's own of any message."""


class Topics(NamedTuple):
    """Names."""

    usage: str
    parked: str
    rejected: str

    @classmethod
    def of(cls, usage: str) -> Topics:
        return cls(usage, f"{usage}.parked", f"{usage}.rejected")
