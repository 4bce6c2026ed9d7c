"""What openings say that no batch carried: the agent's own meter on one side, a kernel that is known on the other."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.recover.facts import BITS, RECOVERABLE, Beginning, Booked, Doubt, Opening, Recovery
from ledger.recover.recovered import recovered
from tests.agent.readings import BOOT_B
from tests.ledger.books import facts, total
from tests.ledger.metered import CONTAINERS, NESTED, OWN, PATHS, Agent, Kernel
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb

ALL = set(PATHS)


def settle(batches: list[pb.UsageBatch]) -> Recovery:
    return recovered(*facts(batches))


def by_path(recovery: Recovery, measure: str = "cpu_usage_ns") -> dict[str, int]:
    out: dict[str, int] = {}
    for r in recovery.recovered:
        if r.measure == measure:
            out[r.cgroup_path] = out.get(r.cgroup_path, 0) + r.amount
    return out


def given_back(recovery: Recovery, measure: str, cgroup_ids: frozenset[int] | None = None) -> int:
    return sum(
        r.amount
        for r in recovery.recovered
        if r.measure == measure and (cgroup_ids is None or r.cgroup_id in cgroup_ids)
    )


class Story:
    """One host, told interval by interval; what arrives in the books is chosen by the test."""

    def __init__(self, *alive: str) -> None:
        self.kernel = Kernel()
        self.kernel.live(set(alive), dict.fromkeys(PATHS, 1_000), 5_000)
        self.agent = Agent(self.kernel)
        self.booked: list[pb.UsageBatch] = []

    def live(self, used: dict[str, int], root_used: int = 0, alive: set[str] | None = None) -> None:
        self.kernel.live(alive if alive is not None else set(self.kernel.units), used, root_used)

    def interval(
        self, used: dict[str, int], root_used: int = 0, alive: set[str] | None = None
    ) -> list[pb.UsageBatch]:
        """Metered, but not booked."""
        self.live(used, root_used, alive)
        return self.agent.tick()

    def book(self, used: dict[str, int], root_used: int = 0, alive: set[str] | None = None) -> None:
        self.booked += self.interval(used, root_used, alive)


def test_what_a_lost_spool_held_is_recovered_for_each_unit_and_the_rest_for_the_host() -> None:
    story = Story("ci", "job", "box", "solo")
    story.book({"box": 10})
    lost = story.interval({"ci": 1, "job": 20, "box": 300, "solo": 4_000}, 50_000)
    story.live({"box": 7})
    story.agent.lose_spool()
    story.book({"solo": 5})
    recovery = settle(story.booked)
    assert by_path(recovery) == {
        "/ci.service": 1,
        "/ci.service/job.scope": 20,
        "/ci.service/job.scope/box": 307,
        "/solo": 4_000,
        "/": 50_000,
    }
    tenants = {r.cgroup_path: r.tenant for r in recovery.recovered}
    assert tenants["/solo"] == "globex"
    assert tenants["/"] == "host"
    (solo,) = [r for r in recovery.recovered if r.cgroup_path == "/solo" and r.measure == "cpu_usage_ns"]
    assert (solo.start_unix_ns, solo.end_unix_ns) == (
        lost[0].interval_start_unix_ns,
        story.booked[-1].interval_start_unix_ns,
    )


def test_what_is_booked_after_all_is_not_recovered_any_more() -> None:
    story = Story("solo")
    story.book({"solo": 1})
    late = story.interval({"solo": 2}, 30)
    story.agent.conflict()
    story.book({"solo": 4})
    assert by_path(settle(story.booked)) == {"/solo": 2, "/": 30}
    assert settle(story.booked + late).recovered == []


def test_an_older_copy_of_the_spool_repeats_rows_and_they_are_taken_off() -> None:
    story = Story("solo")
    story.book({"solo": 1})
    older = len(story.agent.copies) - 1
    story.book({"solo": 20}, 300)
    story.agent.restore(older)
    story.book({"solo": 4_000})
    recovery = settle(story.booked)
    assert by_path(recovery) == {"/solo": -20, "/": -300}
    (solo,) = [r for r in recovery.recovered if r.cgroup_path == "/solo" and r.measure == "cpu_usage_ns"]
    repeated = story.booked[-1].interval_start_unix_ns, story.booked[2].interval_end_unix_ns
    assert (solo.start_unix_ns, solo.end_unix_ns) == repeated


def test_a_clock_that_was_set_back_alone_leaves_nothing_to_recover() -> None:
    story = Story("ci", "job", "box")
    story.book({"box": 1}, 10)
    story.kernel.clock_offset_seconds -= 7_200
    story.book({"box": 2}, 10)
    assert len({b.epoch for b in story.booked}) == 2
    assert settle(story.booked) == Recovery([], [])


def test_a_unit_that_ended_unseen_is_recovered_for_the_one_around_it() -> None:
    story = Story("ci", "job", "box")
    story.book({})
    story.interval({"box": 100})
    story.live({"job": 5}, alive={"ci", "job"})
    story.agent.lose_spool()
    story.book({})
    assert by_path(settle(story.booked)) == {"/ci.service/job.scope": 105}


def test_a_unit_born_unseen_opens_at_what_it_has_used_and_that_is_recovered() -> None:
    story = Story("ci")
    story.book({})
    story.book({})
    story.live({"job": 7, "box": 100, "solo": 9}, alive={"ci", "job", "box", "solo"})
    story.agent.lose_spool()
    story.book({})
    assert by_path(settle(story.booked)) == {
        "/ci.service/job.scope": 7,
        "/ci.service/job.scope/box": 100,
        "/solo": 9,
    }


def test_what_a_unit_used_before_the_agents_first_reading_is_never_recovered() -> None:
    story = Story("solo")
    first = story.interval({"solo": 1})
    story.book({"solo": 2})
    # The batch with the opening of the unit is missing: what it had used by then is not known.
    story.booked += [b for b in first if b.tenant != "globex"]
    story.agent.lose_spool()
    story.book({"solo": 4})
    recovery = settle(story.booked)
    # It is in the host's counter all the same.
    assert by_path(recovery) == {"/": 1}
    assert {u.doubt for u in recovery.unknown if u.cgroup_path == "/solo"} == {Doubt.NO_OPENING}
    story.booked += [b for b in first if b.tenant == "globex"]
    assert settle(story.booked) == Recovery([], [])


def test_the_very_first_epoch_recovers_nothing_and_doubts_nothing() -> None:
    story = Story(*ALL)
    story.book({"solo": 1})
    story.book({"solo": 1}, alive={"solo"})
    story.book({"pod": 1}, alive=ALL)
    assert settle(story.booked) == Recovery([], [])


def test_after_a_reboot_with_the_spool_lost_all_since_the_boot_is_recovered() -> None:
    story = Story("solo")
    story.book({"solo": 1_000})
    story.kernel.reboot(BOOT_B, 100)
    story.live({"solo": 50, "pod": 6, "web": 0}, 700, alive={"solo", "web", "pod"})
    story.agent.lose_spool()
    story.book({"solo": 3})
    recovery = settle(story.booked)
    assert by_path(recovery) == {"/solo": 50, "/web.service/pod": 6, "/": 700}
    assert {r.boot_id for r in recovery.recovered} == {BOOT_B}


def test_a_reboot_with_the_spool_kept_leaves_nothing_to_recover() -> None:
    story = Story("solo")
    story.kernel.root_lag_ns = 40
    story.book({"solo": 1_000})
    story.kernel.reboot(BOOT_B, 100)
    story.kernel.root_lag_ns = 0
    story.book({"solo": 50}, 700, alive={"solo"})
    story.book({"solo": 50})
    story.agent.conflict()
    story.book({"solo": 50})
    story.book({"solo": 50})
    assert settle(story.booked).recovered == []


def test_nothing_is_recovered_over_a_change_of_sources_and_later_epochs_start_from_it() -> None:
    story = Story("solo")
    story.book({"solo": 1})
    story.interval({"solo": 20})
    story.live({"solo": 300})
    story.booked += story.agent.change_sources()
    story.book({"solo": 4_000})
    assert settle(story.booked).recovered == []
    story.interval({"solo": 50_000}, 600_000)
    story.agent.lose_spool()
    story.book({})
    assert by_path(settle(story.booked)) == {"/solo": 50_000, "/": 600_000}


def test_the_deficit_an_epoch_begins_with_is_neither_taken_off_twice_nor_given_back() -> None:
    """The root's counter is behind its units when a conflict opens an epoch, and the debt goes on in it."""
    story = Story("solo")
    story.book({"solo": 100})
    story.kernel.root_lag_ns = 30
    story.book({"solo": 100})
    assert story.agent.deficit_ns == 30
    story.agent.conflict()
    story.kernel.root_lag_ns = 0
    story.book({"solo": 100}, 1_000)
    story.book({"solo": 100})
    assert story.agent.deficit_ns == 0
    assert by_path(settle(story.booked)) == {}
    assert total(story.booked, "cpu_usage_ns") == 1_400


