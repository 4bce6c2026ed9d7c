"""May this batch go on now, or must it wait its turn? A token bucket and a queue per tenant. Pure.

A batch is charged when it is judged. What brings the balance below zero is parked: it waits in its tenant's
queue, and behind it everything of that tenant that comes later. Refilling pays the debt, and the head of a queue
is released when the debt up to and including it is paid; so what a tenant is let through over any time is
`burst + rate * time`, however late the releases are carried out. When the queue is full the answer is FULL,
nothing is charged, and the agent keeps the batch.

    judge ─► ADMITTED                                              refund: the disk refused it
      └────► PARKED ─► parked (durable) ─► pick ─► appended ─► released (durable)
                  └─► unpark (refused)        └────────┴─────► put_back (refused)

Invariants, per tenant. balance + weight of what waits >= 0. Batches are picked in the order in which they were
parked. While something waits that is not on its way to the log, nothing is admitted past it.

One owner: the event loop; only `views` may be asked from another thread.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import msgspec

from collector.decide.bucket import MICRO, UNLIMITED, Bucket, Plan
from collector.decide.fairness import FairQueue, Flow
from wire.limits import MAX_BATCH_BYTES, MAX_BATCH_ROWS

MICRO_TOKENS_PER_BATCH = 100_000
MICRO_TOKENS_PER_ROW = 10_000
MICRO_TOKENS_PER_KIB = 50_000

MAX_ACCOUNTS = 100_000
"""Tenants remembered. A full bucket is as good as none, so it is forgotten first."""

_MAX_SHARE = 1_000_000 * MICRO
"""Of an unlimited tenant that still has a queue: as much as the largest rate."""
_NOT_DUE = -(1 << 62)
_REFRESH_NS = 250_000_000
"""How often the balance of a tenant that only waits is asked for."""
_MIN_RETRY_MS, _MAX_RETRY_MS = 1_000, 60_000


def weight(size_bytes: int, rows: int) -> int:
    """Micro-tokens of a batch: a fixed part, its rows, its bytes. 1 KB with 5 rows weighs 0.2 tokens, 500 KB with
    1,000 rows about 35.
    """
    return MICRO_TOKENS_PER_BATCH + MICRO_TOKENS_PER_ROW * rows + MICRO_TOKENS_PER_KIB * size_bytes // 1_024


HEAVIEST = weight(MAX_BATCH_BYTES, MAX_BATCH_ROWS)
"""No bucket is smaller, or the heaviest batch would wait for ever."""


class Verdict(Enum):
    ADMITTED = "admitted"
    PARKED = "parked"
    FULL = "full"


class Parked(msgspec.Struct, frozen=True, gc=False):
    """A batch that waits, and the place of its record in the log."""

    offset: int
    size: int
    weight: int
    since_unix_ns: int


class View(NamedTuple):
    """One tenant's queue as people see it."""

    tenant: str
    batches: int
    bytes: int
    debt: int
    """Micro-tokens."""
    drained_ns: int
    """How long the plan's rate takes to pay it."""
    oldest_unix_ns: int
    """When the head arrived; 0 if it is not durable yet."""


class SavedBucket(NamedTuple):
    tenant: str
    balance: int
    remainder: int
    at_unix_ns: int


class Changes(NamedTuple):
    """What a checkpoint has to learn."""

    added: dict[int, tuple[str, Parked]]
    """By offset: (tenant, batch) that came into a queue."""
    removed: list[int]
    """Offsets of those that left one."""
    buckets: list[SavedBucket]


class Charge(NamedTuple):
    """What one tenant was charged here since the collectors last settled."""

    tenant: str
    plan: Plan
    weight: int
    """Micro-tokens; below zero when more was given back."""
    start: int
    """The balance before it, in case nobody else knows one."""


class Account(Flow):
    """One tenant's bucket and queue."""

    __slots__ = (
        "ahead", "batches", "bucket", "bytes", "due_at", "picked", "plan", "queue", "tenant", "unsettled",
        "waiting_weight",
    )  # fmt: skip

    def __init__(self, tenant: str, plan: Plan, bucket: Bucket) -> None:
        super().__init__()
        self.tenant, self.plan, self.bucket = tenant, plan, bucket
        self.queue: deque[Parked] = deque()
        """What is durably parked and not durably released."""
        self.picked = 0
        """How many at its head are on their way out."""
        self.ahead = 0
        """Parked, and not handed to the log for release: nothing may pass them."""
        self.batches = 0
        self.bytes = 0
        """Of what counts against the quota: also what the disk has not taken yet."""
        self.waiting_weight = 0
        """Of what is parked and not picked."""
        self.due_at = _NOT_DUE
        """Of its one valid entry in the heap of due times."""
        self.unsettled = 0
        """Charged here, and not yet known to the other collectors."""

    def due_ns(self) -> int:
        """When the debt up to and including the next to be released is paid."""
        head = self.queue[self.picked]
        return self.bucket.last_ns + self.bucket.ns_until(self.plan, head.weight - self.waiting_weight)


