"""Prometheus scrapes a real agent, a real collector and a ledger (its core a fake): rules and panels find what they ask for.

The site lives through what the alerts are about, so that a metric, a label or a value that is renamed leaves a query with
nothing to find.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import grpc
import pytest

from bench.cgroups import burner, slice_of_our_own
from bench.dashboards.__main__ import files
from bench.fleet import SimulatedAgent, Stream, key_and_request
from bench.probe_set import loaded
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.ledger.process import LedgerProcess
from tests.operators.prometheus import Prometheus, grouping_labels, selectors
from tests.operators.rules import DASHBOARDS, alerts
from tests.waiting import until
from wire.identity import new_agent_id
from wire.statuses import REASONS, REJECTIONS, label, meter_code
from wire.tls import client_credentials
from wire.v1 import ingest_pb2, usage_pb2

pytestmark = pytest.mark.root

VARIABLES = {"$__rate_interval": "5m", "$instance": ".*", "$tenant": ".*"}
SCRAPE_LABELS = {"job", "instance"}
TENANTS = ["acme", "small", "full", "unattributed"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A site with its troubles, and who watches it."""
    directory = tmp_path_factory.mktemp("watched")
    slow = {"rate": 0.001, "burst": 62}
    plans = {"small": slow, "full": {**slow, "park_batches": 1}}
    with (
        loaded(directory) as probes,
        slice_of_our_own("weighbridge-test") as ours,
        Site(directory / "site") as site,
        LedgerProcess(directory / "ledger") as ledger,
    ):
        site.prepare(
            agent={"owners": {"host": "acme"}, "read": {"probes_dir": str(probes.directory)}},
            collector={"validation": {"tenants": TENANTS}, "admission": {"tenants": plans}},
        )
        site.start_collector()
        site.enroll()
        site.start_agent()
        site.wait_metering()
        ports = {
            "weighbridge-agent": int(site.ask("agent", "status")["local_port"]),
            "weighbridge-collector": site.ports["local"],
            "weighbridge-ledger": ledger.port,
        }
        process = ours.child("busy.scope").run(burner(0.1))
        try:
            with Prometheus(directory / "prometheus", ports) as prometheus:
                until(prometheus.ready)
                # Counters are seen at zero first, as they would be.
                time.sleep(3.0)
                trouble(Door(site, CertificateAuthority(site.directory / "collector" / "ca")))
                until(
                    lambda: prometheus.query('weighbridge_collector_refusals_total{reason="park_full"} > 0')
                )
                time.sleep(6.0)
                yield prometheus
        finally:
            process.kill()
            process.wait()


def trouble(door: Door) -> None:
    """A gap, a rejection, a conflict, two tenants over their rate, a stream taken up midway, a stranger."""
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    with_gap = stream.message()
    with_gap.gaps.add(start_unix_ns=1, end_unix_ns=2, reason=usage_pb2.GAP_REASON_REBOOT)
    unknown = Stream(agent.agent_id, 2, tenant="nobody")
    first = stream.seal(with_gap)
    assert statuses(door.deliver(agent, stream, [first])) == ["ACCEPTED"]
    assert statuses(door.deliver(agent, unknown, [unknown.next()])) == ["REJECTED"]
    other = Stream(agent.agent_id, 1).next()
    assert statuses(door.deliver(agent, stream, [other])) == ["REJECTED"]
    for tenant in ("small", "full"):
        over = Stream(agent.agent_id, 3 + (tenant == "full"), tenant=tenant, rows=900)
        answers = statuses(door.deliver(agent, over, [over.next() for _ in range(12)]))
        assert "PARKED" in answers
        assert ("RETRY" in answers) == (tenant == "full")
    midway = Stream(agent.agent_id, 9, seq=700)
    door.deliver(agent, midway, [midway.next()], oldest_seq=701)
    stranger(door)


def stranger(door: Door) -> None:
    """A certificate of the right CA for somebody who is not enrolled."""
    key, request = key_and_request()
    agent_id = new_agent_id()
    certificate = door.authority.issue_agent(request, agent_id, timedelta(hours=1))
    credentials = client_credentials(door.authority.ca_pem, certificate, key)
    unknown = SimulatedAgent(agent_id, credentials, certificate, key)
    with pytest.raises(grpc.RpcError):
        door.deliver(unknown, Stream(agent_id, 1), [ingest_pb2.Item()])


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def queries() -> list[tuple[str, str, str]]:
    """(where, expression without variables, legend) of every panel."""
    found = []
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"]
                for variable, value in VARIABLES.items():
                    expression = expression.replace(variable, value)
                found.append((f"{name}: {panel['title']}", expression, target["legendFormat"]))
    return found


