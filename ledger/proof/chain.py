"""Is each stream one chain? Every batch carries the digest of the one before it; rejected ones are links, too."""

from __future__ import annotations

from ledger.proof.finding import Finding, bounded
from ledger.store.client import Store

# An identity may have several digests: rejected twice, or booked twice. Each is a link.
_BROKEN = """
    SELECT toString(agent_id) AS agent, epoch, seq
    FROM (
        SELECT agent_id, epoch, seq, previous,
            lagInFrame(seq) OVER w AS seq_before, lagInFrame(digests) OVER w AS digests_before
        FROM (
            SELECT agent_id, epoch, seq, groupUniqArray(digest) AS digests,
                groupUniqArrayIf(previous_digest, is_booked) AS previous
            FROM (
                SELECT agent_id, epoch, seq, digest, previous_digest, true AS is_booked FROM batches
                UNION ALL
                SELECT agent_id, epoch, seq, digest, digest AS previous_digest, false AS is_booked FROM verdicts
                WHERE kind = 'rejected' AND (agent_id, epoch, seq) NOT IN (
                    SELECT agent_id, epoch, seq FROM batches
                    WHERE (agent_id, epoch, seq) IN (SELECT agent_id, epoch, seq FROM verdicts WHERE kind = 'rejected')
                )
            )
            GROUP BY agent_id, epoch, seq
        )
        WINDOW w AS (PARTITION BY agent_id, epoch ORDER BY seq ROWS BETWEEN 1 PRECEDING AND CURRENT ROW)
    )
    WHERE seq_before + 1 = seq AND seq > 1 AND NOT hasAll(digests_before, previous)
        OR seq = 1 AND arrayExists(digest -> digest != toFixedString('', 32), previous)"""


def broken_chains(store: Store) -> list[Finding]:
    """Batches whose predecessor is not the one they name."""
    return _ask(
        store,
        "chain",
        _BROKEN,
        "does not follow from the batch before it: its bytes or that one's are not the agent's",
    )


def booked_twice(store: Store, of: str = "true") -> list[Finding]:
    """Identities that are in the books with different bytes, and at least one of them `of` this condition. One ledger never
    books so; two at once on one server could."""
    twice = f"""
        SELECT toString(agent_id) AS agent, epoch, seq FROM batches
        GROUP BY agent_id, epoch, seq HAVING uniqExact(digest) > 1 AND countIf({of}) > 0"""
    return _ask(store, "identity_conflict", twice, "is booked with two different digests (METER-006)")


def _ask(store: Store, kind: str, sql: str, what: str) -> list[Finding]:
    ((total,),) = store.query(f"SELECT count() FROM ({sql})")
    if not total:
        return []
    found = store.query(f"{sql} ORDER BY agent, epoch, seq LIMIT 100")
    return bounded(
        kind, [f"agent {agent}, epoch {epoch}, batch {seq} {what}" for agent, epoch, seq in found], total
    )
