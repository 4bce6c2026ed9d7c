"""`weighbridge-ledger` around a fake of its core: with a daemon and without, what is printed, and the exit codes."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import pwd
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import cli, desk, tables
from ledger.config import read
from ledger.lock import Lock
from ledger.server import Server
from ledger.times import iso, unix_ns
from tests.ledger.fake_books import BIG, HOSTILE, FakeBooks
from tests.ledger.test_server import until

ME = pwd.getpwuid(os.getuid()).pw_name


class Said(NamedTuple):
    code: int
    out: str
    err: str


Say = Callable[..., Said]


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeBooks]]:
    """Every ledger that a command opened by itself."""
    made: list[FakeBooks] = []

    def open_books(settings: object) -> FakeBooks:
        made.append(FakeBooks(settings))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(cli, "open_books", open_books)
    yield made
    assert all(one.closed for one in made)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    file = tmp_path / "ledger.yaml"
    file.write_text(f"state_dir: {tmp_path}/state\nlocal_port: {{port: 0}}\n")
    return file


@pytest.fixture
def say(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command as if it had been typed."""

    def run(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["weighbridge-ledger", "--config", str(file), *words])
        try:
            code = cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run


def test_without_a_daemon_a_command_opens_the_ledger_and_closes_it(say: Say, books: list[FakeBooks]) -> None:
    assert say("verify").code == 0
    (one,) = books
    assert [call[0] for call in one.calls] == ["verify", "end"]


def test_without_a_daemon_status_tells_what_is_booked_and_that_nobody_goes_on(
    say: Say, books: list[FakeBooks]
) -> None:
    said = say("status", "--json")
    assert said.code == 1
    assert json.loads(said.out)["agents"] == 12
    assert "is the daemon running" in json.loads(said.out)["ready"]["not_running"]


def test_what_a_person_decides_is_written_down_with_the_person(say: Say, books: list[FakeBooks]) -> None:
    said = say("waive", "2026-10", "--reason", "host burnt", "b1", "b2")
    assert (said.code, said.out) == (0, "waived: b1  b1 is not here\nwaived: b2  b2 is not here\n")
    assert books[0].calls[0] == ("waive", "2026-10", ["b1", "b2"], "host burnt", ME)
    assert say("retire", "a-1", "--at", "2026-10-31", "--reason", "sold").code == 0
    assert books[1].calls[0] == ("retire", "a-1", unix_ns("2026-10-31T00:00:00Z"), "sold", ME)
    assert say("retire", "a-1").code == 2, "nobody is retired without a reason"


def test_where_another_command_has_the_ledger_open_it_is_named(
    say: Say, books: list[FakeBooks], file: Path
) -> None:
    lock = Lock(read(file).lock_file)
    lock.take("weighbridge-ledger reconcile")
    said = say("verify")
    assert said.code == 2
    assert f"open in process {os.getpid()} (weighbridge-ledger reconcile)" in said.err
    assert books == []
    lock.close()


def test_a_directory_without_a_ledger_is_not_made_into_one(
    say: Say, books: list[FakeBooks], file: Path
) -> None:
    file.write_text(f"state_dir: {file.parent}/typo\n")
    said = say("usage")
    assert said.code == 2
    assert "no ledger here; name its settings with --config" in said.err
    assert not (file.parent / "typo").exists()
    assert books == []


async def test_with_a_daemon_a_command_asks_it(say: Say, books: list[FakeBooks], file: Path) -> None:
    daemons: list[FakeBooks] = []

    def open_books(settings: object) -> FakeBooks:
        daemons.append(FakeBooks(settings))  # type: ignore[arg-type]
        return daemons[-1]

    settings = read(file)
    server = Server(settings, file, open_books)
    task = asyncio.create_task(server.run())
    await until(lambda: daemons and not server._worker.opening)
    assert (await asyncio.to_thread(say, "verify")).code == 0
    said = await asyncio.to_thread(say, "status", "--json")
    assert (said.code, json.loads(said.out)["ready"]) == (0, {})
    assert "reloaded" in (await asyncio.to_thread(say, "reload")).out
    daemons[0].blockers = [{"id": "b1", "kind": "missing", "sentence": "a/1/7"}]
    assert (await asyncio.to_thread(say, "close", "2026-10")).code == 1
    assert ("close", "2026-10", ME) in daemons[0].calls
    assert books == [], "nothing is opened twice"
    server._stop.set()
    await asyncio.wait_for(task, 20)


