"""The format of the durable log: what can be told from a header alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wire.identity import digest
from wire.log import Kind, frame
from wire.log.records import HEADER_BYTES, extent_at, mark, record_at

AGENT = bytes(range(16))


@given(st.binary(max_size=50), st.binary(max_size=200), st.binary(max_size=30), st.integers(0, 1 << 40))
def test_a_header_says_how_far_its_record_reaches_whatever_became_of_the_batch(
    note: bytes, body: bytes, before: bytes, base: int
) -> None:
    head, _ = frame(Kind.REJECTED, 1, AGENT, 7, 9, digest(body), note, body)
    whole = record_at(before + head + body, len(before), base)
    assert whole is not None
    for left in (before + head + body, before + head, before + head + bytes(len(body))):
        extent = extent_at(left, len(before), base)
        assert extent is not None
        assert (extent.kind, extent.end) == (whole.kind, whole.end)


@given(st.binary(min_size=1, max_size=50), st.data())
def test_a_header_or_a_note_of_which_a_byte_is_wrong_or_missing_says_nothing(
    note: bytes, data: st.DataObject
) -> None:
    head, _ = frame(Kind.ACCEPTED, 1, AGENT, 7, 9, digest(b""), note, b"")
    at = data.draw(st.integers(0, len(head) - 1))
    spoilt = bytearray(head)
    spoilt[at] ^= data.draw(st.integers(1, 255))
    assert extent_at(bytes(spoilt), 0, 0) is None
    assert extent_at(head[:at], 0, 0) is None


def test_a_mark_is_one_only_where_it_says_that_it_lies() -> None:
    piece = b"x" * 5 + mark(105)
    extent = extent_at(piece, 5, 100)
    assert extent is not None
    assert (extent.kind, extent.end) == (Kind.MARK, 105 + HEADER_BYTES)
    assert extent_at(piece, 5, 101) is None
