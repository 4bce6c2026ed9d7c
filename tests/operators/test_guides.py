"""Runbook, troubleshooting and hardening guide against the code: codes, reasons, commands, file modes, backup."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import agent.cli
import collector.cli
import ledger.cli
from bench.fleet import Stream
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.operators.rules import ROOT
from tests.test_docs import tables
from wire.statuses import REASONS, Meter, label, meter_code

TROUBLE = ROOT / "docs/troubleshooting.md"
HARDENING = ROOT / "docs/hardening.md"
GUIDES = (ROOT / "docs/runbook.md", TROUBLE, HARDENING)
WORDS_FOR = {"NAME": "web-1", "AGENT": "f216c6d4", "TENANT": "acme", "N": "5", "…": "h.example.org"}


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for package in ("agent", "collector", "ledger", "wire"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if "v1" not in file.parts:
                yield file, ast.parse(file.read_text())


def code_of(node: ast.expr) -> set[str]:
    """METER codes that an expression may be."""
    return {str(Meter[n.attr]) for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr in Meter.__members__} | {
        str(n.value) for n in ast.walk(node) if isinstance(n, ast.Constant) and re.fullmatch(r"METER-\d{3}", str(n.value))
    }  # fmt: skip


def coded() -> set[tuple[str, str]]:
    """(code, reason or journal event) of everything in the code that has both."""
    found = {(str(code), label(reason)) for reason in REASONS if (code := meter_code(reason)) is not None}
    for _, tree in sources():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if name == "_refused":
                reasons = [a.value for a in call.args if isinstance(a, ast.Constant)]
                found |= {(code, str(reason)) for code in code_of(call.args[0]) for reason in reasons}
            elif (
                name in ("info", "warning", "error") and call.args and isinstance(call.args[0], ast.Constant)
            ):
                for keyword in call.keywords:
                    if keyword.arg == "code":
                        found |= {(code, str(call.args[0].value)) for code in code_of(keyword.value)}
    return found


def matrix() -> dict[str, set[str]]:
    """Code -> what stands in the first column of its table."""
    codes = re.findall(r"^## (METER-\d{3})$", TROUBLE.read_text(), re.MULTILINE)
    return {
        code: {
            word
            for table in tables(TROUBLE, code)
            for row in table[1:]
            for word in re.findall(r"[a-z_]{5,}", row[0])
        }
        for code in codes
    }


def test_every_code_of_the_code_is_in_the_matrix_and_no_other() -> None:
    spelled = {code for file, _ in sources() for code in re.findall(r"METER-\d{3}", file.read_text())}
    codes = set(map(str, Meter))
    assert spelled <= codes, "in the code, not among the codes"
    assert set(matrix()) == codes
    assert set(re.findall(r"METER-\d{3}", " ".join(page.read_text() for page in GUIDES))) <= codes
    assert "ERR_MAX_CONCURRENCY_REACHED" in TROUBLE.read_text()


def test_every_reason_and_event_with_a_code_is_in_the_row_of_its_code() -> None:
    found = coded()
    assert len(found) > 35
    listed = matrix()
    assert sorted((code, what) for code, what in found if what not in listed[code]) == []


def test_nothing_is_in_the_matrix_that_the_code_does_not_say() -> None:
    text = "\n".join(file.read_text() for file, _ in sources())
    reasons = {label(reason) for reason in REASONS}
    for code, words in matrix().items():
        assert words, code
        assert {word for word in words if word not in reasons and f'"{word}"' not in text} == set(), code


def commands(page: Path) -> list[list[str]]:
    """Each command of a daemon on a page, up to a pipe, with something for its operands."""
    text = page.read_text().replace("\\|", "|")
    found = re.findall(r"`(weighbridge-(?:agent|collector|ledger) [^`|]+)", text)
    found += re.findall(r"^(weighbridge-(?:agent|collector|ledger) [^#|\n]+)", text, re.MULTILINE)
    return [[WORDS_FOR.get(word, word) for word in shlex.split(line)] for line in found]


@pytest.mark.parametrize("page", [*GUIDES, ROOT / "docs/operator-guide.md"], ids=lambda page: page.stem)
def test_every_command_that_a_guide_tells_somebody_to_type_is_one(page: Path) -> None:
    parsers: dict[str, argparse.ArgumentParser] = {
        "weighbridge-agent": agent.cli._parser(),
        "weighbridge-collector": collector.cli._parser(),
        "weighbridge-ledger": ledger.cli._parser(),
    }
    told = commands(page)
    assert told
    for program, *words in told:
        if words == ["--version"] or program.endswith(".service"):
            continue
        try:
            parsers[program].parse_args(words)
        except SystemExit as refused:
            pytest.fail(f"{page.name}: {program} {shlex.join(words)}: exit {refused.code}")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", HARDENING.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.root
def test_nft_accepts_the_firewall(tmp_path: Path) -> None:
    assert len(blocks("nft")) == 2
    for block in blocks("nft"):
        # A user that is on this machine, too; in a network namespace of its own, where nothing is asked of the host's.
        rules = block.replace('"weighbridge"', '"nobody"')
        done = subprocess.run(
            ["unshare", "--net", "nft", "--check", "--file", "-"],
            input=rules,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_files_that_must_be_secret_have_the_modes_of_the_guide(site: Site) -> None:
    (table,) = tables(HARDENING, "Files")
    told = {row[0]: row[1] for row in table[1:]}
    site.prepare()
    site.start_collector()
    site.enroll()
    state = site.directory / "collector"
    made = {
        "identity.json": site.directory / "agent/identity.json",
        "ca/": state / "ca",
        "ca/ca.key": state / "ca/ca.key",
        "ca/server.pem": state / "ca/server.pem",
        "log/": state / "log",
        "audit.log": state / "audit.log",
        "collector.sock": state / "collector.sock",
    }
    for name, path in made.items():
        assert told[name].startswith(f"0{stat.S_IMODE(path.stat().st_mode):o}"), name
    for segment in (state / "log").glob("*.log"):
        assert stat.S_IMODE(segment.stat().st_mode) == 0o640
        assert "segments 0640" in told["log/"]


def test_a_collector_restored_from_the_backup_of_the_guide_knows_what_it_had(site: Site) -> None:
    site.prepare()
    site.start_collector()
    state, backup = site.directory / "collector", site.directory / "backup"
    door = Door(site, CertificateAuthority(state / "ca"))
    simulated = door.agent()
    stream = Stream(simulated.agent_id, 1)
    items = [stream.next() for _ in range(30)]
    assert statuses(door.deliver(simulated, stream, items[:20])) == ["ACCEPTED"] * 20
    (script,) = (block for block in blocks("sh") if ".backup" in block)
    # The collector runs while the backup is made, as the guide says it may.
    subprocess.run(
        ["bash", "-euc", script.replace("/var/lib/weighbridge-collector", str(state))],
        env={**os.environ, "BACKUP": str(backup)},
        check=True,
    )
    site.stop("collector")
    shutil.rmtree(state)
    shutil.copytree(backup, state)
    assert site.command("collector", "log", "verify").returncode == 0
    assert site.command("collector", "audit", "verify").returncode == 0
    site.start_collector()
    assert statuses(door.deliver(simulated, stream, items)) == ["DUPLICATE"] * 20 + ["ACCEPTED"] * 10
