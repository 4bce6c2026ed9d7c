"""What somebody outside should hear of: rejections, conflicts, gaps, quotas. Gathered here, sent by `webhook`.

The pipeline tells, and never waits: a notice is an entry in a bounded table, and what is told again of the same thing is added
to it. The first of a kind is due at once, the next not before `repeat_ns` later, so a flood becomes a number. What does not fit
is counted. Notices are hints: they are lost with the process, and the log has all of it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

import msgspec

from collector.job import Item
from wire.identity import AgentId
from wire.statuses import Reason

EVENTS = ("rejection", "conflict", "gap", "quota")


class _Key(NamedTuple):
    event: str
    reason: str
    agent_id: str
    tenant: str


class Notice(msgspec.Struct):
    """One entry of a webhook's `events`."""

    event: str
    """rejection, conflict, gap or quota."""
    reason: str
    """In lower case, as in the metrics. Of a quota: `parked` or `park_full`."""
    agent_id: str
    """Empty for a quota."""
    tenant: str
    """Empty for what was rejected: it need not be true."""
    count: int
    """So many since the last notice of the same."""
    first_unix_ns: int
    last_unix_ns: int
    epoch: int
    """With `seq`: of the first of them; 0 for a quota."""
    seq: int
    detail: str


class Notices:
    """Thread-safe. Without `wanted` nothing is gathered."""

    def __init__(
        self, wanted: Collection[str] = (), max_waiting: int = 0, repeat_ns: int = 60_000_000_000
    ) -> None:
        self._wanted = frozenset(wanted)
        self._max_waiting = max_waiting
        self._repeat_ns = repeat_ns
        self._lock = threading.Lock()
        self._waiting: OrderedDict[_Key, tuple[Notice, int]] = OrderedDict()
        """With the monotonic time from which it is due."""
        self._sent: OrderedDict[_Key, int] = OrderedDict()
        """When a notice of this kind was last taken, oldest first."""
        self.not_fitted = 0
        """Events for which there was no room."""
        self.told = threading.Event()
        """Set whenever something was added."""

    def __len__(self) -> int:
        return len(self._waiting)

    def rejected(self, agent_id: AgentId, item: Item, reason: Reason, detail: str) -> None:
        event = "conflict" if reason == Reason.REASON_IDENTITY_CONFLICT else "rejection"
        name = Reason.Name(reason).removeprefix("REASON_").lower()
        self._tell(_Key(event, name, agent_id, ""), item.epoch, item.seq, detail)

    def gap(self, agent_id: AgentId, tenant: str, item: Item, reason: str, detail: str) -> None:
        self._tell(_Key("gap", reason, agent_id, tenant), item.epoch, item.seq, detail)

    def quota(self, tenant: str, reason: str) -> None:
        """A batch was parked, or found no room in the queue."""
        self._tell(_Key("quota", reason, "", tenant), 0, 0, "")

    def _tell(self, key: _Key, epoch: int, seq: int, detail: str) -> None:
        if key.event not in self._wanted:
            return
        now_ns, now_unix_ns = time.monotonic_ns(), time.time_ns()
        with self._lock:
            known = self._waiting.get(key)
            if known is not None:
                known[0].count += 1
                known[0].last_unix_ns = now_unix_ns
                return
            if len(self._waiting) >= self._max_waiting:
                self.not_fitted += 1
                return
            sent_ns = self._sent.get(key)
            due_ns = now_ns if sent_ns is None else sent_ns + self._repeat_ns
            notice = Notice(*key, 1, now_unix_ns, now_unix_ns, epoch, seq, detail)
            self._waiting[key] = notice, due_ns
        self.told.set()

    def take(self, now_ns: int, most: int) -> list[Notice]:
        """Notices that are due, in the order in which they came; they are the caller's from now on."""
        with self._lock:
            due = [key for key, (_, due_ns) in self._waiting.items() if due_ns <= now_ns][:most]
            taken = [self._waiting.pop(key)[0] for key in due]
            for key in due:
                self._sent.pop(key, None)
                self._sent[key] = now_ns
            while self._sent and (
                len(self._sent) > self._max_waiting
                or next(iter(self._sent.values())) + self._repeat_ns <= now_ns
            ):
                self._sent.popitem(last=False)
        return taken
