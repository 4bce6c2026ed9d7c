"""Batches in files: what was written comes back, and whatever the bytes are, each is accounted for."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from wire.delimited import delimit, delimited
from wire.limits import MAX_BATCH_BYTES


@given(st.lists(st.binary(max_size=300)))
def test_what_was_written_comes_back_at_its_place(bodies: list[bytes]) -> None:
    data = b"".join(map(delimit, bodies))
    found = list(delimited(io.BytesIO(data)))
    assert [f.body for f in found] == bodies
    assert not any(f.trouble for f in found)
    for one in found:
        assert data[one.offset : one.end] == delimit(one.body)


@given(st.binary(max_size=500))
def test_any_bytes_are_read_to_an_end_and_places_lie_behind_one_another(data: bytes) -> None:
    at = 0
    for one in delimited(io.BytesIO(data)):
        assert (one.offset, at < one.end <= len(data)) == (at, True)
        at = one.end


@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=4), st.integers(1, 100))
def test_a_file_that_was_cut_says_so_behind_its_whole_batches(bodies: list[bytes], missing: int) -> None:
    data = b"".join(map(delimit, bodies))
    whole = len(data) - len(delimit(bodies[-1]))
    missing = min(missing, len(data) - whole - 1)
    *sound, torn = delimited(io.BytesIO(data[: len(data) - missing])) if missing else [*bodies, None]
    if missing:
        assert [f.body for f in sound] == bodies[:-1]
        assert torn.offset == whole
        assert "in the middle" in torn.trouble or "no length" in torn.trouble


def test_a_batch_over_the_bound_is_passed_over_and_the_next_is_read() -> None:
    data = delimit(b"x" * (MAX_BATCH_BYTES + 1)) + delimit(b"next")
    large, following = delimited(io.BytesIO(data))
    assert "more than a batch may have" in large.trouble
    assert (following.body, following.offset, following.end) == (b"next", large.end, len(data))
