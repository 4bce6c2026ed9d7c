"""The collector: what comes in, what is refused, and whether the disk and those behind it keep up."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from bench.dashboards.panels import COLLECTOR, Panels, dashboard, graph, number

C = "weighbridge_collector_"


def collector() -> Dashboard:
    return dashboard(
        "Collector",
        "What comes in, what is refused, and whether disk, Kafka and Redis keep up.",
        {"instance": 'up{job="weighbridge-collector"}'},
        ("Now", _now()),
        ("Door", _door()),
        ("Durable log", _log()),
        ("Behind it", _behind()),
        ("The process", _process()),
    )


def _now() -> Panels:
    return (
        number("Agents connected", "", "short", f"sum({C}open_streams{{{COLLECTOR}}})"),
        number("Rejected in a day", "Not in the books.", "short",
               f'sum(increase({C}answers_total{{{COLLECTOR},status="rejected"}}[1d]))', 1),
        number("Conflicts in a day", "METER-006.", "short",
               f'sum(increase({C}refusals_total{{{COLLECTOR},code="METER-006"}}[1d]))', 1),
        number("Waiting", "Bytes parked, over all tenants.", "bytes", f"sum({C}tenant_parked_bytes{{{COLLECTOR}}}) or vector(0)"),
        number("Kafka away", "", "short", f"sum({C}kafka_away{{{COLLECTOR}}})", 1),
        number("Redis away", "", "short", f"sum({C}shared_buckets_away{{{COLLECTOR}}})", 1),
    )  # fmt: skip


def _door() -> Panels:
    return (
        graph("Answers", "Batches a second.", "suffix: batches/s",
              (f"sum by (status) (rate({C}answers_total{{{COLLECTOR}}}[$__rate_interval]))", "{{status}}"), stacked=True),
        graph("Refusals", "By code and reason.", "suffix: /s",
              (f"sum by (code, reason) (rate({C}refusals_total{{{COLLECTOR}}}[$__rate_interval])) > 0", "{{code}} {{reason}}")),
        graph("From arrival to answer", "METER-004 above 2 s.", "s",
              *((f"histogram_quantile({q}, sum by (le) (rate({C}answer_seconds_bucket{{{COLLECTOR}}}[$__rate_interval])))",
                 f"{q:.0%}") for q in (0.5, 0.9, 0.99))),
        graph("Agents connected", "", "short", (f"{C}open_streams{{{COLLECTOR}}}", "{{instance}}")),
        graph("Streams", "Opened, broken, adopted.", "suffix: /s",
              *((f"sum(rate({C}{name}_total{{{COLLECTOR}}}[$__rate_interval]))", name.replace("_", " "))
                for name in ("connections", "broken_streams", "adopted_streams"))),
        graph("Received", "", "Bps", (f"sum(rate({C}received_bytes_total{{{COLLECTOR}}}[$__rate_interval]))", "batches")),
    )  # fmt: skip


def _growth(window: str) -> str:
    """Bytes a second that the log takes up more: what comes behind its end without what goes from its beginning."""
    return f"deriv({C}log_end_bytes{{{COLLECTOR}}}[{window}]) - deriv({C}log_begin_bytes{{{COLLECTOR}}}[{window}])"


def _log() -> Panels:
    return (
        graph("Left on its disk", "At zero agents are told RETRY, METER-001.", "bytes",
              (f"{C}log_free_bytes{{{COLLECTOR}}}", "{{instance}}")),
        graph("Growth", "", "Bps", (_growth("1h"), "{{instance}}")),
        graph("Full in", "As it grew in the last six hours.", "s",
              (f"{C}log_free_bytes{{{COLLECTOR}}} / (({_growth('6h')}) > 0)", "{{instance}}")),
        graph("Groups made durable", "", "suffix: /s",
              (f"sum(rate({C}commits_total{{{COLLECTOR}}}[$__rate_interval]))", "durable"),
              (f"sum(rate({C}failed_commits_total{{{COLLECTOR}}}[$__rate_interval]))", "refused by the disk")),
        graph("Waiting for the disk", "", "bytes", (f"{C}log_queued_bytes{{{COLLECTOR}}}", "{{instance}}")),
        graph("Certificates end in", "The collector's is renewed 45 days before.", "s",
              *((f"{C}{name}_certificate_expiry_timestamp_seconds{{{COLLECTOR}}} - time()", f"{{{{instance}}}} {name}")
                for name in ("server", "ca"))),
    )  # fmt: skip


def _behind() -> Panels:
    return (
        graph("Kafka: not confirmed", "", "bytes", (f"{C}kafka_unconfirmed_bytes{{{COLLECTOR}}}", "{{instance}}")),
        graph("Kafka: confirmed", "", "suffix: batches/s",
              (f"rate({C}kafka_published_batches{{{COLLECTOR}}}[$__rate_interval])", "{{instance}}"),
              (f"rate({C}kafka_broken_sessions{{{COLLECTOR}}}[$__rate_interval])", "{{instance}} broken sessions")),
        graph("Redis: settlements", "With the other collectors.", "suffix: /s",
              (f"rate({C}shared_settlements{{{COLLECTOR}}}[$__rate_interval])", "{{instance}}"),
              (f"rate({C}shared_failures{{{COLLECTOR}}}[$__rate_interval])", "{{instance}} not answered")),
        graph("Redis: not settled", "Tokens no other collector knows of.", "suffix: tokens",
              (f"{C}unsettled_tokens{{{COLLECTOR}}}", "{{instance}}")),
        graph("Released", "Parked batches handed on.", "suffix: batches/s",
              (f"sum(rate({C}released_batches_total{{{COLLECTOR}}}[$__rate_interval]))", "released"),
              (f"sum(rate({C}unreadable_parked_batches_total{{{COLLECTOR}}}[$__rate_interval]))", "unreadable")),
        graph("Webhook", "Notices.", "short",
              *((f"sum({C}webhook_{name}{{{COLLECTOR}}})", name.replace("_", " "))
                for name in ("waiting_notices", "lost_notices", "failures"))),
    )  # fmt: skip


def _process() -> Panels:
    return (
        graph("CPU", "", "suffix: cores", (f"rate(process_cpu_seconds_total{{{COLLECTOR}}}[$__rate_interval])", "{{instance}}")),
        graph("Memory", "", "bytes", (f"process_resident_memory_bytes{{{COLLECTOR}}}", "{{instance}}")),
        graph("Open files", "", "short",
              (f"process_open_fds{{{COLLECTOR}}}", "{{instance}}"), (f"process_max_fds{{{COLLECTOR}}}", "{{instance}} bound")),
    )  # fmt: skip
