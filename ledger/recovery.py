"""What openings say that no batch carried, out of the tables: of agents that began a further epoch. No other has lost any."""

from __future__ import annotations

from collections import defaultdict

from ledger.recover.facts import Beginning, Booked, Opening, Recovery
from ledger.recover.queries import AGENTS, BEGINNINGS, BOOKED, OPENINGS
from ledger.recover.recovered import recovered
from ledger.store.client import Store


def recoveries(store: Store) -> Recovery:
    """Of all agents, computed anew from what is booked now. StoreTrouble."""
    whole = Recovery([], [])
    # One agent at a time: what is booked of it has to be looked at together, and no more than that.
    for (agent_id,) in store.query(AGENTS):
        this = {"agent_id": agent_id}
        found = recovered(
            [Opening(*row) for row in store.query(OPENINGS, this)],
            [Booked(*row) for row in store.query(BOOKED, this)],
            [Beginning(*row) for row in store.query(BEGINNINGS, this)],
        )
        whole.recovered.extend(found.recovered)
        whole.unknown.extend(found.unknown)
    return whole


def recovered_until(store: Store, end_unix_ns: int) -> dict[str, dict[str, int]]:
    """Tenant -> measure -> amount (signed) of what was found at openings that lie before `end_unix_ns`."""
    totals: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for one in recoveries(store).recovered:
        if max(one.start_unix_ns, one.end_unix_ns) <= end_unix_ns:
            totals[one.tenant][one.measure] += one.amount
    return {tenant: dict(measures) for tenant, measures in totals.items()}
