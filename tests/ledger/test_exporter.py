"""The ledger's metrics: every number of the tally is there, bounded, and from zero on where `increase` looks at it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ledger.exporter import MAX_SOURCES, MAX_TROUBLES, LedgerMetrics
from ledger.tally import INSERT_BUCKETS_SECONDS, TROUBLES, VERDICTS, Tally
from wire.daemon.local_port import new_registry


def scraped(tally: Tally, trouble: dict[str, str] | None = None) -> dict[str, float]:
    registry = new_registry()
    registry.register(
        LedgerMetrics(lambda: tally, lambda: trouble or {}, lambda: [("reload_failed", "-", 0.0)])
    )
    text = generate_latest(registry).decode()
    return {
        sample.name.removeprefix("weighbridge_ledger_")
        + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("weighbridge_ledger_")
    }


def test_every_field_of_the_tally_changes_what_is_scraped() -> None:
    now = time.time_ns()
    other: dict[str, Any] = {
        "verdicts": {"parked": 5},
        "insert_counts": [1] * (len(INSERT_BUCKETS_SECONDS) + 1),
        "source_lag": {("log", "bytes"): 5},
        "period_end_unix_ns": now - 10**12,
    }
    empty = scraped(Tally())
    for field in dataclasses.fields(Tally):
        if field.name == "period":
            continue  # a name, for the headline only
        value = other.get(field.name, 1_700_000_000 * 10**9 if field.name.endswith("_unix_ns") else 7)
        assert scraped(Tally(**{field.name: value})) != empty, field.name


def test_what_alerts_count_is_there_from_zero_on() -> None:
    found = scraped(Tally())
    for kind in VERDICTS:
        assert found[f"verdicts_total|{kind}"] == 0
    for reason in TROUBLES:
        assert found[f"trouble|{reason}"] == 0
    for name in (
        "booked_batches_total",
        "conflicts_total",
        "failed_inserts_total",
        "oldest_unclosed_period_seconds",
    ):
        assert found[name] == 0
    assert "watermark_timestamp_seconds" not in found, "1970 would be a lie"


def test_trouble_is_a_one_beside_its_reason() -> None:
    found = scraped(Tally(), {"source_unavailable": "gone", "reload_failed": "bad"})
    assert (found["trouble|source_unavailable"], found["trouble|store_unavailable"]) == (1, 0)
    assert found["trouble|reload_failed"] == 1


def test_the_age_of_an_unclosed_period_counts_from_its_end() -> None:
    end = time.time_ns() - 3_600 * 10**9
    assert 3_600 <= scraped(Tally(period_end_unix_ns=end))["oldest_unclosed_period_seconds"] < 3_660
    ahead = time.time_ns() + 10**12
    assert scraped(Tally(period_end_unix_ns=ahead))["oldest_unclosed_period_seconds"] == 0


@given(st.lists(st.floats(0, 100), max_size=50))
def test_the_histogram_of_inserts_counts_each_once(seconds: list[float]) -> None:
    tally = Tally()
    for one in seconds:
        tally.inserted(one)
    found = scraped(tally)
    assert found["insert_seconds_count"] == found["insert_seconds_bucket|+Inf"] == len(seconds)
    assert found["insert_seconds_bucket|1.0"] == sum(one <= 1.0 for one in seconds)


def test_sources_and_reasons_are_bounded() -> None:
    tally = Tally(source_lag={(f"s{n}", "bytes"): n for n in range(1_000)})
    found = scraped(tally, {f"r{n}": "" for n in range(1_000)})
    assert sum(name.startswith("source_lag|") for name in found) == MAX_SOURCES
    assert sum(name.startswith("trouble|") for name in found) == MAX_TROUBLES + len(TROUBLES)


def test_a_copy_does_not_change_with_what_it_was_made_of() -> None:
    tally = Tally()
    copy = tally.copy()
    tally.verdicts["parked"] = 1
    tally.source_lag["log", "bytes"] = 1
    tally.inserted(1.0)
    assert copy == Tally()
