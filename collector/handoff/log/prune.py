"""Where the log may begin: what is older than somebody wants to keep, and that nobody needs any more. Pure.

Only whole segments go, from the beginning on and never the last, so the log stays one stretch. Until when a segment was
written says how old it is; a copy that was made without its times is kept for longer, not shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Segment(NamedTuple):
    base: int
    """Offset of its first byte in the whole log."""
    size: int
    written_unix_ns: int
    """When something was written to it last."""


class Keep(NamedTuple):
    """What somebody wants to keep; None is no bound. Beyond either bound a segment may go."""

    age_ns: int | None = None
    size: int | None = None
    """Bytes of the whole log."""


def beginning(segments: Sequence[Segment], keep: Keep, needed_from: int, now_unix_ns: int) -> int:
    """Offset at which the log may begin; `segments` ascend, one at least. Everything from `needed_from` on is needed."""
    size = sum(segment.size for segment in segments)
    for segment, following in pairwise(segments):
        old = keep.age_ns is not None and now_unix_ns - segment.written_unix_ns > keep.age_ns
        large = keep.size is not None and size > keep.size
        if following.base > needed_from or not (old or large):
            return segment.base
        size -= segment.size
    return segments[-1].base
