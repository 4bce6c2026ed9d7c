"""Token buckets that several collectors share, in Redis.

Strategy. Every collector judges by buckets of its own, so no batch waits for Redis. Fifty times a second it settles:
one script, one round trip, for all tenants that were charged since. The script refills each shared bucket by the
server's clock, takes the charges off, and returns the balance, which becomes the collector's own. What collectors
admit of one tenant between two settlements may exceed its burst; it is charged, so the tenant pays by waiting,
and over any longer time all collectors together let `burst + rate * time` through.

Failure model. Redis away: the own buckets go on alone, each at the whole rate, charges add up, and the next
settlement that succeeds carries them. A settlement whose answer was lost is sent again under its number, and the
script takes each number once. A Redis that lost its data starts from what the first collector remembers.

All keys carry one hash tag, so in a cluster they lie in one slot and the script may touch them together.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

import redis.asyncio
from redis.exceptions import RedisError

from collector.decide.admission import Admission, Charge
from collector.errors import CollectorError
from wire.daemon.journal import Journal

SETTLE_SECONDS = 0.02
TROUBLE_SECONDS = 0.5
ANSWER_SECONDS = 1.0
MAX_CHARGES = 1_000
"""Tenants in one settlement; further ones come with the next."""
_SETTLED_LIFE_MS = 86_400_000

SCRIPT = """
-- KEYS: the number of this collector's last settlement, then one bucket a tenant.
-- ARGV: this settlement's number, the life of that key, the time in microseconds or '', then for each bucket:
-- rate, capacity, charge, and the balance to start from where there is none.
-- Every number stays below 2^53: Lua has doubles. `r` is the part of a micro-token, in millionths.
local again = redis.call('GET', KEYS[1]) == ARGV[1]
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local now = tonumber(ARGV[3])
if not now then
    local t = redis.call('TIME')
    now = tonumber(t[1]) * 1000000 + tonumber(t[2])
end
local balances = {}
for i = 2, #KEYS do
    local at = 4 + (i - 2) * 4
    local rate, capacity = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
    local charge, start = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    local kept = redis.call('HMGET', KEYS[i], 'b', 'r', 't')
    local b, r, last = tonumber(kept[1]), tonumber(kept[2]), tonumber(kept[3])
    if not b then
        b, r, last = start, 0, now
    end
    local elapsed = math.max(0, now - last)
    local seconds = math.floor(elapsed / 1000000)
    local micros = elapsed - seconds * 1000000
    if seconds > (capacity - b) / rate + 1 then
        b, r = capacity, 0
    else
        local high = math.floor(rate / 1000000)
        local part = (rate - high * 1000000) * micros + r
        b = b + rate * seconds + high * micros + math.floor(part / 1000000)
        r = part % 1000000
        if b >= capacity then
            b, r = capacity, 0
        end
    end
    if not again then
        b = b - charge
    end
    if b >= capacity then
        b, r = capacity, 0
    end
    redis.call('HSET', KEYS[i], 'b', string.format('%.0f', b), 'r', string.format('%.0f', r),
        't', string.format('%.0f', math.max(now, last)))
    -- A full bucket is as good as none.
    redis.call('PEXPIRE', KEYS[i], string.format('%.0f', math.min(4e12, (capacity - b) / rate * 1000 + 60000)))
    balances[i - 1] = b
end
return balances
"""


log = Journal("collector.shared")


class SharedAway(Exception):
    """Redis did not answer."""


class RedisBuckets:
    """The buckets of one installation."""

    def __init__(self, url: str, cluster: bool = False) -> None:
        kind = redis.asyncio.RedisCluster if cluster else redis.asyncio.Redis
        try:
            self._redis = kind.from_url(
                url, socket_timeout=ANSWER_SECONDS, socket_connect_timeout=ANSWER_SECONDS
            )
        except (ValueError, RedisError) as error:
            raise CollectorError(f"shared.redis: {error}") from None
        self._script = self._redis.register_script(SCRIPT)
        self._settled_key = f"{{weighbridge}}:settled:{uuid.uuid4()}"

    async def settle(
        self, number: int, charges: Sequence[Charge], now_unix_us: int | None = None
    ) -> list[int]:
        """Take charges off; the balances afterwards. The same number again takes nothing. SharedAway."""
        keys = [self._settled_key, *(f"{{weighbridge}}:bucket:{charge.tenant}" for charge in charges)]
        values: list[int | str] = [number, _SETTLED_LIFE_MS, "" if now_unix_us is None else now_unix_us]
        for charge in charges:
            values += (charge.plan.rate, charge.plan.capacity, charge.weight, charge.start)
        try:
            balances = await asyncio.wait_for(self._script(keys=keys, args=values), 2 * ANSWER_SECONDS)
        except (RedisError, OSError, TimeoutError) as error:
            raise SharedAway(f"{type(error).__name__}: {error}") from error
        return [int(balance) for balance in balances]

    async def ask(self) -> None:
        """SharedAway unless it answers."""
        try:
            await asyncio.wait_for(self._redis.ping(), 2 * ANSWER_SECONDS)
        except (RedisError, OSError, TimeoutError) as error:
            raise SharedAway(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        await self._redis.aclose()


class Settler:
    """Keeps the own buckets and the shared ones together."""

    def __init__(self, admission: Admission, buckets: RedisBuckets) -> None:
        self._admission = admission
        self._buckets = buckets
        self._number = 0
        self.trouble = ""
        """Why this collector judges alone, or empty."""
        self.settlements = self.failures = 0

    async def run(self) -> None:
        """Settle until cancelled."""
        try:
            while True:
                await asyncio.sleep(SETTLE_SECONDS)
                charges = self._admission.unsettled(time.monotonic_ns(), MAX_CHARGES)
                if charges:
                    self._number += 1
                    await self._settle(charges)
        finally:
            await self._buckets.close()

    async def _settle(self, charges: list[Charge]) -> None:
        while True:
            try:
                balances = await self._buckets.settle(self._number, charges)
            except SharedAway as error:
                self.failures += 1
                if not self.trouble:
                    log.error("shared_buckets_away", code="METER-001", error=str(error))
                self.trouble = str(error)
                await asyncio.sleep(TROUBLE_SECONDS)
                continue
            break
        if self.trouble:
            log.info("shared_buckets_back")
        self.trouble = ""
        self.settlements += 1
        self._admission.settled(charges, balances, time.monotonic_ns())