class Admission:
    """Judges batches, and says which parked ones may go on."""

    def __init__(self, plan_of: Callable[[str], Plan], shared: bool = False) -> None:
        """`shared`: other collectors charge the same tenants, and somebody settles with them."""
        self._plan_of = plan_of
        self._shared = shared
        self._touched: dict[str, Account] = {}
        """Accounts to settle."""
        self._refreshed_ns = _NOT_DUE
        self._accounts: dict[str, Account] = {}
        self._parked: dict[str, Account] = {}
        """Accounts with anything parked."""
        self.full: set[str] = set()
        """Tenants that were told FULL, and of whose queue nothing has left since."""
        self._due: list[tuple[int, str]] = []
        """When a head's debt will be paid; each queue is here, in `_ready`, or has nothing left to pick."""
        self._ready: FairQueue[Account] = FairQueue()
        self._most = MAX_ACCOUNTS
        self._added: dict[int, tuple[str, Parked]] = {}
        self._removed: list[int] = []
        self._saved_ns = -(1 << 62)
        self.forgotten = 0
        """Tenants that were forgotten before their bucket was full."""

    def __len__(self) -> int:
        return len(self._accounts)

    def judge(self, tenant: str, weight: int, size: int, now_ns: int) -> Verdict:
        """Judge and charge a batch of `weight` micro-tokens and `size` bytes at monotonic time `now_ns`."""
        account = self._accounts.get(tenant) or self._open(tenant, now_ns)
        bucket = account.bucket
        bucket.refill(account.plan, now_ns)
        if bucket.balance >= weight and not account.ahead:
            bucket.balance -= weight
            if self._shared:
                self._charged(account, weight)
            return Verdict.ADMITTED
        if _is_full(account, size):
            if account.ahead:
                self.full.add(tenant)
            return Verdict.FULL
        bucket.balance -= weight
        if self._shared:
            self._charged(account, weight)
        account.waiting_weight += weight
        account.ahead += 1
        account.batches += 1
        account.bytes += size
        self._parked[tenant] = account
        return Verdict.PARKED

    def turns_away(self, tenant: str, size: int, now_ns: int) -> bool:
        """Whether `judge` would say FULL, whatever the batch weighs."""
        account = self._parked.get(tenant)
        if account is None or not account.ahead or not _is_full(account, size):
            return False
        account.bucket.refill(account.plan, now_ns)
        return True

    def retry_after_ms(self, tenant: str, weight: int) -> int:
        """When to come again after FULL: when an eighth of the debt is paid, so that agents do not all knock at once."""
        account = self._accounts[tenant]
        wait_ns = account.bucket.ns_until(account.plan, weight) // 8
        return min(_MAX_RETRY_MS, max(_MIN_RETRY_MS, wait_ns // 1_000_000))

    def refund(self, tenant: str, weight: int) -> None:
        """An admitted batch did not become durable; it will come again."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.bucket.balance += weight
            account.bucket.clip(account.plan)
            if self._shared:
                self._charged(account, -weight)

    def unpark(self, tenant: str, weight: int, size: int) -> None:
        """A batch judged PARKED did not become durable; it will come again."""
        account = self._parked[tenant]
        account.ahead -= 1
        account.waiting_weight -= weight
        self._leave(account, size)
        self.refund(tenant, weight)

    def parked(self, tenant: str, batch: Parked) -> None:
        """A batch judged PARKED is durable. Called in the order of the log."""
        account = self._parked[tenant]
        account.queue.append(batch)
        self._added[batch.offset] = (tenant, batch)
        if len(account.queue) == account.picked + 1:
            self._schedule(account)

    def next_due_ns(self) -> int | None:
        """When something will be there to pick; None if nothing waits."""
        if self._ready:
            return 0
        return self._due[0][0] if self._due else None

    def pick(self, now_ns: int, max_batches: int, max_bytes: int) -> list[tuple[Account, Parked]]:
        """What may be released now, fair over tenants and in order for each. At least one batch if any is due."""
        while self._due and self._due[0][0] <= now_ns:
            due_ns, tenant = heapq.heappop(self._due)
            account = self._parked.get(tenant)
            if account is not None and account.due_at == due_ns:
                account.due_at = _NOT_DUE
                self._ready.push(account)
        picked: list[tuple[Account, Parked]] = []
        while self._ready and len(picked) < max_batches and max_bytes > 0:
            account = self._ready.pop()
            account.bucket.refill(account.plan, now_ns)
            batch = account.queue[account.picked]
            account.picked += 1
            account.waiting_weight -= batch.weight
            self._ready.served(account, batch.weight, min(account.plan.rate, _MAX_SHARE))
            picked.append((account, batch))
            max_bytes -= batch.size
            if len(account.queue) > account.picked:
                self._schedule(account, now_ns)
        return picked

    def appended(self, picked: list[tuple[Account, Parked]]) -> None:
        """What was picked is in the log's queue: whatever is appended from now on comes after it."""
        for account, _ in picked:
            account.ahead -= 1

    def released(self, picked: list[tuple[Account, Parked]]) -> None:
        """What was picked and appended is durable."""
        for account, batch in picked:
            head = account.queue.popleft()
            assert head is batch, "released in order"
            account.picked -= 1
            self._forget_offset(batch.offset)
            self._leave(account, batch.size)

    def put_back(self, picked: list[tuple[Account, Parked]], was_appended: bool) -> None:
        """What was picked was not released; its turn comes again."""
        for account, batch in picked:
            account.picked -= 1
            account.waiting_weight += batch.weight
            account.ahead += was_appended
        self._reschedule()

    def reconsider(self, now_ns: int) -> None:
        """Plans have changed: what was refilled until now is kept, from now on the new ones hold."""
        for account in self._accounts.values():
            account.bucket.refill(account.plan, now_ns)
            account.plan = self._plan_of(account.tenant)
            account.bucket.clip(account.plan)
        self._reschedule()

    def unsettled(self, now_ns: int, most: int) -> list[Charge]:
        """What to settle with the other collectors now; it counts as settled from here on."""
        if now_ns - self._refreshed_ns > _REFRESH_NS:
            self._refreshed_ns = now_ns
            self._touched = self._parked | self._touched
        charges: list[Charge] = []
        while self._touched and len(charges) < most:
            tenant, account = self._touched.popitem()
            weight, account.unsettled = account.unsettled, 0
            if account.plan.rate < UNLIMITED:
                balance = account.bucket.at(account.plan, now_ns)
                charges.append(Charge(tenant, account.plan, weight, balance + weight))
        return charges

    def settled(self, charges: list[Charge], balances: list[int], now_ns: int) -> None:
        """The balances that all collectors have in common, after `charges`."""
        for charge, balance in zip(charges, balances, strict=True):
            account = self._accounts.get(charge.tenant)
            if account is None:
                continue
            account.bucket = Bucket(balance - account.unsettled, 0, now_ns)
            account.bucket.clip(account.plan)
            if account.due_at != _NOT_DUE and account.due_ns() != account.due_at:
                self._schedule(account, now_ns)
        if len(self._due) > 2 * len(self._parked) + 1_000:
            self._reschedule()

    def unsettled_weight(self) -> int:
        """Micro-tokens charged here that no other collector knows of."""
        return sum(account.unsettled for account in self._touched.copy().values())

    def changes(self, now_ns: int, now_unix_ns: int) -> Changes:
        """What has changed since the last call, as of now."""
        buckets = [
            SavedBucket(
                account.tenant, bucket.balance, bucket.remainder, now_unix_ns - now_ns + bucket.last_ns
            )
            for account in self._accounts.values()
            if (bucket := account.bucket).last_ns >= self._saved_ns
        ]
        changes = Changes(self._added, self._removed, buckets)
        self._added, self._removed, self._saved_ns = {}, [], now_ns
        return changes

    def not_saved(self, changes: Changes) -> None:
        """The checkpoint did not take them; the next one will have them too."""
        self._added = changes.added | self._added
        self._removed = changes.removed + self._removed
        self._saved_ns = -(1 << 62)

    def restore_bucket(self, tenant: str, balance: int, remainder: int, last_ns: int) -> None:
        """As it was saved; `last_ns` on this process's monotonic clock, where it may be negative."""
        self._accounts[tenant] = Account(tenant, self._plan_of(tenant), Bucket(balance, remainder, last_ns))

    def restore_parked(self, tenant: str, batch: Parked, saved: bool, now_ns: int) -> None:
        """A parked batch of before the start, oldest first. `saved`: the checkpoint, and so the balance, knows of it."""
        if tenant not in self._accounts:
            # Its balance was never saved; but whoever parks has nothing left.
            self.restore_bucket(tenant, 0, 0, now_ns)
        account = self._accounts[tenant]
        if not saved:
            account.bucket.balance -= batch.weight
            self._added[batch.offset] = (tenant, batch)
        account.waiting_weight += batch.weight
        account.ahead += 1
        account.batches += 1
        account.bytes += batch.size
        account.queue.append(batch)
        self._parked[tenant] = account

    def restore_released(self, tenant: str, offset: int) -> None:
        """A release of before the start: the batch parked at `offset`, and so all before it, have left the queue."""
        account = self._parked.get(tenant)
        while account is not None and account.queue and account.queue[0].offset <= offset:
            batch = account.queue.popleft()
            account.waiting_weight -= batch.weight
            account.ahead -= 1
            self._forget_offset(batch.offset)
            self._leave(account, batch.size)

    def restored(self, now_ns: int) -> None:
        """All of before the start is known. A debt is never more than what waits."""
        for account in self._accounts.values():
            account.bucket.refill(account.plan, now_ns)
            account.bucket.balance = max(account.bucket.balance, -account.waiting_weight)
            account.bucket.clip(account.plan)
        self._reschedule()

    def tenants(self) -> list[str]:
        return list(self._accounts)

    def balance(self, tenant: str, now_ns: int) -> int:
        """Micro-tokens a tenant has; below zero, what it must wait for."""
        account = self._accounts.get(tenant)
        return self._plan_of(tenant).capacity if account is None else account.bucket.at(account.plan, now_ns)

    def views(self, now_ns: int) -> list[View]:
        """The queues, longest debt first."""
        views = []
        for account in self._parked.copy().values():
            try:
                oldest_unix_ns = account.queue[0].since_unix_ns
            except IndexError:
                oldest_unix_ns = 0
            bucket, plan = account.bucket, account.plan
            debt = max(0, -bucket.at(plan, now_ns))
            drained_ns = debt * 1_000_000_000 // plan.rate
            views.append(
                View(account.tenant, account.batches, account.bytes, debt, drained_ns, oldest_unix_ns)
            )
        return sorted(views, key=lambda view: (-view.debt, view.tenant))

    def _charged(self, account: Account, weight: int) -> None:
        account.unsettled += weight
        self._touched[account.tenant] = account

    def _open(self, tenant: str, now_ns: int) -> Account:
        if len(self._accounts) >= self._most:
            self._forget(now_ns)
        plan = self._plan_of(tenant)
        account = self._accounts[tenant] = Account(tenant, plan, Bucket(plan.capacity, 0, now_ns))
        return account

    def _forget(self, now_ns: int) -> None:
        """Make room: the full buckets, and where that is not enough, every one without a queue."""
        before = len(self._accounts)
        for account in self._accounts.values():
            account.bucket.refill(account.plan, now_ns)
        kept = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.batches or account.bucket.balance < account.plan.capacity
        }
        if len(kept) > before * 7 // 8:
            self.forgotten += len(kept) - len(self._parked)
            kept = self._parked.copy()
        self._accounts = kept
        self._most = max(MAX_ACCOUNTS, 2 * len(kept))

    def _schedule(self, account: Account, now_ns: int = 0) -> None:
        due_ns = account.due_ns()
        if due_ns <= now_ns:
            account.due_at = _NOT_DUE
            self._ready.push(account)
        else:
            account.due_at = due_ns
            heapq.heappush(self._due, (due_ns, account.tenant))

    def _reschedule(self) -> None:
        self._due.clear()
        self._ready.clear()
        for account in self._parked.values():
            account.due_at = _NOT_DUE
            if len(account.queue) > account.picked:
                self._schedule(account)

    def _leave(self, account: Account, size: int) -> None:
        account.batches -= 1
        account.bytes -= size
        self.full.discard(account.tenant)
        if not account.batches:
            self._parked.pop(account.tenant, None)

    def _forget_offset(self, offset: int) -> None:
        if self._added.pop(offset, None) is None:
            self._removed.append(offset)


def _is_full(account: Account, size: int) -> bool:
    """Whether its queue has no room for a batch of this size."""
    return account.batches >= account.plan.park_batches or account.bytes + size > account.plan.park_bytes
