"""Buckets that several collectors share in a real Redis: the same arithmetic, the same sum, and life without it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fleet import Stream, enrol
from bench.redis_server import RedisServer, installed
from bench.site import Site
from collector.decide.admission import Admission, Charge, Verdict
from collector.decide.bucket import MICRO, Bucket, Plan
from collector.door.ca import CertificateAuthority
from collector.errors import CollectorError
from collector.state.redis import RedisBuckets, Settler, SharedAway
from tests.collector.door import Door, statuses

pytestmark = pytest.mark.skipif(not installed(), reason="needs redis-server; ./dev setup installs it")

PLAN = Plan(10 * MICRO, 100 * MICRO, 1 << 30, 100_000)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def fresh(redis: RedisServer) -> RedisBuckets:
    redis.command("FLUSHALL")
    return RedisBuckets(redis.url)


plans = st.builds(
    Plan, st.integers(1_000, 10**12), st.integers(62 * MICRO, 10**15), st.just(1 << 30), st.just(100)
)
elapsed_us = st.integers(0, 10**6) | st.integers(0, 10**11)


@settings(max_examples=40)
@given(plans, st.lists(st.tuples(elapsed_us, st.integers(-(10**9), 10**12)), min_size=1, max_size=12))
def test_the_script_computes_what_the_bucket_computes_to_the_last_fraction(
    redis: RedisServer, plan: Plan, steps: list[tuple[int, int]]
) -> None:
    async def both() -> None:
        buckets = fresh(redis)
        begin_us = now_us = 1_800_000_000_000_000
        own = Bucket(plan.capacity, 0, 0)
        for number, (elapsed, weight) in enumerate(steps, 1):
            now_us += elapsed
            own.refill(plan, (now_us - begin_us) * 1_000)
            own.balance -= weight
            own.clip(plan)
            charge = Charge("acme", plan, weight, plan.capacity)
            (balance,) = await buckets.settle(number, [charge], now_us)
            assert balance == own.balance
        kept = int(redis.command("HGET", "{weighbridge}:bucket:acme", "r"))
        assert Fraction(kept, 10**6) == Fraction(own.remainder, 10**9)
        await buckets.close()

    asyncio.run(both())


async def test_one_round_trip_settles_many_tenants_each_on_its_own(redis: RedisServer) -> None:
    buckets = fresh(redis)
    charges = [Charge(f"tenant-{n}", PLAN, n * MICRO, PLAN.capacity) for n in range(100)]
    before = _calls(redis)
    balances = await buckets.settle(1, charges, 10**15)
    assert balances == [(100 - n) * MICRO for n in range(100)]
    assert _calls(redis) - before <= 3, "EVALSHA, and once the script itself"
    before = _calls(redis)
    await buckets.settle(2, charges, 10**15)
    assert _calls(redis) - before == 1
    await buckets.close()


def _calls(redis: RedisServer) -> int:
    lines = redis.command("INFO", "commandstats").splitlines()
    return sum(
        int(line.split("calls=")[1].split(",")[0])
        for line in lines
        if line.startswith(("cmdstat_eval", "cmdstat_script"))
    )


async def test_a_settlement_that_is_sent_again_takes_nothing(redis: RedisServer) -> None:
    buckets = fresh(redis)
    charge = [Charge("acme", PLAN, 30 * MICRO, PLAN.capacity)]
    assert await buckets.settle(1, charge, 10**15) == [70 * MICRO]
    assert await buckets.settle(1, charge, 10**15) == [70 * MICRO]
    assert await buckets.settle(2, charge, 10**15) == [40 * MICRO]
    await buckets.close()


async def test_a_redis_that_lost_everything_starts_from_what_a_collector_remembers(
    redis: RedisServer,
) -> None:
    buckets = fresh(redis)
    assert await buckets.settle(1, [Charge("acme", PLAN, MICRO, -5 * MICRO)], 10**15) == [-6 * MICRO]
    assert await buckets.settle(2, [Charge("acme", PLAN, MICRO, PLAN.capacity)], 10**15) == [-7 * MICRO]
    await buckets.close()


async def test_what_is_full_again_is_forgotten_and_the_server_s_clock_counts(redis: RedisServer) -> None:
    buckets = fresh(redis)
    await buckets.settle(1, [Charge("acme", PLAN, 50 * MICRO, PLAN.capacity)])
    life_ms = int(redis.command("PTTL", "{weighbridge}:bucket:acme"))
    assert 60_000 < life_ms <= 65_001
    seconds = int(redis.command("HGET", "{weighbridge}:bucket:acme", "t")) / 1e6
    assert abs(seconds - time.time()) < 60
    await buckets.close()


async def test_two_collectors_together_let_through_what_one_may(redis: RedisServer) -> None:
    redis.command("FLUSHALL")
    slow = Plan(1_000, 100 * MICRO, 1 << 30, 100_000)
    judges = [Admission(lambda _: slow, shared=True) for _ in range(2)]
    settlers = [Settler(judge, RedisBuckets(redis.url)) for judge in judges]
    tasks = [asyncio.create_task(settler.run()) for settler in settlers]
    admitted = 0
    for _ in range(60):
        for judge in judges:
            for _ in range(5):
                verdict = judge.judge("acme", MICRO, 1, time.monotonic_ns())
                admitted += verdict is Verdict.ADMITTED
                if verdict is Verdict.PARKED:
                    judge.unpark("acme", MICRO, 1)
        await asyncio.sleep(0.025)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(settler.settlements > 10 for settler in settlers)
    # Alone, each would have let 100 through; either may admit the last tokens before it hears of the other's.
    assert 100 <= admitted <= 150


async def test_without_redis_the_own_buckets_go_on_and_settle_when_it_is_back(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    judge = Admission(lambda _: PLAN, shared=True)
    settler = Settler(judge, RedisBuckets(server.url))
    task = asyncio.create_task(settler.run())
    assert judge.judge("acme", 30 * MICRO, 1, time.monotonic_ns()) is Verdict.ADMITTED
    await _until(lambda: bool(settler.trouble))
    assert judge.judge("acme", 30 * MICRO, 1, time.monotonic_ns()) is Verdict.ADMITTED
    assert judge.unsettled_weight() == 30 * MICRO
    with server:
        await _until(lambda: not settler.trouble and judge.unsettled_weight() == 0)
        balance = int(server.command("HGET", "{weighbridge}:bucket:acme", "b"))
        assert 40 * MICRO <= balance < 100 * MICRO
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        judge.judge("acme", MICRO, 1, time.monotonic_ns())
        await _until(lambda: bool(settler.trouble))
        server.process.send_signal(signal.SIGCONT)
        await _until(lambda: not settler.trouble)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _until(condition, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def test_in_a_cluster_all_keys_of_a_settlement_lie_in_one_slot(tmp_path: Path) -> None:
    with RedisServer(tmp_path, cluster=True) as server:
        buckets = RedisBuckets(server.url, cluster=True)
        charges = [Charge(f"tenant-{n}", PLAN, MICRO, PLAN.capacity) for n in range(50)]
        assert await buckets.settle(1, charges) == [99 * MICRO] * 50
        await buckets.close()


async def test_nobody_there_is_said_and_a_wrong_address_names_its_setting(tmp_path: Path) -> None:
    buckets = RedisBuckets(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(SharedAway):
        await buckets.settle(1, [Charge("acme", PLAN, 1, 1)])
    await buckets.close()
    with pytest.raises(CollectorError, match=r"shared\.redis"):
        RedisBuckets("http://example.org")


def test_two_running_collectors_share_a_tenants_burst(site: Site, redis: RedisServer, tmp_path: Path) -> None:
    redis.command("FLUSHALL")
    shared = {
        "shared": {"redis": redis.url},
        "admission": {"tenants": {"acme": {"rate": 0.001, "burst": 62}}},
    }
    answers = []
    with Site(tmp_path / "other") as other:
        for one in (site, other):
            one.prepare(collector=shared)
            one.start_collector()
            authority = CertificateAuthority(one.directory / "collector" / "ca")
            door, agent = Door(one, authority), enrol(authority)
            stream = Stream(agent.agent_id, 1, rows=30)
            answers.append(
                statuses(door.deliver(agent, stream, [stream.next() for _ in range(200)])).count("ACCEPTED")
            )
            deadline = time.monotonic() + 10
            while door.metrics()["weighbridge_collector_unsettled_tokens"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        # The second collector has not heard of the first one's charges before its own first settlement: it admits
        # one burst more, and owes it. What comes next is parked at both.
        for one in (site, other):
            (plan,) = one.ask("collector", "plans", tenant="acme")["tenants"]
            assert plan["balance"] < 0
        redis.kill()
        deadline = time.monotonic() + 20
        while "shared_buckets_away" not in site.ask("collector", "status")["ready"]:
            one = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert '"shared_buckets_away"' in site.journal("collector")
        redis.start()
        while "shared_buckets_away" in site.ask("collector", "status")["ready"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert all(0 < accepted < 200 for accepted in answers)
