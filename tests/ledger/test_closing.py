"""Days that are closed: what keeps them open, what a manifest bills once and for all, and that nobody can change it unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from collector.handoff.log import Kind as Written
from ledger.errors import LedgerError
from ledger.ledger import Ledger
from ledger.store.client import StoreTrouble
from tests.ledger.site import DAY, HOUR, T0, Chain, Place, agent, batch, failing, insert
from tests.ledger.tampering import rewrite
from wire.v1 import usage_pb2 as pb

pytestmark = pytest.mark.usefixtures("few_measures")

DAYS = ["2024-10-04", "2024-10-05", "2024-10-06"]
"""T0 and the days behind it."""
WHO = "alice"


def of_days(count: int, number: int = 1, cpu: int = 100) -> list[pb.UsageBatch]:
    """One stream: four batches a day, and one behind the last day, so that those are complete."""
    chain = Chain(agent(number))
    out = [
        chain.next(T0 + n * 6 * HOUR, T0 + (n + 1) * 6 * HOUR, [{"cpu_usage_ns": cpu + n}])
        for n in range(4 * count)
    ]
    return [*out, chain.next(T0 + count * DAY, T0 + count * DAY + 5, [{"cpu_usage_ns": 1}])]


def booked(place: Place, *batches: pb.UsageBatch) -> Place:
    place.write(*batches)
    place.book()
    return place


def billed(place: Place, name: str) -> dict[tuple[str, str, str], int]:
    return {
        (line["kind"], line["usage_period"], line["tenant"]): int(line["value"])
        for line in place.ledger.export(name)
        if line["measure"] == "cpu_usage_ns"
    }


def kinds(answer: dict[str, Any]) -> list[str]:
    return [blocker["kind"] for blocker in answer["blockers"]]


def unaccounted(ledger: Ledger) -> list[tuple[str, str]]:
    """What a reconciliation says nobody will bring by itself."""
    found = ledger.reconcile()["findings"]
    return [(f["kind"], f["text"]) for f in found if f["kind"] in ("missing", "rejected")]


def test_a_complete_day_is_closed_once_and_in_order(place: Place) -> None:
    booked(place, *of_days(2))
    ledger = place.ledger
    with pytest.raises(LedgerError, match=f"{DAYS[0]}: close that one first"):
        ledger.close_period(DAYS[1], WHO)
    first = ledger.close_period(DAYS[0], WHO)
    assert (first["closed"], first["by"]) == (True, WHO)
    assert ledger.close_period(DAYS[0], "bob") == first
    with pytest.raises(LedgerError, match=f"{DAYS[1]} comes next"):
        ledger.close_period(DAYS[2], WHO)
    assert ledger.close_period(DAYS[1], WHO)["closed"]
    assert billed(place, DAYS[0]) == {("usage", DAYS[0], "acme"): 100 + 101 + 102 + 103}
    assert billed(place, DAYS[1]) == {("usage", DAYS[1], "acme"): 104 + 105 + 106 + 107}
    assert ledger.verify() == {"ok": True, "hours_compared": 0, "manifests_compared": 2, "findings": []}
    assert [p["state"] for p in ledger.periods()[:3]] == ["closed", "closed", "incomplete"]
    assert place.forget().close_period(DAYS[0], "bob") == first


def test_a_day_is_the_same_from_hours_that_are_built(place: Place) -> None:
    booked(place, *of_days(1))
    while place.ledger.roll_up():
        pass
    assert place.ledger.close_period(DAYS[0], WHO)["closed"]
    assert billed(place, DAYS[0]) == {("usage", DAYS[0], "acme"): 406}
    verified = place.ledger.verify()
    assert (verified["ok"], verified["hours_compared"]) == (True, 25)


def test_a_running_day_cannot_be_closed(place: Place) -> None:
    booked(place, *of_days(1))
    with pytest.raises(LedgerError, match="has not ended"):
        place.ledger.close_period("2500-01-01", WHO)


def test_what_is_missing_parked_rejected_or_in_conflict_blocks_until_it_is_waived(place: Place) -> None:
    batches = of_days(1)
    twin = batch(agent(1), 4, T0 + 18 * HOUR, T0 + DAY, [{"cpu_usage_ns": 9}], previous=bytes(32))
    place.write(batches[0], *batches[3:])
    place.write(batches[2], kind=Written.REJECTED, note=b"REASON_IMPLAUSIBLE x")
    booked(place, twin)
    ledger = place.ledger
    assert kinds(ledger.close_period(DAYS[0], WHO)) == ["missing", "rejected", "conflict"]
    stream = f"agent {agent(1)}, epoch 1"
    missing = "missing", f"{stream}: batches 2 to 2 have not arrived"
    fix = "`weighbridge-collector log readmit` lets it in, `waive` closes without it"
    rejected = "rejected", f"{stream}: batch 3 was rejected (REASON_IMPLAUSIBLE x): {fix}"
    assert unaccounted(ledger) == [missing, rejected]
    place.write(batches[1], kind=Written.PARKED, note=b"acme 1 2")
    place.book()
    answer = ledger.close_period(DAYS[0], WHO)
    assert kinds(answer) == ["parked", "rejected", "conflict"]
    assert ledger.status()["blockers"] == 3
    assert unaccounted(ledger) == [rejected], "what is parked is on its way"
    first, *others = (blocker["id"] for blocker in answer["blockers"])
    with pytest.raises(LedgerError, match="no blocker 'b1'.*Nothing is waived"):
        ledger.waive(DAYS[0], [first, "b1"], "known", WHO)
    for some in ([first], others):
        assert not ledger.close_period(DAYS[0], WHO)["closed"]
        ledger.waive(DAYS[0], some, "known", WHO)
    assert unaccounted(ledger) == []
    assert place.forget().close_period(DAYS[0], WHO)["closed"]
    assert billed(place, DAYS[0]) == {("usage", DAYS[0], "acme"): 100 + 103}
    with pytest.raises(LedgerError, match="is closed"):
        place.ledger.waive(DAYS[0], [first], "late", WHO)


def test_a_silent_agent_blocks_until_it_is_retired(place: Place) -> None:
    booked(place, *of_days(1), batch(agent(2), 1, T0, T0 + HOUR, [{"cpu_usage_ns": 5}], tenant="umbrella"))
    ledger = place.ledger
    assert kinds(ledger.close_period(DAYS[0], WHO)) == ["silent"]
    with pytest.raises(LedgerError, match="no batch of an agent"):
        ledger.retire(agent(9), T0 + DAY, "gone", WHO)
    ledger.retire(agent(2), T0 + DAY, "gone", WHO)
    assert ledger.close_period(DAYS[0], WHO)["closed"]
    assert billed(place, DAYS[0])["usage", DAYS[0], "umbrella"] == 5
    assert '"reason":"retired: gone"' in ledger.manifest(DAYS[0])["manifest"]


def closed_without_one(place: Place) -> pb.UsageBatch:
    """The first day is closed over a missing batch, which is given back."""
    batches = of_days(2)
    booked(place, *batches[:1], *batches[2:])
    (blocker,) = place.ledger.close_period(DAYS[0], WHO)["blockers"]
    place.ledger.waive(DAYS[0], [blocker["id"]], "lost", WHO)
    assert place.ledger.close_period(DAYS[0], WHO)["closed"]
    return batches[1]


def test_late_usage_is_an_adjustment_of_the_next_day_and_only_once(place: Place) -> None:
    late = closed_without_one(place)
    before = place.ledger.manifest(DAYS[0])
    booked(place, late)
    assert place.ledger.close_period(DAYS[1], WHO)["closed"]
    assert place.ledger.manifest(DAYS[0]) == before
    assert billed(place, DAYS[1]) == {
        ("usage", DAYS[1], "acme"): 104 + 105 + 106 + 107,
        ("adjustment", DAYS[0], "acme"): 101,
    }
    assert place.ledger.verify()["ok"]
    booked(place, late)
    assert place.ledger.verify()["ok"]


def test_usage_from_before_the_first_closed_day_is_billed_as_late(place: Place) -> None:
    booked(place, *of_days(2))
    assert place.ledger.close_period(DAYS[0], WHO)["closed"]
    # A spool that was found: another agent's, of the day before the first.
    chain = Chain(agent(2))
    booked(
        place,
        chain.next(T0 - HOUR, T0 - 1, [{"cpu_usage_ns": 77}]),
        chain.next(T0 + 2 * DAY, T0 + 2 * DAY + 9),
    )
    assert place.ledger.close_period(DAYS[1], WHO)["closed"]
    assert billed(place, DAYS[1])["adjustment", "2024-10-03", "acme"] == 77
    assert place.ledger.verify()["ok"]


def test_what_crosses_midnight_is_billed_in_both_days_and_once(place: Place) -> None:
    chain = Chain(agent(1))
    booked(
        place,
        chain.next(T0, T0 + DAY - HOUR, [{"cpu_usage_ns": 1}]),
        chain.next(T0 + DAY - HOUR, T0 + DAY + 2 * HOUR, [{"cpu_usage_ns": 100}]),
        chain.next(T0 + DAY + 2 * HOUR, T0 + 2 * DAY, [{"cpu_usage_ns": 1}]),
        chain.next(T0 + 2 * DAY, T0 + 2 * DAY + 1),
    )
    for day in DAYS[:2]:
        assert place.ledger.close_period(day, WHO)["closed"]
    assert [sum(billed(place, day).values()) for day in DAYS[:2]] == [1 + 33, 67 + 1]
    assert place.ledger.verify()["ok"]


def test_a_value_that_nobody_says_was_measured_cannot_keep_a_day_open(place: Place) -> None:
    batches = of_days(1)
    chain = Chain(agent(2))
    odd = chain.next(T0, T0 + DAY, [{"cpu_usage_ns": 5}], tenant="umbrella")
    odd.known[0] = 0
    booked(place, *batches, odd, batch(agent(2), 2, T0 + DAY, T0 + DAY + 1))
    assert place.ledger.close_period(DAYS[0], WHO)["closed"]
    assert (
        place.ledger.verify()["findings"][0]["kind"] == "chain"
    )  # `odd` was changed after the next one named it.


def test_what_is_booked_twice_is_never_billed(place: Place) -> None:
    batches = of_days(1)
    booked(place, *batches)
    other = of_days(1, cpu=500)[1]
    insert(place.store, other)  # As a second ledger on one server would.
    with pytest.raises(
        LedgerError, match=f"cannot be closed: agent {agent(1)}, epoch 1, batch 2 is booked with two"
    ):
        place.ledger.close_period(DAYS[0], WHO)
    assert not place.ledger.verify()["ok"]
    assert not place.ledger.reconcile()["ok"]
    rewrite(place.store, "batches", "seq = 2 AND has(units.cpu_usage_ns, 501)")
    assert place.forget().close_period(DAYS[0], WHO)["closed"]
    assert billed(place, DAYS[0]) == {("usage", DAYS[0], "acme"): 406}
    assert place.ledger.verify()["ok"]


def changed(table: str, where: str, **columns: str) -> Callable[[Place], None]:
    return lambda place: rewrite(place.store, table, where, **columns)


def rewritten(old: str, new: str) -> Callable[[Place], None]:
    """A manifest that says something else, with its digest and its place in the table right."""

    def change(place: Place) -> None:
        ((text,),) = place.store.query(f"SELECT manifest FROM manifests FINAL WHERE period = '{DAYS[0]}'")
        assert old in text
        rewrite(place.store, "manifests", f"period = '{DAYS[0]}'")
        columns = ("period", "digest", "closed_at_ns", "manifest")
        place.store.insert("manifests", columns, [(DAYS[0], bytes(32), 1, text.replace(old, new))])

    return change


_HOUR = T0 + HOUR
_IN_IT = f"start_ns >= {_HOUR} AND start_ns < {_HOUR + HOUR}"
TAMPERINGS: dict[str, tuple[Callable[[Place], None], set[str]]] = {
    "a batch deleted": (changed("batches", "seq = 2"), {"manifest", "rollup"}),
    "a row changed": (changed("batches", "seq = 2", **{"`units.cpu_usage_ns`": "[102]"}), {"manifest", "rollup"}),
    "a digest changed": (changed("batches", "seq = 5"), {"manifest", "rollup"}),
    "an hour's rows deleted": (changed("usage_hours", f"start_ns = {_HOUR}"), {"rollup"}),
    "an hour's minutes deleted": (changed("usage_minutes", _IN_IT), {"rollup"}),
    "a manifest deleted": (changed("manifests", f"period = '{DAYS[0]}'"), {"manifest_previous_digest"}),
    "a manifest's sum": (rewritten('"cpu_usage_ns":406', '"cpu_usage_ns":405'), {"manifest", "manifest_previous_digest"}),
    "a manifest's range": (rewritten('"last_seq":4', '"last_seq":5'), {"manifest_miscounted", "manifest_previous_digest"}),
    "a manifest's bytes": (rewritten('"by":"alice"', '"by": "alice"'), {"manifest_not_canonical", "manifest_previous_digest"}),
    "an agent that is SQL": (
        rewritten(f'"agent_id":"{agent(1)}"', '"agent_id":"x\'), (1,2,3)) --"'),
        {"manifest", "manifest_previous_digest"},
    ),
    "a range without end": (
        rewritten('"batches":4,"epoch":1,"first_seq":1', '"batches":4,"epoch":1,"first_seq":0'),
        {"manifest_miscounted", "manifest_previous_digest"},
    ),
    "no manifest": (rewritten("{", "["), {"manifest_unreadable"}),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERINGS)
def test_every_tampering_is_found(place: Place, what: str) -> None:
    change, wanted = TAMPERINGS[what]
    booked(place, *of_days(2))
    while place.ledger.roll_up():
        pass
    for day in DAYS[:2]:
        assert place.ledger.close_period(day, WHO)["closed"]
    assert place.ledger.verify()["ok"]
    change(place)
    found = {finding["kind"] for finding in place.ledger.verify()["findings"]}
    assert wanted <= found


def test_a_batch_that_took_anothers_place_is_found(place: Place) -> None:
    """Also the last of its day, whose successor's chain nobody would miss, and with the same sums."""
    batches = of_days(1)
    booked(place, *batches)
    assert place.ledger.close_period(DAYS[0], WHO)["closed"]
    rewrite(place.store, "batches", "seq = 4")
    batches[3].host = "another"
    insert(place.store, batches[3])
    findings = place.ledger.verify()["findings"]
    assert any("has another digest" in f["text"] for f in findings)
    assert {"chain", "manifest"} <= {f["kind"] for f in findings}


