"""For each alert: series under which it fires, and series under which it must not. Of `promtool test rules`.

Values are promtool's: one a minute, `1+2x30` counts up by 2, `_` is no sample. `after` is the minute that is judged, from
which on the ill have been ill for longer than the alert's `for`; `not_yet` one at which they have not.
"""

from __future__ import annotations

from typing import NamedTuple

A, C, L = "weighbridge_agent_", "weighbridge_collector_", "weighbridge_ledger_"
AGENT = 'job="weighbridge-agent",instance="a"'
COLLECTOR = 'job="weighbridge-collector",instance="c"'
LEDGER = 'job="weighbridge-ledger",instance="l"'


class Case(NamedTuple):
    alert: str
    ill: dict[str, str]
    well: dict[str, str]
    after: int = 60
    not_yet: int | None = None


def agent(name: str, values: str, **labels: str) -> dict[str, str]:
    return {_series(A + name, AGENT, labels): values}


def collector(name: str, values: str, **labels: str) -> dict[str, str]:
    return {_series(C + name, COLLECTOR, labels): values}


def ledger(name: str, values: str, **labels: str) -> dict[str, str]:
    return {_series(L + name, LEDGER, labels): values}


def _series(name: str, where: str, labels: dict[str, str]) -> str:
    own = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{where},{own}}}" if own else f"{name}{{{where}}}"


def up(job: str, instance: str, values: str) -> dict[str, str]:
    return {f'up{{job="weighbridge-{job}",instance="{instance}"}}': values}


def fleet(down: int, of: int) -> dict[str, str]:
    merged: dict[str, str] = {}
    for n in range(of):
        merged |= up("agent", f"host-{n}", "0x60" if n < down else "1x60")
    return merged


# The Unix time of promtool's minutes begins at 0, so a timestamp of `0+60x60` is that of now.
LOG_GROWS = collector("log_end_bytes", "0+1e8x400") | collector("log_begin_bytes", "0x400")
LOG_RESTS = collector("log_end_bytes", "7x60") | collector("log_begin_bytes", "0x60")

