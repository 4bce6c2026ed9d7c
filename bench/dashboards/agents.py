"""Agents: a fleet, and one host of it."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from bench.dashboards.panels import AGENT, Panels, dashboard, graph, listing, number

A = "weighbridge_agent_"


def agents() -> Dashboard:
    return dashboard(
        "Agents",
        "Is every host metered, and does its usage get away?",
        {"instance": 'up{job="weighbridge-agent"}'},
        ("Now", _now()),
        ("Delivery", _delivery()),
        ("Metering", _metering()),
        ("Kernel probes", _probes()),
        ("The process", _process()),
    )


def _now() -> Panels:
    return (
        number("Agents up", "", "short", f"sum(up{{{AGENT}}})"),
        number("Agents down", "", "short", f"count(up{{{AGENT}}}) - sum(up{{{AGENT}}})", 1),
        number("Not connected", "To any collector.", "short", f"sum(1 - {A}connected{{{AGENT}}})", 1),
        number("Oldest undelivered", "On any host.", "s", f"max({A}spool_oldest_seconds{{{AGENT}}})", 3600),
        number("Fullest spool", "", "percentunit", f"max({A}spool_bytes{{{AGENT}}} / {A}spool_max_bytes{{{AGENT}}})", 0.5),
        number("Quarantined", "Batches that only a person can judge.", "short", f"sum({A}spool_quarantined_batches{{{AGENT}}})", 1),
    )  # fmt: skip


def _delivery() -> Panels:
    return (
        graph("Oldest undelivered usage", "Rises while a host cannot deliver.", "s",
              (f"topk(10, {A}spool_oldest_seconds{{{AGENT}}})", "{{instance}}")),
        graph("Fill of the spool", "Rows become longer from 75 % on.", "percentunit",
              (f"topk(10, {A}spool_bytes{{{AGENT}}} / {A}spool_max_bytes{{{AGENT}}})", "{{instance}}")),
        graph("Answers of collectors", "Batches a second.", "suffix: batches/s",
              (f"sum by (status) (rate({A}answers_total{{{AGENT}}}[$__rate_interval]))", "{{status}}"), stacked=True),
        graph("Sent", "Batches' bytes, repeats included.", "Bps",
              (f"sum(rate({A}sent_bytes_total{{{AGENT}}}[$__rate_interval]))", "all hosts")),
        graph("Streams opened", "Reconnects; many of them mean a bad network, or refusals.", "short",
              (f"topk(10, increase({A}connects_total{{{AGENT}}}[$__rate_interval]))", "{{instance}}")),
        graph("Certificate's life left", "Renewed at one half.", "percentunit",
              (f"bottomk(10, ({A}certificate_expiry_timestamp_seconds{{{AGENT}}} - time()) / {A}certificate_life_seconds{{{AGENT}}})",
               "{{instance}}")),
    )  # fmt: skip


def _metering() -> Panels:
    return (
        graph("Since the last reading", "", "s",
              (f"topk(10, time() - {A}last_reading_timestamp_seconds{{{AGENT}}})", "{{instance}}")),
        graph("Length of a row", "Longer than configured near a full spool.", "s",
              (f"topk(10, {A}row_seconds{{{AGENT}}})", "{{instance}}")),
        graph("Time to meter an interval", "", "s",
              (f"topk(10, {A}interval_seconds{{{AGENT}}})", "{{instance}}")),
        graph("Units", "Containers, services, scopes.", "short",
              (f"topk(10, {A}units{{{AGENT}}})", "{{instance}}")),
        graph("Rows made", "", "suffix: rows/s",
              (f"sum(rate({A}rows_total{{{AGENT}}}[$__rate_interval]))", "rows"),
              (f"sum(rate({A}rows_without_cpu_total{{{AGENT}}}[$__rate_interval]))", "without CPU time")),
        graph("Not as it should be", "Hosts: 0 is well.", "short",
              (f"sum(1 - {A}reading_complete{{{AGENT}}})", "reading incomplete"),
              (f"sum(1 - {A}clock_synchronised{{{AGENT}}})", "clock not synchronised"),
              (f"sum({A}reload_failed{{{AGENT}}})", "bad settings"),
              (f"sum(increase({A}held_intervals_total{{{AGENT}}}[$__rate_interval]))", "intervals not durable")),
    )  # fmt: skip


def _probes() -> Panels:
    return (
        graph("State", "Hosts in each state.", "short",
              (f"count by (state) ({A}probes{{{AGENT}}})", "{{state}}"), stacked=True),
        graph("Fill of the maps", "Entries leave when their usage is durable.", "percentunit",
              (f"topk(10, {A}probe_map_entries{{{AGENT}}} / {A}probe_map_max_entries{{{AGENT}}})", "{{instance}} {{map}}")),
        graph("Lost", "What the kernel side had no room for.", "short",
              (f"sum by (kind) (increase({A}probe_lost_total{{{AGENT}}}[$__rate_interval]))", "{{kind}}")),
        graph("Ends", "Of containers, as the kernel recorded them.", "suffix: ends/s",
              (f"sum(rate({A}ends_total{{{AGENT}}}[$__rate_interval]))", "last rows"),
              (f"sum(rate({A}ends_forgotten_total{{{AGENT}}}[$__rate_interval]))", "forgotten by the kernel")),
        listing("Versions and sources", "", f"count by (version, sources) ({A}build_info{{{AGENT}}})", wide=16),
    )  # fmt: skip


def _process() -> Panels:
    return (
        graph("CPU of the agent", "Cores.", "suffix: cores",
              (f"topk(10, rate(process_cpu_seconds_total{{{AGENT}}}[$__rate_interval]))", "{{instance}}")),
        graph("Memory of the agent", "", "bytes",
              (f"topk(10, process_resident_memory_bytes{{{AGENT}}})", "{{instance}}")),
        graph("Open files", "", "short",
              (f"topk(10, process_open_fds{{{AGENT}}})", "{{instance}}")),
    )  # fmt: skip