def test_a_close_that_fails_at_any_statement_bills_once(place: Place) -> None:
    booked(place, *of_days(1))
    for done in (False, True):
        at = 0
        while True:
            at += 1
            place.store.command("TRUNCATE TABLE manifests")
            with failing(place.store, at, done=done):
                try:
                    place.ledger.close_period(DAYS[0], WHO)
                except StoreTrouble:
                    pass
                else:
                    break
            assert place.ledger.close_period(DAYS[0], WHO)["closed"]
            assert place.store.query("SELECT count() FROM manifests") == [(1,)]
        assert at > 3


def test_the_looks_cost_does_not_grow_with_what_is_booked(place: Place) -> None:
    """No look reads `batches` or `verdicts`."""
    booked(place, *of_days(1))
    place.ledger.close_period(DAYS[0], WHO)
    asked: list[str] = []
    real = place.store.query
    place.store.query = lambda sql, parameters=None: asked.append(sql) or real(sql, parameters)  # type: ignore[method-assign,func-returns-value]
    status = place.ledger.status()
    assert asked
    assert not [sql for sql in asked if "batches" in sql or "verdicts" in sql]
    assert (status["agents"], status["streams"], status["periods_closed"], status["period"]) == (
        1,
        1,
        1,
        DAYS[1],
    )
