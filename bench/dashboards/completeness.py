"""Completeness: what was not measured, has not arrived, was not let in, or is not in the books."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import Panel

from bench.dashboards.panels import Panels, dashboard, graph, listing, note, number

AGENT = 'job="weighbridge-agent"'
COLLECTOR = 'job="weighbridge-collector"'
LEDGER = 'job="weighbridge-ledger"'
A, C, L = "weighbridge_agent_", "weighbridge_collector_", "weighbridge_ledger_"


def completeness() -> Dashboard:
    return dashboard(
        "Completeness",
        "What was not measured, has not arrived, was not let in, or is not in the books.",
        {},
        ("Read this first", (_first(),)),
        ("Now", _now()),
        ("Is it in the books?", _booked()),
        ("Has it arrived?", _arrived()),
        ("Was it measured?", _measured()),
        ("Was it let in?", _let_in()),
    )


def _first() -> Builder[Panel]:
    return note(
        "",
        "A ledger proves that a period is complete: up to its watermark nothing of any known agent is missing. The rows below it"
        " show what agents and collectors know: gaps they recorded, what their sources could not see, and whether each stream's"
        " numbers go on without a hole. **Hosts that are not scraped are not in those, and agents that never reported are in"
        " none.** Without a ledger its row is empty.",
    )


def _now() -> Panels:
    return (
        number("All has left the hosts up to", "The end of the oldest usage that still waits on a host.", "dateTimeFromNow",
               f"(time() - max({A}spool_oldest_seconds{{{AGENT}}})) * 1000"),
        number("Hosts not heard of", "Down, or disconnected: their usage is still to come.", "short",
               f"count(up{{{AGENT}}} == 0 or {A}connected{{{AGENT}}} == 0) or vector(0)", 1),
        number("Gaps in a day", "Records of what was not measured.", "short", f"sum(increase({C}gaps_total{{{COLLECTOR}}}[1d]))", 1),
        number("Rejected in a day", "", "short", f'sum(increase({C}answers_total{{{COLLECTOR},status="rejected"}}[1d]))', 1),
        number("Streams with a hole", "Went on beyond what a collector knew, in a day.", "short",
               f"sum(increase({C}adopted_streams_total{{{COLLECTOR}}}[1d]))", 1),
        number("In quarantine", "Batches no collector has, on hosts.", "short", f"sum({A}spool_quarantined_batches{{{AGENT}}})", 1),
    )  # fmt: skip


def _booked() -> Panels:
    return (
        number("Complete up to", "The ledger's watermark.", "dateTimeFromNow",
               f"min({L}watermark_timestamp_seconds{{{LEDGER}}}) * 1000"),
        number("Missing batches", "Numbered by an agent, and not here.", "short", f"sum({L}missing_batches{{{LEDGER}}})", 1),
        number("Blockers", "Of the oldest period that has ended.", "short", f"sum({L}open_blockers{{{LEDGER}}})", 1),
        number("Oldest unclosed period", "Ended so long ago.", "s", f"max({L}oldest_unclosed_period_seconds{{{LEDGER}}})"),
        number("Differences", "Batches at one hop and not at the next.", "short",
               f"sum({L}reconcile_differences{{{LEDGER}}})", 1),
        number("Sums differ by", "From raw usage, in CPU time.", "ns", f"sum(abs({L}conservation_difference_ns{{{LEDGER}}}))", 1),
        graph("Booked", "", "suffix: rows/s", (f"sum(rate({L}booked_rows_total{{{LEDGER}}}[$__rate_interval]))", "rows")),
        graph("Not read yet", "Of the log in bytes, of Kafka in records.", "short",
              (f"{L}source_lag{{{LEDGER}}}", "{{source}} {{unit}}")),
        graph("Here and not booked", "", "short",
              (f"sum({L}parked_batches{{{LEDGER}}})", "parked"),
              (f"sum({L}rejected_batches{{{LEDGER}}})", "rejected")),
        graph("Agents", "", "short",
              (f"sum({L}agents{{{LEDGER}}})", "known"), (f"sum({L}silent_agents{{{LEDGER}}})", "silent")),
        graph("Arrived twice, or as somebody else", "Duplicates change nothing; conflicts are METER-006.", "short",
              (f"sum(increase({L}duplicates_total{{{LEDGER}}}[$__rate_interval]))", "duplicates"),
              (f"sum(increase({L}conflicts_total{{{LEDGER}}}[$__rate_interval]))", "conflicts")),
        graph("Hours to be added up", "", "short", (f"sum({L}rollup_dirty_hours{{{LEDGER}}})", "hours")),
    )  # fmt: skip


def _arrived() -> Panels:
    return (
        graph("Oldest usage that waits on a host", "", "s", (f"topk(10, {A}spool_oldest_seconds{{{AGENT}}})", "{{instance}}")),
        graph("Batches that wait", "", "short",
              (f"sum({A}spool_batches{{{AGENT}}})", "on hosts"),
              (f"sum({A}in_flight_batches{{{AGENT}}})", "sent, not answered"),
              (f"sum({C}tenant_parked_batches{{{COLLECTOR}}}) or vector(0)", "parked")),
        graph("Rows made and delivered", "The two lines are one when all is well.", "suffix: rows/s",
              (f"sum(rate({A}rows_total{{{AGENT}}}[$__rate_interval]))", "made"),
              (f"sum(rate({A}delivered_rows_total{{{AGENT}}}[$__rate_interval]))", "answered for")),
        graph("Not confirmed by Kafka", "", "bytes", (f"sum({C}kafka_unconfirmed_bytes{{{COLLECTOR}}})", "bytes of the log")),
        graph("Streams", "One per agent and epoch. A step is a new host, or a spool that was lost.", "short",
              (f"sum({C}streams{{{COLLECTOR}}})", "known")),
        graph("Streams that went on beyond what was known", "With one collector: its log lacks batches.", "short",
              (f"sum(increase({C}adopted_streams_total{{{COLLECTOR}}}[$__rate_interval]))", "adopted")),
    )  # fmt: skip


def _measured() -> Panels:
    return (
        graph("Gaps", "By reason.", "short",
              (f"sum by (reason) (increase({C}gaps_total{{{COLLECTOR}}}[$__rate_interval]))", "{{reason}}"), stacked=True),
        graph("Gaps, as agents made them", "", "short",
              (f"topk(10, increase({A}gaps_total{{{AGENT}}}[$__rate_interval]))", "{{instance}}")),
        graph("Coverage", "Share of hosts.", "percentunit",
              (f'count({A}probes{{{AGENT},state="attached"}}) / count({A}probes{{{AGENT}}}) or vector(0)', "ends and traffic seen"),
              (f"avg({A}reading_complete{{{AGENT}}})", "all cgroups read"),
              (f"avg({A}clock_synchronised{{{AGENT}}})", "clock synchronised")),
        graph("Rows without CPU time", "", "suffix: rows/s",
              (f"sum(rate({A}rows_without_cpu_total{{{AGENT}}}[$__rate_interval]))", "rows")),
        graph("Kernel side had no room for", "", "short",
              (f'sum by (kind) (increase({A}probe_lost_total{{{AGENT},kind=~"births|tombstones|network_skbs"}}[$__rate_interval]))',
               "{{kind}}")),
        listing("Kernel probes by host", "", f"{A}probes{{{AGENT}}}", wide=8),
    )  # fmt: skip


def _let_in() -> Panels:
    return (
        graph("Rejected", "By reason; in the log, not in the books.", "short",
              (f"sum by (reason) (increase({A}rejected_total{{{AGENT}}}[$__rate_interval]))", "{{reason}}"), wide=12, stacked=True),
        graph("Conflicts", "METER-006.", "short",
              (f'sum(increase({C}refusals_total{{{COLLECTOR},code="METER-006"}}[$__rate_interval]))', "refused"), wide=12),
    )  # fmt: skip