def test_a_lost_spool_forgets_a_deficit_and_the_ledger_takes_it_off() -> None:
    story = Story("solo")
    story.book({"solo": 100})
    story.kernel.root_lag_ns = 30
    story.book({"solo": 100})
    story.agent.lose_spool()
    story.kernel.root_lag_ns = 0
    story.book({"solo": 100}, 1_000)
    story.book({})
    assert by_path(settle(story.booked)) == {"/": -30}
    assert total(story.booked, "cpu_usage_ns") - 30 == 1_300


def test_folded_rows_leave_what_may_be_theirs_with_the_host() -> None:
    story = Story("ci", "job", "box", "solo")
    story.book({})
    story.live({"box": 100})
    assert story.agent.tick(hold=True, fold=True) == []
    story.live({"box": 10}, alive={"ci", "job", "solo"})
    story.agent.tick(hold=True, fold=True)
    story.book({})
    assert any(pb.UNIT_KIND_FOLDED in table_of(b).kind for b in story.booked)
    story.interval({"solo": 7})
    story.agent.lose_spool()
    story.book({})
    recovery = settle(story.booked)
    assert by_path(recovery) == {"/solo": 7}
    doubted = {u.cgroup_path for u in recovery.unknown if u.measure == "cpu_usage_ns"}
    assert doubted == {"/ci.service", "/ci.service/job.scope"}
    assert {u.doubt for u in recovery.unknown} == {Doubt.FOLDED}


