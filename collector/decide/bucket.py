"""The time-delta token bucket: two numbers and an instant, refilled when somebody asks. Pure, integers only.

    B = min(capacity, B_before + rate * dt) - weight

Tokens are counted in millionths. What a stretch of time gives is rarely a whole number of them, so the part
below one is carried: the balance after any sequence of refills is that of one refill over their sum.
"""

from __future__ import annotations

import msgspec

MICRO = 1_000_000
"""Micro-tokens of a token."""
_NS = 1_000_000_000

UNLIMITED = 1 << 60
"""As a rate it fills any bucket within a nanosecond, as a capacity no message empties it."""


class Plan(msgspec.Struct, frozen=True, gc=False):
    """What one tenant may use."""

    rate: int
    """Micro-tokens a second; at least 1."""
    capacity: int
    """Micro-tokens that may be used at once."""
    park_bytes: int
    """Bytes that may wait in the tenant's queue; 0: nothing is parked."""
    park_batches: int


class Bucket:
    """One tenant's tokens. Below zero is debt: what is parked has been charged already."""

    __slots__ = ("balance", "last_ns", "remainder")

    def __init__(self, balance: int, remainder: int, last_ns: int) -> None:
        self.balance = balance
        """Micro-tokens at `last_ns`."""
        self.remainder = remainder
        """Billionths of a micro-token beyond `balance`."""
        self.last_ns = last_ns

    def refill(self, plan: Plan, now_ns: int) -> None:
        """Up to monotonic time `now_ns`; a time that has passed already gives nothing and takes nothing."""
        elapsed = now_ns - self.last_ns
        if elapsed <= 0:
            return
        self.last_ns = now_ns
        gained, self.remainder = divmod(plan.rate * elapsed + self.remainder, _NS)
        self.balance += gained
        if self.balance >= plan.capacity:
            self.balance, self.remainder = plan.capacity, 0

    def at(self, plan: Plan, now_ns: int) -> int:
        """The balance at `now_ns`, changing nothing."""
        elapsed = max(0, now_ns - self.last_ns)
        return min(plan.capacity, self.balance + (plan.rate * elapsed + self.remainder) // _NS)

    def clip(self, plan: Plan) -> None:
        """A plan with a smaller capacity has come into force."""
        if self.balance >= plan.capacity:
            self.balance, self.remainder = plan.capacity, 0

    def ns_until(self, plan: Plan, balance: int) -> int:
        """Nanoseconds after `last_ns` at which the balance is reached; 0 if it is."""
        missing = (balance - self.balance) * _NS - self.remainder
        return max(0, -(-missing // plan.rate))