CASES = (
    Case("WeighbridgeAgentDown", up("agent", "a", "1x9 0x60"), up("agent", "a", "1x9 0x8 1x60"), not_yet=18),
    Case("WeighbridgeAgentsDown", fleet(2, 10), fleet(1, 10) | up("collector", "c", "0x60")),
    Case(
        "WeighbridgeNothingScraped",
        up("agent", "a", "1x60"),
        up("agent", "a", "0x60") | up("collector", "c", "0x60"),
    ),
    Case(
        "WeighbridgeMeteringStalled",
        agent("last_reading_timestamp_seconds", "0+60x10 600x50") | agent("row_seconds", "10x60"),
        # A nearly full spool makes long rows: five minutes without a reading are as they should be.
        agent("last_reading_timestamp_seconds", "0+60x55 3300x5") | agent("row_seconds", "300x60"),
        not_yet=12,
    ),
    Case(
        "WeighbridgeUsageNotDurable",
        agent("held_intervals_total", "0x20 1+1x40"),
        agent("held_intervals_total", "7x60"),
        not_yet=23,
    ),
    Case(
        "WeighbridgeSpoolFilling",
        agent("spool_bytes", "600x60") | agent("spool_max_bytes", "1000x60"),
        agent("spool_bytes", "400x60") | agent("spool_max_bytes", "1000x60"),
        not_yet=10,
    ),
    Case(
        "WeighbridgeSpoolNearlyFull",
        agent("spool_bytes", "950x60") | agent("spool_max_bytes", "1000x60"),
        agent("spool_bytes", "850x60") | agent("spool_max_bytes", "1000x60"),
        not_yet=3,
    ),
    Case(
        "WeighbridgeDeliveryLate",
        agent("spool_oldest_seconds", "4000x60"),
        agent("spool_oldest_seconds", "30x60"),
    ),
    Case(
        "WeighbridgeQuarantine",
        agent("spool_quarantined_batches", "1x60"),
        agent("spool_quarantined_batches", "0x60"),
    ),
    Case(
        "WeighbridgeReadingIncomplete", agent("reading_complete", "0x60"), agent("reading_complete", "1x60")
    ),
    Case(
        "WeighbridgeProbesMissing",
        agent("probes", "1x60", state="wrong_layout", walk="none", version=""),
        agent("probes", "1x60", state="attached", walk="css", version="0.1.0")
        | {A + 'probes{job="weighbridge-agent",instance="b",state="off"}': "1x60"},
        not_yet=10,
    ),
    Case(
        "WeighbridgeProbesOverflow",
        agent("probe_lost_total", "0x30 5x30", kind="tombstones"),
        # Rows of the snapshot cost time, not usage.
        agent("probe_lost_total", "0x30 5x30", kind="snapshot_rows"),
    ),
    Case(
        "WeighbridgeProbeMapFilling",
        agent("probe_map_entries", "600x60", map="tombstones")
        | agent("probe_map_max_entries", "1000x60", map="tombstones"),
        agent("probe_map_entries", "600x60", map="tombstones")
        | agent("probe_map_max_entries", "9000x60", map="tombstones"),
    ),
    Case(
        "WeighbridgeAgentCertificateExpiring",
        agent("certificate_expiry_timestamp_seconds", "9000x60")
        | agent("certificate_life_seconds", "86400x60"),
        agent("certificate_expiry_timestamp_seconds", "50000x60")
        | agent("certificate_life_seconds", "86400x60"),
    ),
    Case(
        "WeighbridgeClockUnsynchronised",
        agent("clock_synchronised", "0x60"),
        agent("clock_synchronised", "0x20 1x5 0x60"),
        after=50,
        not_yet=25,
    ),
    Case(
        "WeighbridgeReloadFailed",
        agent("reload_failed", "1x60"),
        agent("reload_failed", "0x60") | collector("reload_failed", "0x60"),
    ),
    Case("WeighbridgeReloadFailed", collector("reload_failed", "1x60"), collector("reload_failed", "0x60")),
    Case("WeighbridgeReloadFailed", ledger("reload_failed", "1x60"), ledger("reload_failed", "0x60")),
    Case(
        "WeighbridgeRestarting",
        {f"process_start_time_seconds{{{AGENT}}}": "1+60x60"},
        {
            f"process_start_time_seconds{{{AGENT}}}": "1x40 2400x20",
            'process_start_time_seconds{job="another",instance="a"}': "1+60x60",
        },
    ),
    Case(
        "WeighbridgeCollectorDown", up("collector", "c", "1x9 0x60"), up("collector", "c", "1x60"), not_yet=11
    ),
    Case(
        "WeighbridgeLogUnavailable",
        collector("failed_commits_total", "0x10 1+1x50"),
        collector("failed_commits_total", "9x60"),
    ),
    Case(
        # 100 MB a minute: 20 GB last three hours, 2 TB two weeks.
        "WeighbridgeLogDiskFilling",
        collector("log_free_bytes", "2e10x400") | LOG_GROWS,
        collector("log_free_bytes", "2e12x400") | LOG_GROWS,
        after=390,
    ),
    Case(
        # What is pruned at its beginning as fast fills nothing.
        "WeighbridgeLogDiskFilling",
        collector("log_free_bytes", "2e10x400") | LOG_GROWS,
        collector("log_free_bytes", "2e10x400") | LOG_GROWS | collector("log_begin_bytes", "0+1e8x400"),
        after=390,
    ),
    Case(
        "WeighbridgeLogDiskFilling",
        collector("log_free_bytes", "-5e8x60") | LOG_RESTS,
        collector("log_free_bytes", "5e9x60") | LOG_RESTS,
    ),
    Case(
        "WeighbridgeRetries",
        collector("answers_total", "0+60x60", status="accepted")
        | collector("answers_total", "0+60x60", status="retry"),
        collector("answers_total", "0+60x60", status="accepted")
        | collector("answers_total", "0+6x60", status="retry"),
        not_yet=8,
    ),
    Case(
        "WeighbridgeRejected",
        collector("answers_total", "0x30 1x30", status="rejected"),
        collector("answers_total", "0+9x60", status="accepted")
        | collector("answers_total", "3x60", status="rejected"),
    ),
    Case(
        "WeighbridgeIdentityConflict",
        collector("refusals_total", "0x30 1x30", code="METER-006", reason="identity_conflict"),
        collector("refusals_total", "0x30 1x30", code="METER-005", reason="chain_broken"),
    ),
    Case(
        "WeighbridgeGap",
        collector("gaps_total", "0x30 1x30", reason="reboot"),
        collector("gaps_total", "4x60", reason="reboot"),
    ),
    Case(
        "WeighbridgeStreamsAdopted",
        collector("adopted_streams_total", "0x30 2x30"),
        collector("adopted_streams_total", "2x60"),
    ),
    Case(
        "WeighbridgeAgentsSilent",
        collector("open_streams", "100x90 80x60"),
        collector("open_streams", "100x90 95x60"),
        after=110,
    ),
    Case(
        "WeighbridgeNotAuthorised",
        collector("refusals_total", "0+2x60", code="METER-003", reason="not_authenticated"),
        # One agent that tries again every few minutes is of that agent's own alert.
        collector("refusals_total", "0x9 1x9 2x9 3x9 4x9 5x60", code="METER-003", reason="not_authenticated"),
    ),
    Case(
        "WeighbridgeOverloaded",
        collector("refusals_total", "0+1x60", code="METER-002", reason="overloaded"),
        collector("refusals_total", "0+1x60", code="METER-002", reason="park_full"),
        not_yet=5,
    ),
    Case(
        "WeighbridgeSlow",
        collector("answer_seconds_bucket", "0x60", le="1.0")
        | collector("answer_seconds_bucket", "0+10x60", le="5.0")
        | collector("answer_seconds_bucket", "0+10x60", le="+Inf"),
        collector("answer_seconds_bucket", "0+10x60", le="1.0")
        | collector("answer_seconds_bucket", "0+10x60", le="5.0")
        | collector("answer_seconds_bucket", "0+10x60", le="+Inf"),
    ),
    Case(
        "WeighbridgeParkedOld",
        collector("tenant_parked_oldest_seconds", "4000x60", tenant="acme"),
        collector("tenant_parked_oldest_seconds", "60x60", tenant="acme"),
    ),
    Case(
        "WeighbridgeParkedGrowing",
        collector("tenant_parked_debt_tokens", "0+5x120", tenant="acme"),
        collector("tenant_parked_debt_tokens", "900-5x120", tenant="acme"),
        after=110,
        not_yet=40,
    ),
    Case(
        "WeighbridgeParkFull",
        collector("refusals_total", "0+1x60", code="METER-002", reason="park_full"),
        collector("refusals_total", "0+1x60", code="METER-002", reason="overloaded"),
    ),
    Case(
        "WeighbridgeParkedUnreadable",
        collector("unreadable_parked_batches_total", "0x30 1x30"),
        collector("unreadable_parked_batches_total", "0x60"),
    ),
    Case("WeighbridgeMemoryShort", collector("memory_short", "1x60"), collector("memory_short", "1x58 0x9")),
    Case("WeighbridgeKafkaAway", collector("kafka_away", "1x60"), collector("kafka_away", "1x58 0x9")),
    Case(
        "WeighbridgeSharedBucketsAway",
        collector("shared_buckets_away", "1x60"),
        collector("shared_buckets_away", "0x60"),
        not_yet=3,
    ),
    Case(
        "WeighbridgeSharedStreamsAway",
        collector("shared_streams_away", "1x60"),
        collector("shared_streams_away", "0x60"),
        not_yet=3,
    ),
    Case(
        "WeighbridgeCollectorCertificateExpiring",
        collector("server_certificate_expiry_timestamp_seconds", "1000000x80"),
        collector("server_certificate_expiry_timestamp_seconds", "4000000x80")
        | collector("ca_certificate_expiry_timestamp_seconds", "300000000x80"),
        after=75,
    ),
    Case(
        "WeighbridgeCollectorCertificateExpiring",
        collector("ca_certificate_expiry_timestamp_seconds", "7000000x80"),
        collector("ca_certificate_expiry_timestamp_seconds", "8000000x80"),
        after=75,
    ),
    Case(
        "WeighbridgeWebhookLosing",
        collector("webhook_lost_notices", "0+1x60") | collector("webhook_failures", "0x60"),
        collector("webhook_lost_notices", "4x60") | collector("webhook_failures", "0x50 1x9"),
    ),
    Case(
        "WeighbridgeWebhookLosing",
        collector("webhook_failures", "0+2x60"),
        collector("webhook_failures", "2x60"),
    ),
    Case("WeighbridgeLedgerDown", up("ledger", "l", "1x9 0x60"), up("ledger", "l", "1x60"), not_yet=18),
    Case(
        "WeighbridgeLedgerTrouble",
        ledger("trouble", "1x60", reason="store_unavailable"),
        # That has an alert of its own.
        ledger("trouble", "1x60", reason="reload_failed")
        | ledger("trouble", "0x60", reason="store_unavailable"),
        not_yet=10,
    ),
    Case(
        "WeighbridgeLedgerBehind",
        ledger("watermark_timestamp_seconds", "0x100"),
        ledger("watermark_timestamp_seconds", "0+60x100"),
        after=90,
        not_yet=65,
    ),
    Case(
        "WeighbridgeLedgerAgentsSilent",
        ledger("silent_agents", "1x80"),
        ledger("silent_agents", "1x50 0x30"),
        after=70,
        not_yet=50,
    ),
    Case(
        "WeighbridgeLedgerMissing",
        ledger("missing_batches", "3x80"),
        # What comes out of order is there a little later.
        ledger("missing_batches", "3x40 0x1 3x40"),
        after=70,
        not_yet=50,
    ),
    Case("WeighbridgeLedgerLost", ledger("lost_positions", "0x30 9x30"), ledger("lost_positions", "0x60")),
    Case(
        "WeighbridgeLedgerConflict",
        ledger("conflicts_total", "0x30 1x30"),
        ledger("conflicts_total", "1x60") | ledger("duplicates_total", "0+5x60"),
    ),
    Case(
        "WeighbridgeLedgerSlow",
        ledger("insert_seconds_bucket", "0x60", le="5.0")
        | ledger("insert_seconds_bucket", "0+10x60", le="10.0")
        | ledger("insert_seconds_bucket", "0+10x60", le="+Inf"),
        ledger("insert_seconds_bucket", "0+10x60", le="5.0")
        | ledger("insert_seconds_bucket", "0+10x60", le="10.0")
        | ledger("insert_seconds_bucket", "0+10x60", le="+Inf"),
    ),
    Case(
        "WeighbridgeLedgerSumsBehind",
        ledger("rollup_dirty_hours", "700x200"),
        ledger("rollup_dirty_hours", "700-10x200"),
        after=190,
        not_yet=100,
    ),
    Case(
        "WeighbridgeLedgerDifference",
        ledger("reconcile_differences", "0x30 1x30"),
        ledger("reconcile_differences", "1x30 0x30"),
    ),
    Case(
        "WeighbridgeLedgerSumsWrong",
        ledger("conservation_difference_ns", "-1x60"),
        ledger("conservation_difference_ns", "0x60"),
    ),
    Case(
        "WeighbridgeLedgerNotReconciled",
        ledger("reconcile_success_timestamp_seconds", "0x3000"),
        ledger("reconcile_success_timestamp_seconds", "0x2000 120000x1000"),
        after=2_960,
        not_yet=2_890,
    ),
    Case(
        "WeighbridgeLedgerPeriodOpen",
        ledger("oldest_unclosed_period_seconds", "200000+60x2000"),
        ledger("oldest_unclosed_period_seconds", "60+60x2000"),
        after=1_100,
        not_yet=970,
    ),
)
