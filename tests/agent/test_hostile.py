"""Names from other people's hosts, made safe."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from agent.meter.hostile import visible

ANY_TEXT = st.text(st.characters(codec=None, categories=None, exclude_categories=()), max_size=200)


@given(ANY_TEXT, st.integers(0, 300))
def test_what_comes_out_is_bounded_valid_and_printable(text: str, bound: int) -> None:
    out = visible(text, bound)
    assert len(out.encode()) <= bound
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in out)


@given(ANY_TEXT, ANY_TEXT)
def test_different_names_stay_different(a: str, b: str) -> None:
    bound = 1 << 20
    assert (visible(a, bound) == visible(b, bound)) == (a == b)


def test_terminal_escapes_and_bidirectional_overrides_are_written_out() -> None:
    assert visible("\x1b[2Jroot", 100) == "\\x1b[2Jroot"
    assert visible("a\u202egnp.exe", 100) == "a\\u{202e}gnp.exe"
    assert visible("a\\b", 100) == "a\\\\b"
    assert visible("\udcff", 100) == "\\xff"
    assert visible("x" * 70_000, 1_024) == "x" * 1_024