def test_kills_are_nested_only_where_the_root_does_not_know_them() -> None:
    """v1 counts a kill in its own cgroup and at the root likewise; v2 in those around it, and has none at the root."""
    bit, k = BITS[RECOVERABLE.index("oom_kills")], RECOVERABLE.index("oom_kills")

    def opening(epoch: int, cgroup_id: int, path: str, kills: int, known: int = bit) -> Opening:
        counters = tuple(kills if slot == k else 0 for slot in range(len(RECOVERABLE)))
        return Opening("a", epoch, 0, epoch * 10, "t", "b", cgroup_id, path, 2, known, counters)

    def openings(root_known: int) -> list[Opening]:
        return [
            *(opening(1, *who) for who in ((7, "/s", 0), (8, "/s/c", 0))),
            *(opening(2, *who) for who in ((7, "/s", 3), (8, "/s/c", 2))),
            *(opening(epoch, 1, "/", 0, root_known) for epoch in (1, 2)),
        ]

    def amounts(root_known: int) -> dict[str, int]:
        return by_path(recovered(openings(root_known), [], []), "oom_kills")

    assert amounts(root_known=0) == {"/s": 1, "/s/c": 2}
    assert amounts(root_known=bit) == {"/s": 3, "/s/c": 2}


def plain(
    epoch: int, measure: str, value: int, cgroup_id: int = 7, path: str = "/s", start_ns: int = 0
) -> Opening:
    """An opening of a unit that knows one measure."""
    k = RECOVERABLE.index(measure)
    counters = tuple(value if slot == k else 0 for slot in range(len(RECOVERABLE)))
    start_ns = start_ns or epoch * 10
    return Opening("a", epoch, 0, start_ns, "t", "b", cgroup_id, path, 2, BITS[k], counters)


