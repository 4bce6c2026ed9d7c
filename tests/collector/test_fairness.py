"""Fair queueing: service in proportion to the shares, whoever comes and goes."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from collector.decide.fairness import FairQueue, Flow

LIGHTEST, HEAVIEST = 100_000, 61_300_000
weights = st.integers(LIGHTEST, HEAVIEST)
shares = st.integers(1_000, 10**12)


class Tenant(Flow):
    def __init__(self, share: int, batches: list[int]) -> None:
        super().__init__()
        self.share, self.batches, self.got = share, batches, 0


def serve(queue: FairQueue[Tenant]) -> Tenant:
    tenant = queue.pop()
    weight = tenant.batches.pop(0)
    queue.served(tenant, weight, tenant.share)
    tenant.got += weight
    if tenant.batches:
        queue.push(tenant)
    return tenant


@given(st.lists(st.tuples(shares, st.lists(weights, min_size=1, max_size=40)), min_size=2, max_size=6))
def test_what_two_waiting_tenants_got_by_their_shares_differs_by_one_batch_of_each(
    tenants: list[tuple[int, list[int]]],
) -> None:
    queue: FairQueue[Tenant] = FairQueue()
    flows = [Tenant(share, list(batches)) for share, batches in tenants]
    largest = {flow: Fraction(max(flow.batches), flow.share) for flow in flows}
    for flow in flows:
        queue.push(flow)
    while len(queue) > 1:
        serve(queue)
        waiting = [flow for flow in flows if flow.batches]
        for one in waiting:
            for other in waiting:
                apart = abs(Fraction(one.got, one.share) - Fraction(other.got, other.share))
                assert apart <= (largest[one] + largest[other]) * Fraction(1_000_001, 1_000_000)


def test_equal_shares_take_turns_and_the_first_come_goes_first() -> None:
    queue: FairQueue[Tenant] = FairQueue()
    one, other = Tenant(1_000_000, [LIGHTEST] * 3), Tenant(1_000_000, [LIGHTEST] * 3)
    queue.push(one)
    queue.push(other)
    assert [serve(queue) for _ in range(6)] == [one, other] * 3


def test_a_tenant_twice_as_strong_gets_twice_as_much() -> None:
    queue: FairQueue[Tenant] = FairQueue()
    weak, strong = Tenant(1_000_000, [LIGHTEST] * 90), Tenant(2_000_000, [LIGHTEST] * 90)
    queue.push(weak)
    queue.push(strong)
    for _ in range(90):
        serve(queue)
    assert (weak.got, strong.got) == (30 * LIGHTEST, 60 * LIGHTEST)


def test_who_was_away_saved_nothing_up() -> None:
    queue: FairQueue[Tenant] = FairQueue()
    steady, late = Tenant(1_000_000, [LIGHTEST] * 100), Tenant(1_000_000, [LIGHTEST] * 100)
    queue.push(steady)
    for _ in range(50):
        serve(queue)
    queue.push(late)
    for _ in range(20):
        serve(queue)
    assert late.got in (10 * LIGHTEST, 11 * LIGHTEST)