def test_a_period_that_is_not_complete_names_its_blockers_and_exits_with_one(
    say: Say, books: list[FakeBooks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FakeBooks, "close_period", lambda *_: {"blockers": [{"id": "b1", "sentence": HOSTILE + "s" * 200}]}
    )
    said = say("close", "2026-10")
    assert said.code == 1
    assert "weighbridge-ledger waive 2026-10 BLOCKER..." in said.out
    assert f"b1  ac\\x1b[2Jme{'s' * 200}\n" in said.out, "whole: it names batches"
    assert "\x1b" not in said.out
    assert say("close", "2026-10", "--json").code == 1


def test_a_closed_period_prints_its_manifest(say: Say, books: list[FakeBooks]) -> None:
    said = say("close", "2026-10")
    assert (said.code, "digest" in said.out) == (0, True)
    assert json.loads(say("close", "2026-10", "--json").out)["digest"] == "ab12"
    assert say("manifest", "2026-10") == (0, '{"period":"2026-10"}', "SHA-256 ab12\n")


def test_a_difference_is_named_and_exits_with_one(say: Say, books: list[FakeBooks]) -> None:
    said = say("reconcile")
    assert said.code == 1
    assert "a/1/7" in said.out
    said = say("reconcile", "--json")
    assert (said.code, json.loads(said.out)["ok"]) == (1, False)
    assert say("verify").code == 0


@pytest.mark.parametrize(
    "words", [("usage",), ("usage", "--csv"), ("export", "2026-10"), ("status",), ("periods",)]
)
def test_nothing_hostile_reaches_the_terminal_raw(
    say: Say, books: list[FakeBooks], words: tuple[str, ...]
) -> None:
    said = say(*words)
    assert said.code == (1 if words == ("status",) else 0)
    assert said.out
    assert "\x1b" not in said.out
    assert "\\x1b[2J" in said.out or words == ("periods",)


def test_usage_shows_readable_beside_exact_and_unknown_as_unknown(say: Say, books: list[FakeBooks]) -> None:
    heading, first, second = say("usage").out.splitlines()
    assert heading.split() == [
        "TENANT",
        "ROWS",
        "CPU",
        "HOURS",
        "cpu_usage_ns",
        "GIB",
        "HOURS",
        "memory_byte_seconds",
    ]
    assert BIG in first.split()
    assert f"{2**70 / 3.6e12:.4f}" in first.split()
    assert "1.0000" in first.split()
    assert second.split()[2] == "-", "what nobody measured is not zero"


def test_usage_asks_for_the_time_and_the_tenant_that_was_typed(say: Say, books: list[FakeBooks]) -> None:
    words = ("--tenant", "acme", "--from", "2026-10-01", "--to", "2026-10-01T02:00:00+01:00", "--by", "hour")
    say("usage", *words)
    start = unix_ns("2026-10-01")
    assert books[0].calls[0] == ("usage", start, start + 3_600 * 10**9, "hour", "acme", desk.MAX_ROWS + 1)
    for wrong in ("yesterday", "2026-10-01T02:00:00", "1969-12-31"):
        said = say("usage", "--from", wrong)
        assert said.code == 2
        assert wrong in said.err
    assert "is no time" in say("usage", "--from", "2026-10-02", "--to", "2026-10-01").err


def test_what_does_not_fit_an_answer_is_not_silently_cut(
    say: Say, books: list[FakeBooks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "MAX_ROWS", 1)
    said = say("usage", "--csv")
    assert said.code == 1
    assert "only the first 1 lines" in said.err


def test_an_export_is_exact_and_no_formula(say: Say, books: list[FakeBooks], tmp_path: Path) -> None:
    one, other = csv.DictReader(io.StringIO(say("export", "2026-10").out))
    assert one["cpu_usage_ns"] == BIG
    assert (other["tenant"], other["cpu_usage_ns"], other["memory_byte_seconds"]) == ("'=1+1", "", "-5")
    output = tmp_path / "bill.jsonl"
    said = say("export", "2026-10", "--format", "jsonl", "-o", str(output))
    assert (said.code, said.out) == (0, "")
    assert [json.loads(line)["tenant"] for line in output.read_text().splitlines()] == [HOSTILE, "=1+1"]
    said = say("export", "2026-10", "-o", str(tmp_path / "nowhere" / "x"))
    assert said.code == 2
    assert "name a file in a directory you may write" in said.err


def test_reread_says_that_nothing_is_booked_twice(say: Say, books: list[FakeBooks]) -> None:
    assert "what is booked stays as it is" in say("reread").out
    assert books[0].calls[0] == ("reread",)


def test_a_reload_without_a_daemon_is_an_error(say: Say, books: list[FakeBooks]) -> None:
    said = say("reload")
    assert said.code == 2
    assert "is the daemon running" in said.err
    assert books == []


def test_check_config_says_what_is_wrong_and_online_asks(say: Say, file: Path) -> None:
    assert say("check-config") == (0, "settings are good\n", "")
    said = say("check-config", "--online")
    assert said.code == (0 if Path("/var/lib/weighbridge-collector/log").is_dir() else 1)
    assert "source:" in said.out
    log = file.parent / "log"
    log.mkdir()
    file.write_text(file.read_text() + f"source: {{log_directory: {log}}}\n")
    assert say("check-config", "--online").code == 0
    file.write_text(file.read_text() + "store: {dsn: 'http://me@127.0.0.1:1'}\n")
    said = say("check-config", "--online")
    assert said.code == 1
    assert "ClickHouse at 127.0.0.1:1" in said.out
    file.write_text("stor: 1\n")
    assert say("check-config").code == 2


def test_schema_prints_every_table(say: Say) -> None:
    assert "CREATE TABLE" in say("schema").out


def test_a_bundle_has_no_password_and_says_what_could_not_be_had(
    say: Say, file: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text("correct-horse-battery\n")
    file.write_text(
        file.read_text() + f"store: {{dsn: 'http://billing-user@127.0.0.1:1/x', password_file: {secret}}}\n"
        "source: {kafka: {brokers: ['127.0.0.1:1'], client: {sasl.password: staple-of-kafka}}}\n"
    )
    output = tmp_path / "bundle.tar.gz"
    said = say("support-bundle", "--output", str(output))
    assert said.code == 0
    with tarfile.open(output) as tar:
        texts = {m.name.rpartition("/")[2]: tar.extractfile(m).read().decode() for m in tar}  # type: ignore[union-attr]
    everything = "".join(texts.values())
    for word in ("correct-horse-battery", "billing-user", "staple-of-kafka"):
        assert word not in everything
    assert json.loads(texts["settings.json"])["store.dsn"].startswith("http://127.0.0.1:1")
    assert "could not be had" in texts["status.json"]


@given(st.integers(0, 4 * 10**18))
def test_an_instant_that_is_printed_can_be_typed(at_unix_ns: int) -> None:
    whole = at_unix_ns // 1_000 * 1_000
    assert unix_ns(iso(whole)) == whole


@given(st.text())
def test_no_text_reaches_a_table_or_csv_with_a_control_character(text: str) -> None:
    rows = [{"tenant": text, "text": text, "more": [text], "cpu_usage_ns": text}]
    for shown in (tables.table(rows), tables.facts(rows[0]), tables.as_csv(rows), tables.as_json(rows)):
        assert all(c.isprintable() or c == "\n" for c in shown)
        assert "\x7f" not in shown


def test_rows_of_different_kinds_share_a_table() -> None:
    lines = tables.table(
        [{"period": "a", "text": "t" * 300, "n": 1}, {"period": "b", "state": "open", "n": 22}]
    )
    heading, first, second = lines.splitlines()
    assert heading.split() == ["PERIOD", "N", "STATE", "TEXT"]
    assert first.split() == ["a", "1", "t" * 300]
    assert second.split() == ["b", "22", "open"]


def test_a_tenant_that_is_called_like_a_number_is_a_name() -> None:
    assert "007" in tables.table([{"tenant": "007"}]).split()


@given(st.integers(-(2**128), 2**128))
def test_a_sum_of_any_size_is_shown_exactly_too(total: int) -> None:
    value: int | str = str(total) if abs(total) > 2**53 else total
    assert str(total) in tables.table([{"tenant": "a", "cpu_usage_ns": value}]).split()
    assert str(total) in tables.facts({"cpu_usage_ns": value})
