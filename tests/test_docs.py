"""The documentation against the code: what an operator will meet is documented, and nothing else is."""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

import agent.cli
import agent.config
import agent.daemon
import collector.cli
import collector.config
import collector.server
import ledger.cli
import ledger.config
import ledger.server
from agent.meter.memory import MemoryTrack
from agent.meter.usage import begin, step
from bench.site import Site
from ledger.tally import TROUBLES
from tests.agent.readings import CADENCE, SECOND, reading, root, snapshot
from tests.ledger.process import LedgerProcess
from wire.measures import MEASURES
from wire.statuses import Meter
from wire.v1 import ingest_pb2, usage_pb2

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs/operator-guide.md"
BILLED = ROOT / "docs/what-is-billed.md"
MEBIBYTE = 1 << 20


def code_words(page: Path) -> set[str]:
    """Every word of a page's inline code."""
    return {
        word for code in re.findall(r"`([^`\n]+)`", page.read_text()) for word in re.findall(r"[\w.]+", code)
    }


def tables(page: Path, heading: str) -> list[list[list[str]]]:
    """The tables of one section, as cells without their backticks; the line of dashes is left out."""
    section = re.split(rf"^#+ {re.escape(heading)}$", page.read_text(), flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    return [
        [
            [cell.strip().strip("`*") for cell in line.strip("|").split("|")]
            for line in block.splitlines()
            if not line.startswith("|---")
        ]
        for block in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """Names of the samples and families that a running agent, collector and ledger export."""
    directory = tmp_path_factory.mktemp("docs")
    with Site(directory / "site") as site, LedgerProcess(directory / "ledger") as books:
        site.prepare(agent={"metrics": {"per_container": True}})
        site.start_collector()
        site.enroll()
        site.start_agent()
        site.wait_metering()
        started = next(line for line in site.journal("agent").splitlines() if '"started"' in line)
        names: set[str] = set()
        for port in (json.loads(started)["local_port"], site.ports["local"], books.port):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                names.update(re.findall(r"^# TYPE (\S+)", answer.read().decode(), re.MULTILINE))
        yield {name for name in names if name.startswith("weighbridge_")}


def test_every_exported_metric_is_in_the_operator_guide_and_no_other(exported: set[str]) -> None:
    documented = {word for word in code_words(GUIDE) if word.startswith("weighbridge_")}
    assert len(exported) > 50
    assert exported - documented == set(), "exported, not documented"
    assert documented - exported == set(), "documented, not exported"


def test_every_code_has_a_section_of_its_own_in_the_operator_guide() -> None:
    headings = set(re.findall(r"^### (\S+)$", GUIDE.read_text(), re.MULTILINE))
    assert {str(code) for code in Meter} | {"ERR_MAX_CONCURRENCY_REACHED"} <= headings


def test_every_reason_is_in_the_table_with_the_status_and_the_code_it_really_has() -> None:
    from wire.statuses import meter_code

    (table,) = tables(GUIDE, "Reasons")
    documented = {row[0]: (row[1], row[2]) for row in table[1:]}
    expected = {
        name: (
            "RETRY" if number >= ingest_pb2.REASON_OUT_OF_WINDOW else "REJECTED",
            str(meter_code(ingest_pb2.Reason.ValueType(number)) or "–"),
        )
        for name, number in ingest_pb2.Reason.items()
        if number
    }
    assert documented == expected


@pytest.mark.parametrize(
    "enum",
    [usage_pb2.GapReason, usage_pb2.BatchFlag, usage_pb2.RowFlag, usage_pb2.Coverage, usage_pb2.UnitKind],
)
def test_every_name_of_the_record_says_what_it_means_for_the_bill(enum: type) -> None:
    names = {name for name, number in enum.items() if number}
    assert names
    assert names - code_words(BILLED) == set()


def test_flags_are_documented_with_the_bits_they_have() -> None:
    bits = re.findall(r"`((?:BATCH_FLAG|ROW_FLAG|COVERAGE)_\w+)` \((\d+)\)", BILLED.read_text())
    assert len(bits) == sum(
        len(enum.values()) - 1 for enum in (usage_pb2.BatchFlag, usage_pb2.RowFlag, usage_pb2.Coverage)
    )
    for name, bit in bits:
        assert getattr(usage_pb2, name) == int(bit), name


def test_every_measure_has_its_source_in_the_table() -> None:
    (table,) = tables(BILLED, "Measures")
    documented = [word for row in table[1:] for word in re.findall(r"\w+_\w+", row[0])]
    assert sorted(documented) == sorted(MEASURES)


def events() -> dict[str, str]:
    """Event -> level of every event whose name stands in the code."""
    out = {}
    for package in ("agent", "collector", "ledger", "wire"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in ("debug", "info", "warning", "error")
                    and ast.unparse(node.func.value) in ("log", "self._journal")
                    and isinstance(node.args[0], ast.Constant)
                ):
                    out[str(node.args[0].value)] = node.func.attr
    return out


def test_every_journal_event_is_in_the_operator_guide_with_its_level() -> None:
    found = events()
    assert len(found) > 30
    documented: dict[str, set[str]] = {}
    for table in tables(GUIDE, "Journal events"):
        for row in table[1:]:
            for event in re.findall(r"[a-z]+(?:_[a-z]+)*", row[0]):
                documented.setdefault(event, set()).add(row[1])
    for event, level in found.items():
        assert level in documented.get(event, set()), f"{event} ({level})"
    computed = {"spool_full", "spool_unavailable"}
    assert documented.keys() - found.keys() == computed, "documented, not in the code"


def test_every_reason_not_to_be_ready_is_in_the_operator_guide() -> None:
    documented = {
        word for table in tables(GUIDE, "Readiness") for row in table for word in re.findall(r"\w+", row[0])
    }
    for file in ("agent/daemon.py", "collector/server.py", "ledger/server.py"):
        reasons = set(re.findall(r'reasons\["(\w+)"\]', (ROOT / file).read_text()))
        assert reasons
        assert reasons - documented == set()
    assert {
        *TROUBLES,
        *re.findall(r'"(\w+)": self\._', (ROOT / "ledger/worker.py").read_text()),
    } <= documented


def commands(parser: argparse.ArgumentParser, before: str = "") -> Iterator[str]:
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not subparsers:
        yield before.strip()
    for action in subparsers:
        for name, sub in action.choices.items():
            yield from commands(sub, f"{before} {name}")


def test_every_command_of_the_programs_is_in_the_operator_guide() -> None:
    listed = " ".join(row[0] + " " for table in tables(GUIDE, "Commands") for row in table).replace("`", "")
    wanted = [
        *commands(agent.cli._parser()),
        *commands(collector.cli._parser()),
        *commands(ledger.cli._parser()),
        "usage-replay",
    ]
    assert len(wanted) > 20
    assert [name for name in wanted if f"{name} " not in listed] == []


def test_a_reload_takes_up_and_leaves_what_the_operator_guide_says() -> None:
    (table,) = tables(GUIDE, "Settings and reload")
    for (name, now, later), settings, restart_keys in zip(
        table[1:],
        (agent.config.Settings, collector.config.Settings, ledger.config.Settings),
        (agent.daemon.RESTART_KEYS, collector.server.RESTART_KEYS, ledger.server.RESTART_KEYS),
        strict=True,
    ):
        left = {key for key in restart_keys if "." not in key}
        assert set(re.findall(r"\w+", later)) == left, name
        assert set(re.findall(r"\w+", now)) == set(settings.__struct_fields__) - left, name


def pages() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split()]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, punctuation dropped, spaces to dashes."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def test_every_relative_link_leads_somewhere() -> None:
    followed = 0
    for page in pages():
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            where = f"{page.relative_to(ROOT)}: {link}"
            assert target.exists(), where
            assert not anchor or anchor in anchors(target), where
            followed += 1
    assert followed > 30


def test_every_unit_that_is_spoken_of_exists() -> None:
    """In what an operator reads, and in what the programs ask systemd about."""
    units = {path.name for path in (ROOT / "systemd").glob("*weighbridge-*")}
    places = [GUIDE.parent, ROOT / "README.md"] + [
        ROOT / d for d in ("agent", "collector", "ledger", "packaging", "wire")
    ]
    files = [f for place in places for f in (place.rglob("*") if place.is_dir() else [place])]
    named = {
        (word, str(file.relative_to(ROOT)))
        for file in files
        if file.suffix in (".md", ".py", ".sh", ".yaml")
        for word in re.findall(r"(?:run-)?weighbridge-[a-z-]+\.(?:service|timer|mount)", file.read_text())
    }
    assert {word for word, _ in named} >= units
    assert [(word, file) for word, file in sorted(named) if word not in units] == []


def test_every_decision_is_numbered_without_holes() -> None:
    records = sorted(path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [name[:4] for name in records] == [f"{n:04d}" for n in range(1, len(records) + 1)]
    assert len(records) >= 10


def _nanoseconds(seconds: str) -> int:
    return int(Fraction(seconds) * SECOND)


def test_the_worked_example_is_what_the_meter_computes() -> None:
    counters, billed = tables(BILLED, "A worked example")
    paths = [row[0] for row in counters[1:]]
    ids = {path: number for number, path in enumerate(paths, start=1)}

    def around(path: str) -> int:
        return max((p for p in paths if p != path and path.startswith(f"{p}/")), key=len, default="/")

    def at(column: int):
        units = [
            reading(ids[row[0]], _nanoseconds(row[column]), path=row[0], around=ids[around(row[0])])
            for row in counters[2:]
            if row[column] not in ("ended", "not yet")
        ]
        return snapshot(10.0 * column, root(_nanoseconds(counters[1][column])), *units)

    def tenant(_: object) -> str:
        return "acme"

    baseline = begin(at(1), "", tenant, [])
    rows = {row[0]: row for row in billed[1:]}
    intervals = len(counters[0]) - 2
    deficit_before = 0
    for interval in range(1, intervals + 1):
        outcome = step(baseline, at(interval + 1), tenant, CADENCE)
        baseline = outcome.baseline
        usages = {usage.path: usage.values[0] for usage in outcome.usages}
        for path in paths:
            stated = rows[path][interval]
            assert usages.get(path) == (None if stated == "–" else _nanoseconds(stated)), (path, interval)
        stretch = outcome.stretches[-1]
        total = sum(usages.values())
        assert total == _nanoseconds(rows["sum of the rows"][interval])
        assert stretch.host_cpu_usage_ns == _nanoseconds(rows["the root's difference"][interval])
        assert stretch.cpu_deficit_ns == _nanoseconds(rows["deficit at the end"][interval])
        assert total == stretch.host_cpu_usage_ns + stretch.cpu_deficit_ns - deficit_before
        deficit_before = stretch.cpu_deficit_ns
    assert intervals == 4


def test_the_memory_example_is_what_the_meter_computes() -> None:
    (table,) = tables(BILLED, "Memory")
    seconds, mebibytes = ([int(cell) for cell in row[1:]] for row in table)
    track = MemoryTrack(seconds[0] * SECOND, mebibytes[0] * MEBIBYTE, None)
    for at, amount in zip(seconds[1:], mebibytes[1:], strict=True):
        track.add(at * SECOND, amount * MEBIBYTE, None, None, 4 * SECOND)
    text = BILLED.read_text()
    memory, _, error = (None if total is None else total // SECOND for total in track.integrals_byte_ns())
    assert f"`memory_byte_seconds` is {memory}" in text
    assert f"= {error}." in text
    assert not track.estimated
