"""What keeps a period from being complete: against every world that what is known leaves open."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.periods.blockers import Waiver, blockers, excused, open_and_waived
from ledger.periods.calendar import Period, parse
from ledger.periods.streams import Held, HeldKind, Run, Stream
from tests.ledger.histories import HORIZON, History, Produced, histories, judged, periods

A = "8d7a3c52-0f0e-4a53-9d0f-1f2b7a5c9e11"
SECOND = 10**9
NOVEMBER = parse("2026-11", "month")


def at(seconds: float) -> int:
    """Unix ns, seconds from the beginning of November."""
    return NOVEMBER.start_unix_ns + int(seconds * SECOND)


def to_the_end(seconds: float) -> int:
    """Unix ns, seconds from November's end."""
    return NOVEMBER.end_unix_ns + int(seconds * SECOND)


def run(first: int, last: int, start: int, end: int, interval: int = 10 * SECOND) -> Run:
    return Run(first, last, start, min(start + interval, end), max(start, end - interval), end)


def of(*runs: Run, epoch: int = 1) -> Stream:
    return Stream(A, epoch, runs)


def kinds(
    *streams: Stream, held: tuple[Held, ...] = (), period: Period = NOVEMBER, **retired: int
) -> list[str]:
    words = {A: retired["until"]} if retired else {}
    return [str(blocker.kind) for blocker in blockers(period, streams, held, words)]


def test_an_agent_blocks_until_an_interval_of_it_begins_behind_the_period() -> None:
    """An interval that ends with the period may have other batches, of other tenants, that are still on their way."""
    assert kinds(of(run(1, 9, at(0), to_the_end(-10)))) == ["silent"]
    assert kinds(of(run(1, 9, at(0), to_the_end(0)))) == ["silent"]
    assert kinds(of(run(1, 9, at(0), to_the_end(10)))) == []


def test_an_agent_silent_since_before_the_period_blocks_it_and_one_that_came_later_does_not() -> None:
    assert kinds(of(run(1, 9, at(-900), at(-800)))) == ["silent"]
    assert kinds(of(run(1, 9, to_the_end(0), to_the_end(90)))) == []


def test_a_retired_agent_is_not_waited_for_but_its_holes_are() -> None:
    whole = of(run(1, 9, at(0), at(90)))
    holed = of(run(1, 4, at(0), at(40)), run(6, 9, at(50), at(90)))
    assert kinds(whole, until=at(95)) == []
    assert kinds(whole, until=to_the_end(500)) == []
    assert kinds(holed, until=at(95)) == ["missing"]


def test_an_agent_that_speaks_of_a_time_after_its_retirement_is_not_gone() -> None:
    assert kinds(of(run(1, 9, at(0), at(90))), until=at(80)) == ["silent"]
    assert kinds(of(run(1, 9, at(0), at(90))), until=at(81)) == []


def test_what_retirement_alone_excuses_can_be_told_for_the_manifest() -> None:
    streams = [of(run(1, 4, at(0), at(40)), run(6, 9, at(50), at(90)))]
    (told,) = excused(NOVEMBER, streams, [], {A: at(95)})
    assert (told.kind, told.start_unix_ns, told.end_unix_ns) == ("silent", at(80), to_the_end(0))
    assert excused(NOVEMBER, streams, [], {}) == []


def test_a_hole_lies_from_the_interval_below_it_to_the_interval_above_it() -> None:
    (blocker, _) = blockers(NOVEMBER, [of(run(1, 4, at(0), at(40)), run(7, 9, at(60), at(90)))], [], {})
    assert (blocker.kind, blocker.first_seq, blocker.last_seq) == ("missing", 5, 6)
    assert (blocker.start_unix_ns, blocker.end_unix_ns) == (at(30), at(70))


def test_a_hole_before_or_behind_the_period_does_not_block_it() -> None:
    alive = to_the_end(900)
    assert kinds(of(run(1, 4, at(-90), at(-50)), run(6, 9, at(-40), alive))) == []
    assert kinds(of(run(1, 4, at(-90), at(-50)), run(6, 9, at(-5), alive))) == ["missing"]
    assert kinds(of(run(1, 4, at(0), to_the_end(10)), run(6, 9, to_the_end(20), alive))) == []