def rows(epoch: int, measure: str, value: int, end_ns: int, was_reset: bool = False) -> Booked:
    k = RECOVERABLE.index(measure)
    sums = tuple(value if slot == k else 0 for slot in range(len(RECOVERABLE)))
    return Booked("a", epoch, 0, "b", 7, "/s", 2, epoch * 10, end_ns, was_reset, sums)


def test_a_counter_that_started_anew_is_not_compared_and_later_epochs_start_from_there() -> None:
    openings = [plain(1, "cpu_usage_ns", 100), plain(2, "cpu_usage_ns", 50), plain(3, "cpu_usage_ns", 57)]
    recovery = recovered(openings, [rows(1, "cpu_usage_ns", 60, 19, was_reset=True)], [])
    assert [(u.epoch, u.doubt) for u in recovery.unknown] == [(2, Doubt.RESET)]
    assert [(r.epoch, r.amount) for r in recovery.recovered] == [(3, 7)]


def test_a_block_device_that_went_away_takes_nothing_off_unless_rows_overlap() -> None:
    """An opening adds up the devices that are there; rows had counted one that is not."""
    openings = [plain(1, "io_read_bytes", 100), plain(2, "io_read_bytes", 30)]
    gone = recovered(openings, [rows(1, "io_read_bytes", 5, end_ns=20)], [])
    assert [u.doubt for u in gone.unknown] == [Doubt.DEVICE_GONE]
    assert gone.recovered == []
    repeated = recovered(openings, [rows(1, "io_read_bytes", 5, end_ns=25)], [])
    assert [r.amount for r in repeated.recovered] == [-75]


def test_counters_of_two_sources_are_not_compared_over_an_epoch_either() -> None:
    openings = [plain(1, "cpu_usage_ns", 100), plain(2, "cpu_usage_ns", 900)]

    def doubts(*sources: str) -> list[Doubt]:
        begun = [Beginning("a", n, 0, "b", False, None, source) for n, source in enumerate(sources, 1)]
        return [u.doubt for u in recovered(openings, [], begun).unknown]

    assert doubts("cpu.stat", "cpuacct.usage") == [Doubt.SOURCE_CHANGED]
    assert doubts("cpu.stat", "cpu.stat") == []


def test_a_cgroup_made_anew_has_nothing_of_what_lay_in_the_old_one_of_its_name() -> None:
    old = [plain(1, "cpu_usage_ns", 0, 5, "/s"), plain(1, "cpu_usage_ns", 0, 6, "/s/c")]
    new = [plain(1, "cpu_usage_ns", 0, 8, "/s"), plain(2, "cpu_usage_ns", 10, 8, "/s")]
    inner = rows(1, "cpu_usage_ns", 1_000, 19)._replace(cgroup_id=6, cgroup_path="/s/c")
    assert by_path(recovered([*old, *new], [inner], [])) == {"/s": 10}


def test_a_measure_that_an_opening_does_not_know_is_said_to_be_unknown() -> None:
    openings = [plain(1, "cpu_usage_ns", 5), plain(2, "cpu_usage_ns", 0), plain(3, "cpu_usage_ns", 9)]
    openings[1] = openings[1]._replace(known=0)
    recovery = recovered(openings, [], [])
    assert [(u.epoch, u.doubt) for u in recovery.unknown] == [(2, Doubt.NOT_KNOWN)]
    assert [(r.epoch, r.amount) for r in recovery.recovered] == [(3, 4)]


class Moment(NamedTuple):
    alive: set[str]
    used: dict[str, int]
    root_used: int
    root_lag_ns: int
    before: str
    """What happens before the interval is metered."""
    copy: int
    arrives: list[bool]
    """Of the interval's batches."""
    hold: bool
    fold: bool
    unreadable: frozenset[str]


