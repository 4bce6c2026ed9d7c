"""Tenants: what each uses, and what of it waits."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import Panel

from bench.dashboards.panels import Panels, dashboard, graph, note

CHOSEN = 'tenant=~"$tenant"'
C = "weighbridge_collector_tenant_"
T = "weighbridge_tenant_"


def tenant_usage() -> Dashboard:
    return dashboard(
        "Tenant usage",
        "Who uses what. A picture, not a bill.",
        {"tenant": f"{C}rows_total"},
        ("Read this first", (_first(),)),
        ("As metered on the hosts", _metered()),
        ("As accepted by the collector", _accepted()),
        ("Waiting", _waiting()),
    )


def _first() -> Builder[Panel]:
    return note(
        "",
        "Counters of running processes: they begin at zero with each start, hosts that are not scraped are not in them, and beyond"
        " 1,000 tenants the rest is `_other`. **What bills is the record.** Parked usage appears when it is released.",
    )


def _rate(name: str) -> str:
    return f"sum by (tenant) (rate({T}{name}_total{{{CHOSEN}}}[$__rate_interval]))"


def _metered() -> Panels:
    return (
        graph("CPU", "", "suffix: cores", (_rate("cpu_usage_seconds"), "{{tenant}}"), stacked=True),
        graph("Memory", "Mean over the interval: byte-seconds a second.", "bytes",
              (_rate("memory_byte_seconds"), "{{tenant}}"), stacked=True),
        graph("Throttled", "Seconds a second in which a CPU limit held it back.", "percentunit",
              (_rate("cpu_throttled_seconds"), "{{tenant}}")),
        graph("Read from block devices", "", "Bps", (_rate("io_read_bytes"), "{{tenant}}"), stacked=True),
        graph("Written to block devices", "", "Bps", (_rate("io_written_bytes"), "{{tenant}}"), stacked=True),
        graph("Killed for memory", "", "short",
              (f"sum by (tenant) (increase({T}oom_kills_total{{{CHOSEN}}}[$__rate_interval]))", "{{tenant}}")),
    )  # fmt: skip


def _accepted() -> Panels:
    return tuple(
        graph(title, "", unit, (f"sum by (tenant) (rate({C}{name}_total{{{CHOSEN}}}[$__rate_interval]))", "{{tenant}}"), stacked=True)
        for title, unit, name in (
            ("CPU, accepted", "suffix: cores", "cpu_usage_seconds"),
            ("Rows", "suffix: rows/s", "rows"),
            ("Batches", "suffix: batches/s", "batches"),
        )
    )  # fmt: skip


def _waiting() -> Panels:
    return tuple(
        graph(title, about, unit, (f"{how} by (tenant) ({C}parked_{name}{{{CHOSEN}}})", "{{tenant}}"), wide=6)
        for title, about, unit, how, name in (
            ("Oldest", "How late its record is.", "s", "max", "oldest_seconds"),
            ("Debt", "What must come in before all is released.", "suffix: tokens", "sum", "debt_tokens"),
            ("Batches that wait", "", "short", "sum", "batches"),
            ("Bytes that wait", "", "bytes", "sum", "bytes"),
        )
    )