def test_the_first_batches_of_an_epoch_lie_behind_the_epoch_before_unless_that_ends_later() -> None:
    new = of(run(3, 9, at(100), to_the_end(10)), epoch=2)
    (blocker,) = blockers(NOVEMBER, [of(run(1, 4, at(0), at(40))), new], [], {})
    assert (blocker.first_seq, blocker.last_seq, blocker.epoch) == (1, 2, 2)
    assert (blocker.start_unix_ns, blocker.end_unix_ns) == (at(40), at(110))
    for alone in ([new], [of(run(1, 4, at(0), at(140))), new]):
        (blocker,) = blockers(NOVEMBER, alone, [], {})
        assert (blocker.start_unix_ns, blocker.end_unix_ns) == (0, at(110))


def test_an_older_epoch_blocks_by_its_holes_and_not_by_its_tail() -> None:
    new = of(run(1, 9, at(100), to_the_end(10)), epoch=2)
    assert kinds(of(run(1, 4, at(0), at(40))), new) == []
    assert kinds(of(run(1, 2, at(0), at(20)), run(4, 4, at(30), at(40))), new) == ["missing"]


def held(kind: HeldKind, seq: int, *bounds: int, reason: str = "REASON_TENANT") -> Held:
    start, end = bounds or (None, None)
    return Held(kind, A, 1, seq, "acme", start, end, reason)


def test_what_arrived_and_is_not_booked_blocks_under_its_own_name_where_it_lies() -> None:
    stream = of(run(1, 4, at(0), at(40)), run(6, 9, at(50), to_the_end(10)))
    for kind in (HeldKind.PARKED, HeldKind.REJECTED):
        assert kinds(stream, held=(held(kind, 5, at(40), at(50)),)) == [kind]
        assert kinds(stream, held=(held(kind, 5),)) == [kind]
    booked_in_its_place = held(HeldKind.CONFLICT, 7, at(60), at(70))
    assert kinds(of(run(1, 9, at(0), to_the_end(10))), held=(booked_in_its_place,)) == ["conflict"]


def test_a_conflict_about_a_batch_that_is_not_there_does_not_stand_for_it() -> None:
    stream = of(run(1, 4, at(0), at(40)), run(6, 9, at(50), to_the_end(10)))
    assert kinds(stream, held=(held(HeldKind.CONFLICT, 5),)) == ["conflict", "missing"]


def test_what_was_let_in_after_all_does_not_block() -> None:
    whole = of(run(1, 9, at(0), to_the_end(10)))
    assert kinds(whole, held=(held(HeldKind.REJECTED, 5), held(HeldKind.PARKED, 6, at(50), at(60)))) == []


def test_a_parked_batch_tells_that_its_agent_lives() -> None:
    parked = held(HeldKind.PARKED, 10, to_the_end(0), to_the_end(10))
    assert kinds(of(run(1, 9, at(0), to_the_end(0))), held=(parked,)) == []


def test_a_waiver_counts_for_its_period_and_its_blocker_only() -> None:
    found = blockers(NOVEMBER, [of(run(1, 4, at(0), at(40)), run(6, 9, at(50), at(90)))], [], {})
    hole, silence = found
    word = Waiver("2026-11", hole.id, "disk of the host is gone", "ops")
    assert open_and_waived(NOVEMBER, found, [])[0] == found
    still, (waived,) = open_and_waived(NOVEMBER, found, [word, Waiver("2026-10", silence.id, "", "ops")])
    assert still == [silence]
    assert (waived.blocker, waived.reason, waived.by) == (hole, "disk of the host is gone", "ops")
    inert = [Waiver("2026-11", "0123456789ab", "", "ops")]
    assert open_and_waived(NOVEMBER, found, inert) == (found, [])


def test_a_blocker_keeps_its_name_when_its_bounds_narrow_and_gets_another_when_part_of_it_arrives() -> None:
    first, last = run(1, 4, at(0), at(40)), run(9, 9, at(90), to_the_end(10))
    (wide,) = blockers(NOVEMBER, [of(first, last)], [], {})
    (narrow, parked) = blockers(NOVEMBER, [of(first, last)], [held(HeldKind.PARKED, 8, at(70), at(80))], {})
    assert (wide.first_seq, wide.last_seq, narrow.last_seq, parked.kind) == (5, 8, 7, "parked")
    assert wide.id != narrow.id
    closer = of(first, run(8, 9, at(70), to_the_end(10)))
    (now,) = blockers(NOVEMBER, [closer], [], {})
    assert now.id == narrow.id
    assert now.end_unix_ns == at(80)


