"""Who holds how much of the door: streams by agent and by address, and bytes of an agent before anybody reads them. Pure.

An agent is known while it has a stream, and afterwards until its bytes are paid: coming again is no way around them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from wire.identity import AgentId

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Room:
    """The bounds; they may change while agents are connected."""

    streams: int
    streams_per_agent: int
    streams_per_address: int
    bytes_per_second: int
    burst_bytes: int


class Full(Exception):
    """A bound is reached."""

    def __init__(self, reason: str, setting: str) -> None:
        super().__init__(f"`limits.{setting}`")
        self.reason = reason
        """For the metrics."""
        self.setting = setting


class _Guest:
    """One agent."""

    __slots__ = ("at_ns", "owed", "streams")

    def __init__(self) -> None:
        self.streams = 0
        self.owed = 0
        """Billionths of a byte that were taken and not paid yet, at `at_ns`."""
        self.at_ns = 0

    def settle(self, bytes_per_second: int, now_ns: int) -> None:
        elapsed = max(0, now_ns - self.at_ns)
        self.at_ns = max(self.at_ns, now_ns)
        self.owed = max(0, self.owed - bytes_per_second * elapsed)


class Occupancy:
    """Times are monotonic nanoseconds."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.streams = 0
        self._guests: dict[AgentId, _Guest] = {}
        self._addresses: Counter[str] = Counter()

    @property
    def agents(self) -> int:
        """Agents that are remembered."""
        return len(self._guests)

    def enter(self, agent_id: AgentId, address: str) -> None:
        """One stream more. `Full` says which bound is against it, and then it does not count."""
        guest = self._guests.get(agent_id)
        if self.streams >= self.room.streams:
            raise Full("too_many_streams", "streams")
        if guest is not None and guest.streams >= self.room.streams_per_agent:
            raise Full("too_many_streams_of_agent", "streams_per_agent")
        if self._addresses[address] >= self.room.streams_per_address:
            raise Full("too_many_streams_of_address", "streams_per_address")
        if guest is None:
            guest = self._guests[agent_id] = _Guest()
        guest.streams += 1
        self.streams += 1
        self._addresses[address] += 1

    def leave(self, agent_id: AgentId, address: str, now_ns: int) -> None:
        """The end of a stream that had entered."""
        self.streams -= 1
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]
        guest = self._guests[agent_id]
        guest.streams -= 1
        self._forget(agent_id, guest, now_ns)

    def charge(self, agent_id: AgentId, size: int, now_ns: int) -> float:
        """Take `size` bytes of a connected agent; seconds to wait before they are looked at and more is read.

        What is over the burst waits until the rate has paid for it, so that the agent's own window fills and it is
        slowed by TCP: nothing is refused, nothing is sent twice.
        """
        guest = self._guests[agent_id]
        rate = self.room.bytes_per_second
        guest.settle(rate, now_ns)
        guest.owed += size * _NS
        over = guest.owed - self.room.burst_bytes * _NS
        return max(0, over) / rate / _NS

    def sweep(self, now_ns: int) -> None:
        """Forget agents that are gone and have paid."""
        for agent_id, guest in list(self._guests.items()):
            self._forget(agent_id, guest, now_ns)

    def _forget(self, agent_id: AgentId, guest: _Guest, now_ns: int) -> None:
        if guest.streams:
            return
        guest.settle(self.room.bytes_per_second, now_ns)
        if not guest.owed:
            del self._guests[agent_id]