def expressions() -> list[tuple[str, str]]:
    rules = [(rule["alert"], rule["expr"]) for rule in alerts()]
    return [*rules, *((where, expression) for where, expression, _ in queries())]


def test_every_series_that_a_rule_or_a_panel_names_is_there(watched: Prometheus) -> None:
    named = {(where, selector) for where, expression in expressions() for selector in selectors(expression)}
    assert len({selector.name for _, selector in named}) > 60
    for where, selector in sorted(named):
        assert watched.series(selector.found_by()), f"{where}: nothing is {selector.found_by()}"
        labels = {label for one in watched.series(selector.name) for label in one}
        assert {label for label, _, _ in selector.matchers} <= labels, f"{where}: {selector}"


def test_every_label_that_a_rule_or_a_panel_groups_by_is_one_of_its_series(watched: Prometheus) -> None:
    for where, expression in expressions():
        names = {selector.name for selector in selectors(expression)}
        assert names, f"{where}: {expression}"
        labels = {label for name in names for one in watched.series(name) for label in one}
        assert grouping_labels(expression) <= labels, f"{where}: {expression}"


def test_every_panel_has_something_to_show(watched: Prometheus) -> None:
    assert len(queries()) > 80
    for where, expression, legend in queries():
        found = watched.query(expression)
        assert found, f"{where}: nothing for {expression}"
        for wanted in re.findall(r"{{(\w+)}}", legend):
            assert all(wanted in one["metric"] for one in found), (
                f"{where}: no {wanted} in {found[0]['metric']}"
            )


def test_every_variable_of_a_dashboard_has_values_to_choose_from(watched: Prometheus) -> None:
    for name, dashboard in dashboards().items():
        for variable in dashboard["templating"].get("list", ()):
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
                assert match is not None
                assert all(match[2] in one for one in watched.series(match[1])), name
                assert watched.series(match[1]), name


def test_every_reason_is_counted_from_zero_so_that_an_increase_sees_the_first(watched: Prometheus) -> None:
    def values(name: str, of: str) -> set[str]:
        return {one[of] for one in watched.series(name)}

    with_code = {label(reason) for reason in REASONS if meter_code(reason) is not None}
    assert with_code <= values("weighbridge_collector_refusals_total", "reason")
    assert {label(reason) for reason in REJECTIONS} <= values("weighbridge_agent_rejected_total", "reason")
    gaps = {
        name.removeprefix("GAP_REASON_").lower() for name, number in usage_pb2.GapReason.items() if number
    }
    assert gaps <= values("weighbridge_collector_gaps_total", "reason")


def test_every_rule_is_evaluated_and_what_fires_says_where(watched: Prometheus) -> None:
    def evaluated() -> list[dict[str, Any]]:
        rules = [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    rules = until(evaluated)
    assert len(rules) == len(alerts())
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    firing = {
        alert["labels"]["alertname"]: alert
        for alert in watched.ask("alerts")["alerts"]
        if alert["state"] == "firing"
    }
    happened = {
        "WeighbridgeRejected",
        "WeighbridgeIdentityConflict",
        "WeighbridgeGap",
        "WeighbridgeStreamsAdopted",
    }
    assert happened <= firing.keys()
    for name, alert in firing.items():
        assert "127.0.0.1:" in alert["annotations"]["summary"], name
        assert "{{" not in alert["annotations"]["summary"], name
        assert "error" not in alert["annotations"]["summary"], name


def test_the_dashboards_are_what_the_code_makes() -> None:
    assert {path.name: path.read_text() for path in DASHBOARDS.iterdir()} == files(), (
        "python -m bench.dashboards"
    )


def test_no_panel_stands_twice_and_each_has_a_unit() -> None:
    seen: dict[str, str] = {}
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            if panel["type"] in ("row", "text"):
                continue
            where = f"{name}: {panel['title']}"
            key = json.dumps([panel["type"], [target["expr"] for target in panel["targets"]]])
            assert key not in seen, f"{where} and {seen[key]}"
            seen[key] = where
            assert panel["fieldConfig"]["defaults"]["unit"], where
    assert len({dashboard["uid"] for dashboard in dashboards().values()}) == len(dashboards()) == 4
