"""The time up to which everything is booked, of each agent and of all. Pure.

A period that ends at or before the watermark has no blocker, nor has any before it; and where there is one, the
watermark lies before that period's end. It goes back when a new agent appears whose usage reaches further back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ledger.periods.streams import Held, Stream
from ledger.periods.unknown import unknowns


class Watermarks(NamedTuple):
    """In unix ns. None: there is nothing to wait for, as with a retired agent without a hole."""

    agents: dict[str, int | None]
    overall: int | None


def watermark(
    streams: Iterable[Stream],
    held: Iterable[Held],
    retired: Mapping[str, int],
    waived: Collection[str] = frozenset(),
) -> Watermarks:
    """All usage before the watermark is booked, but for the blockers whose ids are in `waived`: without them one lost
    batch would hold it for ever. `retired` is agent -> unix ns, see `unknowns`.
    """
    agents = {
        agent_id: min((u.start_unix_ns for u in found if u.id not in waived), default=None)
        for agent_id, found in unknowns(streams, held, retired).items()
    }
    return Watermarks(agents, min((at for at in agents.values() if at is not None), default=None))
