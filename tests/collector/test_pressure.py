"""When memory counts as short, whose bound is in force, and when what is free is given back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.door import pressure
from collector.door.pressure import (
    COLLECT_REST,
    ENDED_AT_ONCE,
    GIVE_BACK_SECONDS,
    KEPT_BYTES,
    FreeMemory,
    Pressure,
    available_bytes,
    resident_bytes,
)

MIB = 1 << 20


def test_short_memory_stays_short_until_a_tenth_is_free() -> None:
    memory = Pressure(1_000 * MIB)
    seen = [memory.observe(used * MIB) for used in (999, 1_000, 1_001, 950, 901, 900, 1_000)]
    assert seen == [False, False, True, True, True, False, False]
    memory.observe(1_001 * MIB)
    assert "limits.memory" in memory.trouble
    memory.bound_bytes = 2_000 * MIB
    assert not memory.observe(1_001 * MIB)
    assert not memory.trouble


@given(st.lists(st.integers(0, 2_000)))
def test_it_is_never_short_below_nine_tenths_nor_well_above_the_bound(used: list[int]) -> None:
    memory = Pressure(1_000)
    for one in used:
        short = memory.observe(one)
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


class Machine:
    """Memory, a clock, and what was done about them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used_bytes, self.seconds = 100 << 20, 1_000.0
        self.done: list[str] = []
        monkeypatch.setattr(pressure, "resident_bytes", lambda: self.used_bytes)
        monkeypatch.setattr(pressure, "time", SimpleNamespace(monotonic=lambda: self.seconds))
        monkeypatch.setattr(pressure, "_trim", lambda _: self.done.append("trim"))
        monkeypatch.setattr(pressure, "gc", SimpleNamespace(collect=self._collect))

    def _collect(self, generation: int = 2) -> None:
        self.done.append(f"collect {generation}")
        self.seconds += 0.01


async def test_memory_is_given_back_after_many_ends_and_now_and_then_where_it_stays_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch)
    free = FreeMemory()
    await free.look(ENDED_AT_ONCE - 1)
    assert machine.done == []
    await free.look(1)
    assert machine.done == ["trim"]
    machine.used_bytes += KEPT_BYTES
    await free.look(0)
    assert machine.done == ["trim"], "not so soon again"
    machine.seconds += GIVE_BACK_SECONDS
    await free.look(0)
    assert machine.done == ["trim", "collect 2", "trim"]
    machine.seconds += GIVE_BACK_SECONDS
    await free.look(0)
    assert machine.done == ["trim", "collect 2", "trim"], "it has not risen since"


def test_while_memory_rises_all_is_collected_for_a_hundredth_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch)
    free = FreeMemory()
    for _ in range(3):
        free.collect()
    assert machine.done == ["collect 2", "collect 1", "collect 1"]
    machine.seconds += 0.01 * COLLECT_REST
    free.collect()
    assert machine.done[3:] == ["collect 2"]
