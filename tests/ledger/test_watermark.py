"""The watermark says of time what blockers say of periods."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.periods.blockers import blockers
from ledger.periods.calendar import Period
from ledger.periods.streams import Run, Stream
from ledger.periods.watermark import watermark
from tests.ledger.histories import HORIZON, History, histories


def test_a_stream_is_complete_up_to_where_its_last_interval_begins() -> None:
    """The rest of that interval, of other tenants, may still be on its way."""
    streams = [
        Stream("a", 1, (Run(1, 9, 100, 110, 180, 190),)),
        Stream("b", 1, (Run(1, 2, 100, 110, 150, 160),)),
    ]
    assert watermark(streams, [], {}) == ({"a": 180, "b": 150}, 150)
    assert watermark(streams, [], {"b": 170}) == ({"a": 180, "b": None}, 180)
    assert watermark([], [], {}) == ({}, None)


@settings(max_examples=200)
@given(histories(clocks_are_set_back=True), st.integers(1, HORIZON))
def test_all_is_complete_up_to_the_watermark_and_not_beyond(history: History, end: int) -> None:
    marks = watermark(history.streams, history.held, history.retired)
    found = blockers(Period("so far", 0, end), history.streams, history.held, history.retired)
    assert (marks.overall is None or end <= marks.overall) == (not found)
    for agent_id, mark in marks.agents.items():
        assert (mark is None or end <= mark) == all(b.agent_id != agent_id for b in found)


@given(histories(clocks_are_set_back=True), st.lists(st.integers(1, HORIZON), min_size=1, max_size=5))
def test_a_time_is_complete_when_each_period_of_it_is(history: History, cuts: list[int]) -> None:
    edges = [0, *sorted(set(cuts))]
    known = history.streams, history.held, history.retired
    tiles = [Period("tile", *pair) for pair in pairwise(edges)]
    by_tile = {b.id for tile in tiles for b in blockers(tile, *known)}
    assert by_tile == {b.id for b in blockers(Period("whole", 0, edges[-1]), *known)}


@given(histories(clocks_are_set_back=True), st.integers(1, HORIZON), st.data())
def test_what_was_waived_does_not_hold_the_watermark(history: History, end: int, data: st.DataObject) -> None:
    known = history.streams, history.held, history.retired
    found = [b.id for b in blockers(Period("so far", 0, end), *known)]
    waived = data.draw(st.sets(st.sampled_from(found))) if found else set()
    mark = watermark(*known, waived=waived).overall
    assert (mark is None or end <= mark) == (set(found) == waived)
