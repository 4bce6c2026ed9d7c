"""Spans against plain sets."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ledger.periods.spans import common, joined, subtract
from ledger.periods.streams import Span

SPANS = st.lists(
    st.builds(
        lambda agent, epoch, first, size: Span(agent, epoch, first, first + size),
        st.sampled_from("ab"),
        st.integers(1, 2),
        st.integers(1, 30),
        st.integers(0, 8),
    ),
    max_size=12,
)


def seqs(spans: list[Span]) -> list[tuple[str, int, int]]:
    return [(s.agent_id, s.epoch, seq) for s in spans for seq in range(s.first_seq, s.last_seq + 1)]


def assert_sorted_disjoint_and_maximal(spans: list[Span]) -> None:
    for before, after in pairwise(spans):
        assert before < after
        assert before[:2] != after[:2] or before.last_seq + 1 < after.first_seq


@given(SPANS, SPANS)
def test_what_is_left_is_what_sets_leave(spans: list[Span], taken: list[Span]) -> None:
    left = subtract(spans, taken)
    assert Counter(seqs(left)) == Counter(set(seqs(spans)) - set(seqs(taken)))
    assert_sorted_disjoint_and_maximal(left)


@given(SPANS)
def test_joined_spans_are_the_same_set_in_as_few_as_it_takes(spans: list[Span]) -> None:
    once = list(joined(spans))
    assert Counter(seqs(once)) == Counter(set(seqs(spans)))
    assert_sorted_disjoint_and_maximal(once)


@given(SPANS)
def test_what_is_common_is_what_counts_twice(spans: list[Span]) -> None:
    twice = [key for key, times in Counter(seqs(spans)).items() if times > 1]
    assert sorted(seqs(common(spans))) == sorted(twice)