def test_a_silence_is_another_one_once_the_agent_spoke_again() -> None:
    (before,) = blockers(NOVEMBER, [of(run(1, 4, at(0), at(40)))], [], {})
    (after,) = blockers(NOVEMBER, [of(run(1, 5, at(0), at(50)))], [], {})
    assert before.id != after.id


def test_the_sentence_tells_what_whose_when_and_what_to_do() -> None:
    stream = of(run(1, 4, at(0), at(40)), run(8, 9, at(70), at(90)))
    rejected = held(HeldKind.REJECTED, 5, at(40), at(50))
    missing, refused, silent = sorted(blockers(NOVEMBER, [stream], [rejected], {}), key=lambda b: b.kind)
    assert missing.sentence == (
        f"batches 6 to 7 of epoch 1 of agent {A} did not arrive, from 2026-11-01T00:00:40Z to"
        " 2026-11-01T00:01:20Z at most: they wait in the agent's spool, or in its quarantine: `usage-replay`"
        " sends them again"
    )
    assert "batch 5 of epoch 1" in refused.sentence
    assert "for tenant acme is rejected (REASON_TENANT)" in refused.sentence
    assert "`weighbridge-collector log readmit`" in refused.sentence
    assert f"agent {A} has told nothing from 2026-11-01T00:01:20Z on" in silent.sentence
    (unknown,) = blockers(NOVEMBER, [], [held(HeldKind.REJECTED, 1)], {A: 1})
    assert "until 2026-12-01T00:00:00Z at most" in unknown.sentence


@settings(max_examples=200)
@given(histories(clocks_are_set_back=True), periods())
def test_what_blocks_is_what_could_lie_in_the_period_in_some_world(history: History, period: Period) -> None:
    found = blockers(period, history.streams, history.held, history.retired)
    flat = {
        (str(b.kind), b.agent_id, b.epoch, seq) for b in found for seq in range(b.first_seq, b.last_seq + 1)
    }
    assert flat == judged(history, period)
    assert len({b.id for b in found}) == len(found)
    assert all(period.overlaps(b.start_unix_ns, b.end_unix_ns) for b in found)


def _excused(batch: Produced, history: History) -> bool:
    """Whether nobody promised it: the tail of an older epoch, or of a retired agent, of which nothing was heard."""
    seen = [b for b in history.batches if b.agent_id == batch.agent_id and b.fate != "lost"]
    epochs = {b.epoch for b in seen}
    heard = [b.seq for b in seen if b.epoch == batch.epoch]
    unheard = not heard or batch.seq > max(heard)
    older = bool(epochs) and batch.epoch < max(epochs)
    return not seen or (unheard and (older or batch.agent_id in history.retired))


@settings(max_examples=200)
@given(histories(clocks_are_set_back=False), periods())
def test_without_a_blocker_every_batch_of_the_period_is_booked(history: History, period: Period) -> None:
    """The truth, of which the ledger sees only a part. (A clock that is set back may deceive it; the page says so.)"""
    if blockers(period, history.streams, history.held, history.retired):
        return
    for batch in history.batches:
        if period.overlaps(batch.start, batch.end) and not _excused(batch, history):
            assert batch.fate == "booked", batch


@given(histories(clocks_are_set_back=True), periods(), st.randoms())
def test_the_order_in_which_things_are_known_changes_nothing(
    history: History, period: Period, random
) -> None:
    streams, held = history.streams, history.held
    first = blockers(period, streams, held, history.retired)
    random.shuffle(streams)
    random.shuffle(held)
    assert blockers(period, streams, held, history.retired) == first


@given(histories(clocks_are_set_back=True), periods())
def test_once_all_has_arrived_and_every_agent_is_past_the_period_nothing_blocks(
    history: History, period: Period
) -> None:
    history.batches = [
        Produced(b.agent_id, b.epoch, b.seq, b.start, b.end, "booked") for b in history.batches
    ]
    for agent_id in {b.agent_id for b in history.batches}:
        last = [b for b in history.batches if b.agent_id == agent_id][-1]
        history.batches.append(Produced(agent_id, last.epoch, last.seq + 1, HORIZON, HORIZON + 1, "booked"))
    history.retired = {}
    assert blockers(period, history.streams, history.held, {}) == []
