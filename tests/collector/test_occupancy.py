"""How much of the door one agent may hold, and how its bytes are paid for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.decide.occupancy import Full, Occupancy, Room
from wire.identity import AgentId

SECOND = 1_000_000_000
ROOM = Room(streams=4, streams_per_agent=2, streams_per_address=3, bytes_per_second=1_000, burst_bytes=5_000)
A, B, C = (AgentId(name) for name in "abc")


def test_each_bound_says_which_it_is_and_a_stream_that_ends_makes_room() -> None:
    door = Occupancy(ROOM)
    door.enter(A, "x")
    door.enter(A, "y")
    with pytest.raises(Full, match="streams_per_agent"):
        door.enter(A, "z")
    door.enter(B, "x")
    door.enter(B, "x")
    with pytest.raises(Full, match="limits.streams`"):
        door.enter(C, "z")
    door.leave(A, "y", 0)
    with pytest.raises(Full, match="streams_per_address"):
        door.enter(C, "x")
    door.enter(C, "z")
    assert (door.streams, door.agents) == (4, 3)


def test_what_is_within_the_burst_waits_for_nothing_and_what_is_over_it_until_the_rate_has_paid() -> None:
    door = Occupancy(ROOM)
    door.enter(A, "x")
    assert door.charge(A, 5_000, 0) == 0
    assert door.charge(A, 500, 0) == pytest.approx(0.5)
    assert door.charge(A, 500, SECOND) == 0
    assert door.charge(A, 5_000, 100 * SECOND) == 0, "no more than the burst is saved up"


def test_coming_again_is_no_way_around_the_bytes_that_are_owed() -> None:
    door = Occupancy(ROOM)
    door.enter(A, "x")
    door.charge(A, 5_000, 0)
    door.leave(A, "x", 0)
    door.enter(A, "x")
    assert door.charge(A, 1_000, 0) == pytest.approx(1.0)
    door.leave(A, "x", 0)
    assert door.agents == 1
    door.sweep(5 * SECOND)
    assert door.agents == 1
    door.sweep(6 * SECOND)
    assert door.agents == 0


@given(
    st.lists(st.tuples(st.integers(1, 4_000_000), st.integers(0, 2 * SECOND)), max_size=50),
    st.integers(1, 10_000_000),
    st.integers(4_000_000, 20_000_000),
)
def test_who_waits_as_told_never_gets_more_than_burst_and_rate(
    messages: list[tuple[int, int]], rate: int, burst: int
) -> None:
    door = Occupancy(Room(9, 9, 9, rate, burst))
    door.enter(A, "x")
    now = taken = 0
    for size, pause_ns in messages:
        now += pause_ns
        taken += size
        now += math.ceil(door.charge(A, size, now) * SECOND)
        assert taken <= burst + rate * (now + 1_000) / SECOND + 1


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.booleans(), st.integers(0, 9_000)),
        max_size=80,
    )
)
def test_whatever_comes_and_goes_no_bound_is_passed_and_nobody_is_remembered_for_ever(
    steps: list[tuple[str, str, bool, int]],
) -> None:
    door, inside, now = Occupancy(ROOM), [], 0
    for name, address, comes, size in steps:
        now += SECOND // 10
        who = (AgentId(name), address)
        if comes:
            try:
                door.enter(*who)
            except Full:
                continue
            inside.append(who)
            door.charge(who[0], size, now)
        elif who in inside:
            inside.remove(who)
            door.leave(*who, now)
        assert door.streams == len(inside) <= ROOM.streams
        for agent in (A, B, C):
            assert sum(one == agent for one, _ in inside) <= ROOM.streams_per_agent
        for place in "xyz":
            assert sum(one == place for _, one in inside) <= ROOM.streams_per_address
    for who in inside:
        door.leave(*who, now)
    door.sweep(now + 3_600 * SECOND)
    assert (door.streams, door.agents) == (0, 0)
