"""The lines of a bill: nothing left out, nothing under two names, nothing under one name twice."""

from __future__ import annotations

import json

from hypothesis import given

from ledger.periods.bill import bill_lines, unit_of
from ledger.periods.manifest import Account, Adjustment, Manifest, Recovered, parse
from tests.ledger.test_manifest import MANIFESTS
from wire.measures import MAXIMA, MEASURES

NOVEMBER = Manifest(
    "2026-11",
    b"",
    0,
    "ops",
    (),
    (
        Account("globex", 1, 1, {"oom_kills": 1, "cpu_usage_ns": 0}),
        Account("acme", 2, 2, {"memory_byte_seconds": 2**70, "memory_peak_bytes": 4096}),
    ),
    adjustments=(Adjustment("2026-10", (), (Account("acme", 1, 1, {"cpu_usage_ns": 7}),)),),
    recovered=(Recovered("acme", {"cpu_usage_ns": -3}),),
)


def test_there_is_a_line_for_each_tenant_and_measure_that_is_not_zero() -> None:
    short = [
        (x["line_id"], x["usage_period"], x["value"], x["unit"], x["aggregate"]) for x in bill_lines(NOVEMBER)
    ]
    assert short == [
        ("2026-11/usage/2026-11/memory_byte_seconds/acme", "2026-11", str(2**70), "byte-seconds", "sum"),
        ("2026-11/usage/2026-11/memory_peak_bytes/acme", "2026-11", "4096", "bytes", "max"),
        ("2026-11/usage/2026-11/oom_kills/globex", "2026-11", "1", "count", "sum"),
        ("2026-11/adjustment/2026-10/cpu_usage_ns/acme", "2026-10", "7", "nanoseconds", "sum"),
        ("2026-11/recovered/2026-11/cpu_usage_ns/acme", "2026-11", "-3", "nanoseconds", "sum"),
    ]


def test_every_measure_has_a_unit_and_maxima_are_named_as_they_are_in_the_contract() -> None:
    assert set(MEASURES) > MAXIMA
    assert {m for m in MEASURES if "peak" in m} == MAXIMA
    counted = {m for m in MEASURES if unit_of(m) == "count"}
    assert counted == {
        m for m in MEASURES if m.endswith(("_ops", "_packets", "_periods", "_kills")) or m == "pids_peak"
    }


@given(MANIFESTS)
def test_lines_are_the_same_from_the_stored_bytes_and_no_two_share_an_id(manifest: Manifest) -> None:
    lines = bill_lines(manifest)
    assert bill_lines(parse(manifest.canonical())) == lines
    assert len({line["line_id"] for line in lines}) == len(lines)
    assert json.loads(json.dumps(lines)) == lines
    nonzero = [
        value
        for part in (manifest.accounts, *(a.accounts for a in manifest.adjustments), manifest.recovered)
        for account in part
        for value in account.sums.values()
        if value
    ]
    assert sorted(int(line["value"]) for line in lines) == sorted(nonzero)
