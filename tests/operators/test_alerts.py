"""The alert rules, judged by promtool: each fires when it should, stays silent when it should, and has its runbook."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.operators.alert_cases import CASES, Case
from tests.operators.rules import ROOT, RULES, SCRAPE, alerts

RUNBOOK = ROOT / "docs/runbook.md"


def complaints(*words: str | Path) -> str:
    """What promtool finds wrong; empty if nothing."""
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{done.returncode}: {done.stdout}{done.stderr}"


def sections() -> dict[str, str]:
    """Alert -> text of its section."""
    parts = re.split(r"^### (\S+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    return {name: text.split("\n## ")[0] for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def firing(alert: str, minute: int, count: int) -> dict[str, Any]:
    """How many instances of an alert fire at a minute. `count` of no series is no series."""
    return {
        "eval_time": f"{minute}m",
        "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
        "exp_samples": [{"labels": "{}", "value": count}] if count else [],
    }


def test_promtool_finds_nothing_wrong_with_the_rules_and_the_scrape_example() -> None:
    assert complaints("check", "rules", RULES) == ""
    assert complaints("check", "config", "--syntax-only", SCRAPE) == ""


def test_every_alert_has_a_case() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names)) > 30
    assert {case.alert for case in CASES} == set(names)


def groups(case: Case) -> Iterator[dict[str, Any]]:
    """promtool's test groups of a case: one of the ill, one of the well."""
    ill = [firing(case.alert, case.after, 1)]
    if case.not_yet is not None:
        ill.append(firing(case.alert, case.not_yet, 0))
    for series, judged in ((case.ill, ill), (case.well, [firing(case.alert, case.after, 0)])):
        yield {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": judged,
        }


def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    files = []
    for rule in alerts():
        # By itself: promtool evaluates all of a file each minute of each case.
        alone = tmp_path / f"{rule['alert']}.rules.yaml"
        alone.write_text(yaml.safe_dump({"groups": [{"name": "alone", "rules": [rule]}]}))
        tests = [group for case in CASES if case.alert == rule["alert"] for group in groups(case)]
        files.append(tmp_path / f"{rule['alert']}.yaml")
        files[-1].write_text(
            yaml.safe_dump({"rule_files": [str(alone)], "evaluation_interval": "1m", "tests": tests})
        )
    assert len(files) == len(alerts())
    assert complaints("test", "rules", *files) == ""


def test_every_alert_says_how_bad_it_is_and_names_its_section_of_the_runbook() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["runbook"] == rule["alert"].lower()
        assert "{{" in rule["annotations"]["summary"], "which one?"


def test_the_runbook_has_a_section_for_each_alert_in_their_order_and_no_other() -> None:
    assert list(sections()) == [rule["alert"] for rule in alerts()]


def test_every_section_says_what_it_means_for_the_money_what_to_type_first_and_what_is_safe() -> None:
    for name, text in sections().items():
        points = re.findall(r"^- \*\*(\w+):\*\* (\S.*)", text, re.MULTILINE)
        assert [word for word, _ in points][:3] == ["Money", "First", "Safe"], name
        assert {word for word, _ in points[3:]} <= {"Not"}, name
        assert "`" in points[1][1] or "look at" in points[1][1] or "what do" in points[1][1], name
