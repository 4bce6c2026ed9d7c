"""When memory counts as short, and whose bound is in force."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from collector.door.pressure import Pressure, available_bytes, resident_bytes

MIB = 1 << 20


def test_short_memory_stays_short_until_a_tenth_is_free() -> None:
    pressure = Pressure(1_000 * MIB)
    seen = [pressure.observe(used * MIB) for used in (999, 1_000, 1_001, 950, 901, 900, 1_000)]
    assert seen == [False, False, True, True, True, False, False]
    pressure.observe(1_001 * MIB)
    assert "limits.memory" in pressure.trouble
    pressure.bound_bytes = 2_000 * MIB
    assert not pressure.observe(1_001 * MIB)
    assert not pressure.trouble


@given(st.lists(st.integers(0, 2_000)))
def test_it_is_never_short_below_nine_tenths_nor_well_above_the_bound(used: list[int]) -> None:
    pressure = Pressure(1_000)
    for one in used:
        short = pressure.observe(one)
        assert short if one > 1_000 else True
        assert not short if one <= 900 else True


def test_the_smallest_bound_of_all_cgroups_around_counts(tmp_path: Path) -> None:
    host = available_bytes(tmp_path, Path("/dev/null"))
    assert host > resident_bytes() > MIB
    own = tmp_path / "own"
    leaf = tmp_path / "system.slice" / "collector.service"
    leaf.mkdir(parents=True)
    own.write_text("12:cpu,cpuacct:/elsewhere\n0::/system.slice/collector.service\n")
    (leaf / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path, own) == host
    (leaf.parent / "memory.max").write_text(f"{512 * MIB}\n")
    assert available_bytes(tmp_path, own) == 512 * MIB
    (leaf / "memory.max").write_text(f"{256 * MIB}\n")
    assert available_bytes(tmp_path, own) == 256 * MIB
    v1 = tmp_path / "memory" / "docker" / "c0"
    v1.mkdir(parents=True)
    (v1 / "memory.limit_in_bytes").write_text(f"{128 * MIB}\n")
    own.write_text("4:memory:/docker/c0\n0::/\n")
    assert available_bytes(tmp_path, own) == 128 * MIB
