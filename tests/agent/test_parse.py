"""Kernel text -> integers: missing is None, and one odd line costs itself only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.read import parse

PSI = (
    b"some avg10=0.00 avg60=0.12 avg300=1.05 total=123456\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=789\n"
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"42\n", 42),
        (b"0\n", 0),
        (b" 7 ", 7),
        (b"18446744073709551615\n", 2**64 - 1),
        (b"18446744073709551616\n", None),
        (b"9" * 5_000, None),
        (b"max\n", None),
        (b"-1\n", None),
        (b"", None),
        (b"\n", None),
        (b"1 2", None),
        (b"0x10", None),
        (None, None),
    ],
)
def test_a_number_is_a_number_or_unknown(text: bytes | None, value: int | None) -> None:
    assert parse.number(text) == value


def test_no_limit_is_unknown_in_both_hierarchies() -> None:
    assert parse.limit(b"max\n") is None
    assert parse.limit(b"9223372036854771712\n") is None
    assert parse.limit(b"1048576\n") == 1_048_576


def test_an_odd_line_does_not_spoil_the_others() -> None:
    text = b"usage_usec 5\nrubbish\nuser_usec x\n\nnr_periods -3\nsystem_usec 2\nusage_usec 9\n"
    assert parse.keyed(text) == {b"usage_usec": 5, b"system_usec": 2}
    assert parse.keyed(None) == {}
    assert parse.keyed(b"") == {}


def test_one_key_is_found_wherever_it_stands_and_only_as_a_whole_word() -> None:
    text = b"anon 1\ninactive_file 4096\ntotal_inactive_file 8192\n"
    assert parse.field(text, b"inactive_file") == 4_096
    assert parse.field(text, b"total_inactive_file") == 8_192
    assert parse.field(text, b"anon") == 1
    assert parse.field(text, b"file") is None
    assert parse.field(b"oom_kill 3", b"oom_kill") == 3
    assert parse.field(b"", b"anon") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PSI, (123_456_000, 789_000)),
        (PSI.split(b"\n")[0] + b"\n", (123_456_000, None)),
        (PSI.split(b"\n")[1] + b"\n", (None, 789_000)),
        (PSI.replace(b"total=123456", b"total=oops"), (None, 789_000)),
        (b"odd line\n" + PSI, (123_456_000, 789_000)),
        (PSI.rstrip(), (123_456_000, 789_000)),
        (b"", (None, None)),
        (None, (None, None)),
    ],
)
def test_pressure_totals_become_nanoseconds(
    text: bytes | None, expected: tuple[int | None, int | None]
) -> None:
    assert parse.pressure(text) == expected


def test_io_stat_is_read_by_device_and_a_partial_line_stays_partial() -> None:
    text = b"8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n253:0 rbytes=9\nloop0 rbytes=1\n8:16\n"
    assert parse.io_v2(text) == {"8:0": (1, 2, 3, 4), "253:0": (9, None, None, None)}
    assert parse.whole_devices(parse.io_v2(text)) == {"8:0": (1, 2, 3, 4)}
    assert parse.io_v2(b"") is None
    assert parse.io_v2(None) is None


def test_blkio_joins_bytes_and_operations() -> None:
    size = b"8:0 Read 4096\n8:0 Write 512\n8:0 Sync 4608\n8:0 Async 0\n8:0 Total 4608\nTotal 4608\n"
    count = b"8:0 Read 1\n8:0 Write 2\nTotal 3\n"
    assert parse.io_v1(size, count) == {"8:0": (4_096, 512, 1, 2)}
    assert parse.io_v1(size, None) == {"8:0": (4_096, 512, None, None)}
    assert parse.io_v1(None, None) is None


CPU_STAT = b"usage_usec 5\nuser_usec 3\nsystem_usec 2\nnice_usec 0\ncore_sched.force_idle_usec 0\n"
BANDWIDTH = b"nr_periods 7\nnr_throttled 4\nthrottled_usec 9\nnr_bursts 0\nburst_usec 0\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPU_STAT, (5_000, 3_000, 2_000, None, None, None)),
        (CPU_STAT + BANDWIDTH, (5_000, 3_000, 2_000, 7, 4, 9_000)),
        (CPU_STAT + b"odd line\n" + BANDWIDTH, (5_000, 3_000, 2_000, 7, 4, 9_000)),
        (
            CPU_STAT + b"nr_periods 7\nnr_throttled x\nthrottled_usec 9\n",
            (5_000, 3_000, 2_000, 7, None, 9_000),
        ),
        (BANDWIDTH + CPU_STAT, (5_000, 3_000, 2_000, 7, 4, 9_000)),
        (b"usage_usec 5\n", (5_000, None, None, None, None, None)),
        (CPU_STAT.replace(b"5", b"99999999999999999999999"), (None, 3_000, 2_000, None, None, None)),
        (b"", (None,) * 6),
        (None, (None,) * 6),
    ],
)
def test_cpu_stat_is_read_as_printed_and_in_any_other_order(
    text: bytes | None, expected: tuple[int | None, ...]
) -> None:
    assert parse.cpu_stat(text) == expected


@given(st.binary(max_size=400))
def test_no_bytes_make_a_parser_raise(data: bytes) -> None:
    for function in (parse.number, parse.limit, parse.keyed, parse.cpu_stat, parse.pressure, parse.io_v2):
        found = function(data)
        for value in (
            found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
        ):
            assert value is None or isinstance(value, tuple) or value >= 0
    parse.field(data, b"some")
    parse.io_v1(data, data)


@given(
    st.lists(st.tuples(st.sampled_from((b"some", b"full")), st.integers(0, 2**64 - 1)), max_size=4),
    st.binary(max_size=20).filter(lambda b: b"total=" not in b),
)
def test_the_quick_way_through_pressure_says_what_the_careful_way_says(
    lines: list[tuple[bytes, int]], odd: bytes
) -> None:
    text = b"".join(b"%s avg10=0.00 avg60=0.00 avg300=0.00 total=%d\n" % line for line in lines)
    careful = parse.pressure(b"\n" + text + odd.replace(b"\n", b""))
    assert parse.pressure(text) == careful
