"""The streams a collector knows, in memory. The log is the truth they were read from; see `sqlite`."""

from __future__ import annotations

from collections.abc import Iterator

from collector.decide.dedup import StreamState
from collector.state.sqlite import StreamKey
from wire.identity import AgentId

MAX_EPOCHS_PER_AGENT = 1_000
"""An agent opens an epoch when its spool is lost: a thousand means that somebody must look at that host."""


class Streams:
    """Every stream by (agent, epoch). One owner: the event loop."""

    def __init__(self) -> None:
        self._streams: dict[StreamKey, StreamState] = {}
        self._epochs: dict[AgentId, list[int]] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def get(self, agent_id: AgentId, epoch: int) -> StreamState | None:
        return self._streams.get((agent_id, epoch))

    def put(self, agent_id: AgentId, epoch: int, state: StreamState) -> None:
        """Add a stream that is not known yet."""
        assert (agent_id, epoch) not in self._streams
        self._streams[agent_id, epoch] = state
        self._epochs.setdefault(agent_id, []).append(epoch)

    def latest_epoch(self, agent_id: AgentId) -> int:
        """Largest epoch known of an agent; 0 if none."""
        return max(self._epochs.get(agent_id, (0,)))

    def may_open(self, agent_id: AgentId) -> bool:
        """Whether one more epoch of this agent is within the bound."""
        return len(self._epochs.get(agent_id, ())) < MAX_EPOCHS_PER_AGENT

    def of_agent(self, agent_id: AgentId) -> list[tuple[int, StreamState]]:
        return [(epoch, self._streams[agent_id, epoch]) for epoch in self._epochs.get(agent_id, ())]

    def agents(self) -> list[AgentId]:
        return list(self._epochs)

    def take_dirty(self) -> Iterator[tuple[StreamKey, StreamState]]:
        """The streams marked since the last call."""
        for key, state in self._streams.items():
            if state.dirty:
                state.dirty = False
                yield key, state
