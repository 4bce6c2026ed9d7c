"""Which bytes are booked under an identity."""

from __future__ import annotations

from collections.abc import Sequence

from ledger.store.client import Store
from wire.identity import is_agent_id

_ASKED_AT_ONCE = 1_000

Identity = tuple[str, int, int]
"""agent_id, epoch, seq."""


def booked_digests(store: Store, identities: Sequence[Identity]) -> dict[Identity, set[bytes]]:
    """Identity -> the digests under which it is booked: one, if all is well; not in here if none. StoreTrouble."""
    found: dict[Identity, set[bytes]] = {}
    for at in range(0, len(identities), _ASKED_AT_ONCE):
        some = identities[at : at + _ASKED_AT_ONCE]
        assert all(is_agent_id(agent) for agent, _, _ in some)
        listed = ", ".join(f"('{agent}', {epoch}, {seq})" for agent, epoch, seq in some)
        for agent, epoch, seq, digest in store.query(
            f"SELECT toString(agent_id), epoch, seq, hex(digest) FROM batches FINAL WHERE (agent_id, epoch, seq) IN ({listed})"
        ):
            found.setdefault((agent, epoch, seq), set()).add(bytes.fromhex(digest))
    return found
