"""Traffic by cgroup -> what each unit's row gains. Pure.

The kernel counts each cgroup's own traffic. A counter is taken by its difference to the last reading's, and the
difference goes to the unit the cgroup lies in. So nothing is billed twice whatever becomes of an entry: shown
again after a crash it adds nothing, deleted it is forgotten, and an entry whose unit is not known yet waits with
its old counters.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.meter.model import NETWORK, Network
from wire.measures import BIT

NETWORK_BITS = tuple(BIT[name] for name in NETWORK)
NETWORK_KNOWN = sum(1 << bit for bit in NETWORK_BITS)

Traffic = tuple[int, ...]


class NetworkBase(msgspec.Struct, frozen=True, array_like=True):
    """The counters that the next differences start from."""

    load_id: int
    read_unix_ns: int
    """End of the interval in which they were read."""
    entries: dict[int, Traffic]
    read_out: bool = False
    """The probes were unloaded and then read once more: nothing was counted since."""


class Gains(msgspec.Struct, frozen=True):
    """What was counted since the last reading."""

    by_unit: dict[int, list[int]]
    after: NetworkBase | None
    lost: NetworkBase | None
    """A base whose counters are gone: what they had counted since is not known."""


def gains(before: NetworkBase | None, networks: Sequence[Network], read_unix_ns: int) -> Gains:
    """Differences of `networks`, the present one last, to the base."""
    by_unit: dict[int, list[int]] = {}
    after = before
    for network in networks:
        known = before.entries if before is not None and before.load_id == network.load_id else {}
        entries: dict[int, Traffic] = {}
        for cgroup_id, unit_id, now in network.entries:
            old = known.get(cgroup_id)
            if unit_id is None:
                if old is not None:
                    entries[cgroup_id] = old
                continue
            entries[cgroup_id] = now
            if now == old:
                continue
            total = by_unit.setdefault(unit_id, [0] * len(NETWORK))
            for slot, delta in enumerate(_difference(old, now)):
                total[slot] += delta
        after = NetworkBase(network.load_id, read_unix_ns, entries, network.unloaded)
    if before is None or before.read_out or not networks:
        return Gains(by_unit, after, None)
    gone = before.load_id not in {network.load_id for network in networks}
    return Gains(by_unit, after, before if gone else None)


def _difference(old: Traffic | None, now: Traffic) -> Traffic:
    if old is None:
        return now
    delta = tuple([b - a for a, b in zip(old, now, strict=True)])
    # Lower than before: the entry was deleted and made anew. It counts from zero.
    return now if min(delta) < 0 else delta
