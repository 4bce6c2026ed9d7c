"""Does it add up? The host's counter against the rows, and each batch against the one before it."""

from __future__ import annotations

from ledger.book.booking import VERDICT_COLUMNS, Verdict
from ledger.proof.chain import booked_twice, broken_chains
from ledger.proof.conservation import Conservation
from ledger.proof.finding import MAX_FINDINGS
from ledger.proof.rollups import Rollups
from ledger.rollup.hours import Hours
from ledger.store.client import Store
from tests.ledger.site import HOUR, SECOND, T0, Chain, agent, batch, insert
from tests.ledger.tampering import rewrite
from wire.identity import digest
from wire.v1 import usage_pb2 as pb

STEP = 10 * SECOND


def conserving(intervals: int, wrong_at: int = -1, by: int = 0) -> list[pb.UsageBatch]:
    """Two tenants an interval; what the rows have more than the host is the change of the deficit, as an agent counts."""
    chain, out, deficit = Chain(agent(1)), [], 0
    for n in range(intervals):
        mine, its = 1_000 + 7 * n, 2**61 - n
        change = (5, -3, 0)[n % 3]
        deficit += change
        start = T0 + n * STEP
        out.append(
            chain.next(
                start, start + STEP, [{"cpu_usage_ns": mine + (by if n == wrong_at else 0)}], tenant="acme"
            )
        )
        out.append(
            chain.next(
                start,
                start + STEP,
                [{"cpu_usage_ns": its}],
                tenant="host",
                totals=(mine + its - change, deficit),
            )
        )
    return out


def test_rows_that_are_the_hosts_counter_have_no_finding(store: Store) -> None:
    insert(store, *conserving(9))
    proof = Conservation(store)
    # Not the first, whose deficit before is not known, nor the last, which may not be whole yet.
    assert (proof.intervals, proof.difference_ns, proof.findings) == (7, 0, [])


def test_one_nanosecond_too_many_is_found_and_named(store: Store) -> None:
    insert(store, *conserving(9, wrong_at=4, by=1))
    proof = Conservation(store)
    assert (proof.intervals, proof.difference_ns) == (7, 1)
    (finding,) = proof.findings
    assert (
        f"agent {agent(1)} (host), epoch 1, batches 9 to 10: rows have +1 ns more than the host"
        in finding.text
    )


def test_an_interval_that_lacks_a_batch_is_not_judged(store: Store) -> None:
    batches = conserving(9)
    insert(store, *batches[:8], *batches[9:])
    proof = Conservation(store)
    assert proof.findings == []
    assert proof.intervals == 5  # Neither that one nor the one before it, which may lack it.


def test_sums_beyond_64_bits_are_conserved(store: Store) -> None:
    rows = [{"cpu_usage_ns": 2**62}] * 9
    chain = Chain(agent(1))
    for n in range(3):
        start = T0 + n * STEP
        insert(store, *(chain.next(start, start + STEP, rows, tenant=t) for t in "abc"))
        insert(
            store, chain.next(start, start + STEP, [{"cpu_usage_ns": 0}], tenant="host", totals=(2**62, 0))
        )
    proof = Conservation(store)
    assert (proof.intervals, proof.difference_ns) == (1, 26 * 2**62)


def links(count: int) -> list[pb.UsageBatch]:
    chain = Chain(agent(1))
    return [chain.next(T0 + n, T0 + n + 1) for n in range(count)]


def rejected(what: pb.UsageBatch, body: bytes = b"") -> Verdict:
    body = body or what.SerializeToString()
    return Verdict(agent(1), what.epoch, what.seq, digest(body), "rejected", "acme", 1, 2, 3, "")


def test_a_chain_is_whole_also_over_holes_and_rejected_links(store: Store) -> None:
    batches = links(7)
    insert(store, *batches[:3], batches[4], batches[6])
    store.insert(
        "verdicts",
        VERDICT_COLUMNS,
        [rejected(batches[3]), rejected(batches[3], b"other bytes, rejected too")],
    )
    assert broken_chains(store) == []


def test_a_broken_link_is_named(store: Store) -> None:
    batches = links(5)
    batches[2].previous_digest = bytes(31) + b"x"
    insert(store, *batches)
    found = broken_chains(store)
    assert [f.kind for f in found] == ["chain", "chain"]
    assert f"agent {agent(1)}, epoch 1, batch 3 does not follow" in found[0].text
    assert "batch 4 " in found[1].text  # Its bytes are others now, too.


def test_a_rejected_link_with_other_bytes_breaks_the_chain(store: Store) -> None:
    batches = links(3)
    insert(store, batches[0], batches[2])
    store.insert("verdicts", VERDICT_COLUMNS, [rejected(batches[1], b"not these")])
    (finding,) = broken_chains(store)
    assert "batch 3 " in finding.text


def test_a_first_batch_that_names_one_before_it_is_found(store: Store) -> None:
    insert(store, *links(2))
    rewrite(store, "batches", "seq = 1", previous_digest="toFixedString('x', 32)")
    (finding,) = broken_chains(store)
    assert "batch 1 " in finding.text


def test_two_bytes_under_one_identity_are_found_and_the_same_ones_are_one(store: Store) -> None:
    one, other = (batch(agent(1), 1, T0, T0 + 5, [{"cpu_usage_ns": n}]) for n in (1, 2))
    insert(store, one)
    insert(store, one)
    assert booked_twice(store) == []
    insert(store, other)
    (finding,) = booked_twice(store)
    assert f"agent {agent(1)}, epoch 1, batch 1 is booked with two different digests" in finding.text
    assert booked_twice(store, f"interval_start_ns >= {T0 + 5}") == []
    assert len(booked_twice(store, f"interval_start_ns >= {T0}")) == 1


def test_findings_are_named_up_to_a_bound_and_all_are_counted(store: Store) -> None:
    insert(
        store,
        *(batch(agent(1), seq, T0, T0 + 5, [{"cpu_usage_ns": n}]) for seq in range(1, 151) for n in (1, 2)),
    )
    found = booked_twice(store)
    assert (len(found), sum(f.weight for f in found)) == (MAX_FINDINGS + 1, 150)


def test_hours_and_minutes_that_are_not_their_rows_are_named(store: Store) -> None:
    chain = Chain(agent(1))
    insert(
        store, *(chain.next(T0 + n * HOUR, T0 + (n + 1) * HOUR, [{"cpu_usage_ns": 700}]) for n in range(3))
    )
    hours = Hours(store)
    hours.build_settled(T0 + 9 * HOUR, 9)
    assert (Rollups(store, hours.built).hours, Rollups(store, hours.built).findings) == (3, [])
    rewrite(store, "usage_hours", f"start_ns = {T0}", cpu_usage_ns="cpu_usage_ns + 1")
    rewrite(store, "usage_minutes", f"start_ns = {T0 + HOUR}")
    proof = Rollups(store, hours.built)
    assert [
        f"the hour {h} of tenant 'acme'" in f.text
        for h, f in zip((T0, T0 + HOUR), proof.findings, strict=True)
    ] == [True, True]
    assert proof.difference_ns >= 1
