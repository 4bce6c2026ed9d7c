"""Admission and parking: what is over the rate waits, comes out once, in order and fairly, whatever is interrupted."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from collector.decide import admission
from collector.decide.admission import HEAVIEST, Account, Admission, Parked, Verdict
from collector.decide.bucket import MICRO, UNLIMITED, Plan

SECOND = 1_000_000_000
SLOW = Plan(10 * MICRO, 100 * MICRO, 1 << 30, 100_000)
TOKEN = MICRO


def of(**plans: Plan) -> Admission:
    return Admission(lambda tenant: plans.get(tenant, SLOW))


def park(judge: Admission, tenant: str, weight: int, offset: int, now_ns: int = 0, size: int = 100) -> Parked:
    """A batch that is judged PARKED, and durable at once."""
    assert judge.judge(tenant, weight, size, now_ns) is Verdict.PARKED
    batch = Parked(offset, size, weight, offset)
    judge.parked(tenant, batch)
    return batch


def drain(judge: Admission, now_ns: int) -> list[int]:
    """Offsets of what may be released now; it is."""
    picked = judge.pick(now_ns, 1_000, 1 << 30)
    judge.appended(picked)
    judge.released(picked)
    return [batch.offset for _, batch in picked]


def test_up_to_the_burst_everything_goes_on_and_then_at_the_rate() -> None:
    judge = of()
    assert [judge.judge("acme", 10 * TOKEN, 1, 0) for _ in range(10)] == [Verdict.ADMITTED] * 10
    assert judge.judge("globex", 10 * TOKEN, 1, 0) is Verdict.ADMITTED, "a bucket of its own"
    assert judge.judge("acme", 10 * TOKEN, 1, SECOND) is Verdict.ADMITTED
    park(judge, "acme", 10 * TOKEN, 1, SECOND)
    assert drain(judge, 2 * SECOND - 1) == []
    assert drain(judge, 2 * SECOND) == [1]
    assert judge.judge("acme", 1, 1, 2 * SECOND) is Verdict.PARKED
    assert judge.balance("acme", 2 * SECOND) == -1


def test_a_parked_batch_is_charged_once_and_pays_its_debt_by_waiting() -> None:
    judge = of()
    assert judge.judge("acme", 100 * TOKEN, 1, 0) is Verdict.ADMITTED
    for offset in range(5):
        park(judge, "acme", 10 * TOKEN, offset)
    (view,) = judge.views(0)
    assert (view.batches, view.bytes, view.debt, view.drained_ns) == (5, 500, 50 * TOKEN, 5 * SECOND)
    assert [drain(judge, second * SECOND) for second in range(1, 6)] == [[0], [1], [2], [3], [4]]
    assert judge.views(5 * SECOND) == []
    assert judge.balance("acme", 5 * SECOND) == 0


def test_nothing_overtakes_what_waits_even_when_there_are_tokens_for_it() -> None:
    judge = of()
    judge.judge("acme", 100 * TOKEN, 1, 0)
    park(judge, "acme", TOKEN, 1)
    park(judge, "acme", TOKEN, 2, 60 * SECOND)
    assert drain(judge, 60 * SECOND) == [1, 2]
    assert judge.judge("acme", TOKEN, 1, 60 * SECOND) is Verdict.ADMITTED


def test_what_is_in_the_logs_queue_need_not_be_waited_for() -> None:
    judge = of()
    judge.judge("acme", 100 * TOKEN, 1, 0)
    park(judge, "acme", TOKEN, 1)
    picked = judge.pick(60 * SECOND, 10, 1 << 20)
    assert judge.judge("acme", TOKEN, 1, 60 * SECOND) is Verdict.PARKED
    judge.unpark("acme", TOKEN, 1)
    judge.appended(picked)
    assert judge.judge("acme", TOKEN, 1, 60 * SECOND) is Verdict.ADMITTED


def test_a_full_queue_says_so_charges_nothing_and_names_a_time_to_come_again() -> None:
    for plan in (SLOW_BYTES, SLOW_BATCHES):
        judge = of(acme=plan)
        judge.judge("acme", 100 * TOKEN, 1, 0)
        park(judge, "acme", 60 * TOKEN, 1, size=600)
        park(judge, "acme", 60 * TOKEN, 2, size=400)
        assert judge.judge("acme", 60 * TOKEN, 1, 0) is Verdict.FULL
        assert judge.balance("acme", 0) == -120 * TOKEN
        assert judge.retry_after_ms("acme", 60 * TOKEN) == 18_000 // 8
        assert judge.judge("globex", 60 * TOKEN, 1, 0) is Verdict.ADMITTED
        assert drain(judge, 6 * SECOND) == [1]
        park(judge, "acme", 60 * TOKEN, 3, 6 * SECOND)


SLOW_BYTES = Plan(10 * MICRO, 100 * MICRO, 1_000, 100)
SLOW_BATCHES = Plan(10 * MICRO, 100 * MICRO, 1 << 20, 2)


def test_without_a_queue_the_agent_waits_for_tokens() -> None:
    judge = of(acme=Plan(10 * MICRO, HEAVIEST, 0, 0))
    assert judge.judge("acme", HEAVIEST, 1, 0) is Verdict.ADMITTED
    assert judge.judge("acme", HEAVIEST, 1, SECOND) is Verdict.FULL
    assert judge.judge("acme", HEAVIEST, 1, 7 * SECOND) is Verdict.ADMITTED
    assert not judge.views(7 * SECOND)


def test_a_long_debt_never_sends_an_agent_away_for_more_than_a_minute() -> None:
    judge = of(acme=Plan(1_000, HEAVIEST, 1_000, 1))
    judge.judge("acme", HEAVIEST, 1, 0)
    park(judge, "acme", HEAVIEST, 1)
    assert judge.judge("acme", HEAVIEST, 1, 0) is Verdict.FULL
    assert judge.retry_after_ms("acme", HEAVIEST) == 60_000


def test_what_the_disk_refused_is_given_back() -> None:
    judge = of()
    judge.judge("acme", 100 * TOKEN, 1, 0)
    judge.refund("acme", 100 * TOKEN)
    assert judge.judge("acme", 100 * TOKEN, 1, 0) is Verdict.ADMITTED
    assert judge.judge("acme", 5 * TOKEN, 7, 0) is Verdict.PARKED
    judge.unpark("acme", 5 * TOKEN, 7)
    assert (judge.balance("acme", 0), judge.views(0)) == (0, [])


def test_a_group_that_was_not_released_is_picked_again_in_the_same_order() -> None:
    judge = of()
    judge.judge("acme", 100 * TOKEN, 1, 0)
    for offset in range(4):
        park(judge, "acme", TOKEN, offset)
    for appended in (False, True):
        picked = judge.pick(SECOND, 3, 1 << 20)
        assert [batch.offset for _, batch in picked] == [0, 1, 2]
        if appended:
            judge.appended(picked)
        judge.put_back(picked, was_appended=appended)
    assert drain(judge, SECOND) == [0, 1, 2, 3]
    assert judge.judge("acme", TOKEN, 1, SECOND) is Verdict.ADMITTED


def test_a_group_is_bounded_in_batches_and_in_bytes_and_never_empty() -> None:
    judge = of(acme=Plan(UNLIMITED, 0, 1 << 40, 1_000))
    for offset in range(20):
        park(judge, "acme", TOKEN, offset, size=1_000)
    assert len(judge.pick(SECOND, 5, 1 << 20)) == 5
    assert len(judge.pick(SECOND, 5, 2_500)) == 3
    assert len(judge.pick(SECOND, 5, 1)) == 1


def test_tenants_that_are_due_share_a_group_by_their_rates() -> None:
    weak, strong = Plan(MICRO, 100 * MICRO, 1 << 30, 1_000), Plan(3 * MICRO, 100 * MICRO, 1 << 30, 1_000)
    judge = of(weak=weak, strong=strong)
    for tenant, offset in (("weak", 0), ("strong", 1_000)):
        judge.judge(tenant, 100 * TOKEN, 1, 0)
        for number in range(60):
            park(judge, tenant, TOKEN, offset + number)
    picked = [account.tenant for account, _ in judge.pick(3_600 * SECOND, 80, 1 << 20)]
    assert (picked.count("strong"), picked.count("weak")) == (60, 20)


def test_a_new_plan_holds_at_once_and_what_was_earned_under_the_old_one_stays() -> None:
    plans = {"acme": SLOW}
    judge = Admission(lambda tenant: plans[tenant])
    judge.judge("acme", 100 * TOKEN, 1, 0)
    park(judge, "acme", 100 * TOKEN, 1)
    plans["acme"] = Plan(MICRO, 100 * MICRO, 1 << 30, 10)
    judge.reconsider(5 * SECOND)
    assert judge.balance("acme", 5 * SECOND) == -50 * TOKEN
    assert drain(judge, 54 * SECOND) == []
    plans["acme"] = Plan(UNLIMITED, UNLIMITED, 1 << 30, 10)
    judge.reconsider(54 * SECOND)
    assert drain(judge, 54 * SECOND + 1) == [1]
    plans["acme"] = SLOW
    judge.reconsider(55 * SECOND)
    assert judge.balance("acme", 55 * SECOND) == 100 * TOKEN


def test_tenants_without_number_do_not_fill_the_memory_and_a_queue_is_never_forgotten(
    monkeypatch,
) -> None:
    monkeypatch.setattr(admission, "MAX_ACCOUNTS", 100)
    judge = of()
    judge.judge("acme", 100 * TOKEN, 1, 0)
    park(judge, "acme", TOKEN, 1)
    for number in range(10_000):
        judge.judge(f"tenant-{number}", TOKEN, 1, number)
        assert len(judge) <= 100
    assert judge.forgotten > 0
    assert judge.judge("acme", TOKEN, 1, 10_000) is Verdict.PARKED
    kept = of()
    for number in range(10_000):
        kept.judge(f"tenant-{number}", TOKEN, 1, number * SECOND)
    assert kept.forgotten == 0, "full buckets are forgotten without a loss"


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 20 * SECOND), st.integers(100_000, HEAVIEST)), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_over_any_time_a_tenant_is_let_through_burst_plus_rate_times_time_and_not_less(
    arrivals: list[tuple[int, int]], lag: int
) -> None:
    judge = of()
    now_ns = let_through = heaviest = total = 0
    for number, (elapsed_ns, weight) in enumerate(arrivals):
        now_ns += elapsed_ns
        heaviest, total = max(heaviest, weight), total + weight
        if number % (lag + 1) == 0:
            picked = judge.pick(now_ns, 1_000, 1 << 30)
            judge.appended(picked)
            judge.released(picked)
            let_through += sum(batch.weight for _, batch in picked)
        verdict = judge.judge("acme", weight, 1, now_ns)
        if verdict is Verdict.ADMITTED:
            let_through += weight
        else:
            judge.parked("acme", Parked(number, 1, weight, 0))
        bound = SLOW.capacity + SLOW.rate * now_ns // SECOND
        assert let_through <= bound
    left = sum(view.debt for view in judge.views(now_ns))
    assert drain(judge, now_ns + left * SECOND // SLOW.rate + 1) is not None
    assert judge.views(now_ns) == [], "nobody waits longer than the debt says"


class Batch(NamedTuple):
    number: int
    tenant: str
    weight: int


class Entry(NamedTuple):
    kind: str
    """accepted, parked or released."""
    batch: Batch
    parked_at: int = -1


class ParkingMachine(RuleBasedStateMachine):
    """With a log, a checkpoint, a disk that refuses, and kills at every step; the log is what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.plans = dict.fromkeys(("acme", "globex"), SLOW)
        self.now_ns = 1
        self.judge = Admission(self.plans.__getitem__)
        self.log: list[Entry] = []
        self.unwritten: list[Entry] = []
        self.releasing: list[tuple[Account, Parked]] = []
        self.appended = False
        self.saved_parked: dict[int, tuple[str, Parked]] = {}
        self.saved_buckets: dict[str, tuple[int, int, int]] = {}
        self.covered = 0
        self.made = 0

    tenants = st.sampled_from(["acme", "globex"])

    @rule(tenant=tenants, weights=st.lists(st.integers(5 * TOKEN, HEAVIEST), min_size=1, max_size=8))
    def deliver(self, tenant: str, weights: list[int]) -> None:
        for weight in weights:
            self.made += 1
            batch = Batch(self.made, tenant, weight)
            away = self.judge.turns_away(tenant, 10, self.now_ns)
            verdict = self.judge.judge(tenant, weight, 10, self.now_ns)
            waits = self.judge._accounts[tenant].ahead > 0
            assert away == (verdict is Verdict.FULL and waits)
            assert not away or tenant in self.judge.full
            if verdict is not Verdict.FULL:
                kind = "accepted" if verdict is Verdict.ADMITTED else "parked"
                self.unwritten.append(Entry(kind, batch))

    @rule(tenant=tenants, weights=st.lists(st.integers(5 * TOKEN, HEAVIEST), min_size=1, max_size=8))
    def deliver_durably(self, tenant: str, weights: list[int]) -> None:
        self.deliver(tenant, weights)
        self.disk_takes()

    @rule(elapsed_ns=st.integers(0, 20 * SECOND))
    def wait(self, elapsed_ns: int) -> None:
        self.now_ns += elapsed_ns

    @precondition(lambda self: not self.releasing)
    @rule(elapsed_ns=st.integers(0, 200 * SECOND), most=st.integers(1, 5))
    def wait_and_hand_over(self, elapsed_ns: int, most: int) -> None:
        self.now_ns += elapsed_ns
        self.pick(most)
        self.append()

    @precondition(lambda self: not self.releasing)
    @rule(elapsed_ns=st.integers(0, 200 * SECOND), most=st.integers(1, 5))
    def wait_and_release(self, elapsed_ns: int, most: int) -> None:
        self.wait_and_hand_over(elapsed_ns, most)
        self.disk_takes()

    @precondition(lambda self: not self.releasing)
    @rule(most=st.integers(1, 5))
    def pick(self, most: int) -> None:
        self.releasing = self.judge.pick(self.now_ns, most, 1 << 20)

    @precondition(lambda self: self.releasing and not self.appended)
    @rule()
    def append(self) -> None:
        for account, parked in self.releasing:
            batch = self.log[parked.offset].batch
            assert batch.tenant == account.tenant
            self.unwritten.append(Entry("released", batch, parked.offset))
        self.judge.appended(self.releasing)
        self.appended = bool(self.releasing)

    @precondition(lambda self: self.releasing and not self.appended)
    @rule()
    def cannot_read(self) -> None:
        self.judge.put_back(self.releasing, was_appended=False)
        self.releasing = []

    @rule()
    def disk_takes(self) -> None:
        for entry in self.unwritten:
            self.log.append(entry)
            batch = entry.batch
            if entry.kind == "parked":
                self.judge.parked(batch.tenant, Parked(len(self.log) - 1, 10, batch.weight, 0))
        if self.appended:
            self.judge.released(self.releasing)
            self.releasing, self.appended = [], False
        self.unwritten = []

    @rule()
    def disk_refuses(self) -> None:
        for entry in self.unwritten:
            if entry.kind == "accepted":
                self.judge.refund(entry.batch.tenant, entry.batch.weight)
            elif entry.kind == "parked":
                self.judge.unpark(entry.batch.tenant, entry.batch.weight, 10)
        if self.appended:
            self.judge.put_back(self.releasing, was_appended=True)
            self.releasing, self.appended = [], False
        self.unwritten = []

    @rule(takes=st.booleans())
    def checkpoint(self, takes: bool) -> None:
        changes = self.judge.changes(self.now_ns, self.now_ns)
        if not takes:
            self.judge.not_saved(changes)
            return
        self.saved_parked |= changes.added
        for offset in changes.removed:
            self.saved_parked.pop(offset, None)
        for bucket in changes.buckets:
            self.saved_buckets[bucket.tenant] = bucket[1:]
        self.covered = len(self.log)

    @rule(durable=st.integers(0, 30), checkpoint_lost=st.booleans())
    def kill(self, durable: int, checkpoint_lost: bool) -> None:
        """Nobody was told about what was not reported, but some of it may be on the disk."""
        self.log += self.unwritten[:durable]
        self.unwritten, self.releasing, self.appended = [], [], False
        self.judge = Admission(self.plans.__getitem__)
        if checkpoint_lost:
            self.saved_parked, self.saved_buckets, self.covered = {}, {}, 0
        for tenant, (balance, remainder, last_ns) in self.saved_buckets.items():
            self.judge.restore_bucket(tenant, balance, remainder, last_ns)
        for _, (tenant, batch) in sorted(self.saved_parked.items()):
            self.judge.restore_parked(tenant, batch, True, self.now_ns)
        for offset, entry in enumerate(self.log[self.covered :], self.covered):
            tenant = entry.batch.tenant
            if entry.kind == "parked":
                parked = Parked(offset, 10, entry.batch.weight, 0)
                self.judge.restore_parked(tenant, parked, False, self.now_ns)
            elif entry.kind == "released":
                self.judge.restore_released(tenant, entry.parked_at)
        self.judge.restored(self.now_ns)

    @rule(tenant=tenants, rate=st.integers(1, 50), batches=st.integers(0, 20))
    def new_plan(self, tenant: str, rate: int, batches: int) -> None:
        self.plans[tenant] = Plan(rate * MICRO, 62 * MICRO, 1 << 20, batches)
        self.judge.reconsider(self.now_ns)

    @invariant()
    def each_batch_is_handed_on_once_and_in_its_tenants_order(self) -> None:
        handed_on: dict[str, list[int]] = defaultdict(list)
        for entry in self.log:
            if entry.kind != "parked":
                handed_on[entry.batch.tenant].append(entry.batch.number)
        for numbers in handed_on.values():
            assert numbers == sorted(set(numbers))

    @invariant()
    def who_is_known_to_be_turned_away_has_a_queue(self) -> None:
        assert self.judge.full <= self.judge._parked.keys()

    @invariant()
    def the_debt_is_never_more_than_what_waits(self) -> None:
        for account in self.judge._accounts.values():
            assert account.bucket.balance + account.waiting_weight >= 0
            assert account.batches >= len(account.queue) >= account.picked >= 0

    def teardown(self) -> None:
        """In the end everything that was parked has come out."""
        self.disk_takes()
        while self.releasing or self.judge.next_due_ns() is not None:
            if not self.releasing:
                self.now_ns = max(self.now_ns, self.judge.next_due_ns() or 0)
                self.pick(5)
            self.append()
            self.disk_takes()
            self.each_batch_is_handed_on_once_and_in_its_tenants_order()
        parked = [entry.batch for entry in self.log if entry.kind == "parked"]
        released = [entry.batch for entry in self.log if entry.kind == "released"]
        assert sorted(parked) == sorted(released)
        for account in self.judge._accounts.values():
            assert (account.batches, account.bytes, account.ahead, account.waiting_weight) == (0, 0, 0, 0)
        assert not self.judge.views(self.now_ns)


TestParkingMachine = ParkingMachine.TestCase
TestParkingMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