def moments(unreadable: bool) -> st.SearchStrategy[list[Moment]]:
    names = st.sampled_from(sorted(PATHS))
    amounts = st.integers(0, 10**12)
    moment = st.builds(
        Moment,
        alive=st.sets(names),
        used=st.dictionaries(names, amounts),
        root_used=amounts,
        root_lag_ns=st.sampled_from((0, 0, 0, 10**3, 10**12)),
        before=st.sampled_from(("", "", "", "lost", "restored", "conflict", "clock")),
        copy=st.integers(0, 20),
        arrives=st.lists(st.booleans(), min_size=3, max_size=3),
        # Both at once tell some openings twice, which is no loss while the host's batch is there: a test of its own.
        hold=st.just(False) if unreadable else st.sampled_from((False, False, False, True)),
        fold=st.booleans(),
        unreadable=st.frozensets(names, max_size=2) if unreadable else st.just(frozenset()),
    )
    return st.lists(moment, min_size=1, max_size=10)


def tell(story: Story, history: list[Moment], last: str) -> None:
    """The history, at the end of which an epoch is opened whose batches all arrive."""
    story.book({})
    story.book({})
    for moment in history:
        story.kernel.root_lag_ns = moment.root_lag_ns
        story.live(moment.used, moment.root_used, moment.alive)
        happen(story, moment.before, moment.copy, moment.unreadable)
        made = story.agent.tick(moment.unreadable, moment.hold, moment.fold)
        story.booked += [b for n, b in enumerate(made) if moment.arrives[n % 3]]
    happen(story, last, history[-1].copy)
    if story.agent.baseline.held:
        # The clock is followed only when nothing waits.
        story.agent.conflict()
    story.book({})
    story.book({})
    story.book({})


def happen(story: Story, what: str, copy: int, unreadable: frozenset[str] = frozenset()) -> None:
    if what == "lost":
        story.agent.lose_spool(unreadable)
    elif what == "restored":
        story.agent.restore(copy)
    elif what == "conflict":
        story.agent.conflict()
    elif what == "clock":
        story.kernel.clock_offset_seconds -= 7_200


@given(moments(unreadable=False), st.sampled_from(("lost", "restored", "conflict", "clock")))
@settings(max_examples=150, deadline=None)
def test_booked_and_recovered_are_what_the_kernel_counted(history: list[Moment], last: str) -> None:
    story = Story("ci", "job", "box", "solo")
    started = {u.cgroup_id: dict(u.used) for u in story.kernel.units.values()}
    before = {m: story.kernel.root_counter(m) for m in NESTED}
    tell(story, history, last)
    recovery = settle(story.booked)
    read = story.agent.baseline.root.reading
    cpu = total(story.booked, "cpu_usage_ns") + given_back(recovery, "cpu_usage_ns")
    assert cpu == (read.counters[0] or 0) - before["cpu_usage_ns"] + story.agent.deficit_ns
    written = total(story.booked, "io_write_bytes") + given_back(recovery, "io_write_bytes")
    assert written == story.kernel.root_counter("io_write_bytes") - before["io_write_bytes"]
    for name in CONTAINERS:
        unit = story.kernel.units.get(name)
        if unit is None:
            continue
        this = frozenset({unit.cgroup_id})
        for measure in (*NESTED, *OWN):
            since = started.get(unit.cgroup_id, {}).get(measure, 0)
            counted = total(story.booked, measure, this) + given_back(recovery, measure, this)
            assert counted == unit.used[measure] - since


@given(moments(unreadable=True), st.sampled_from(("lost", "restored", "conflict", "clock")))
@settings(max_examples=150, deadline=None)
def test_what_cannot_be_told_further_in_is_still_the_hosts(history: list[Moment], last: str) -> None:
    """Units that could not be read come and go; the sum over the host stays the root's."""
    story = Story("ci", "job", "box", "solo")
    before = story.kernel.root_counter("cpu_usage_ns")
    tell(story, history, last)
    recovery = settle(story.booked)
    cpu = total(story.booked, "cpu_usage_ns") + given_back(recovery, "cpu_usage_ns")
    read = story.agent.baseline.root.reading.counters[0] or 0
    assert cpu == read - before + story.agent.deficit_ns


@pytest.mark.parametrize(
    "measure", ["memory_byte_seconds", "memory_peak_bytes", "psi_cpu_some_ns", "net_rx_internal_bytes"]
)
def test_an_opening_tells_counters_only(measure: str) -> None:
    assert measure not in RECOVERABLE
