"""`weighbridge-ledger` as a process of its own, with its real core: a collector's log in, usage out."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from bench.fleet import Stream
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.ledger.process import LedgerProcess
from tests.waiting import until


def test_what_a_collector_took_in_is_usage_once_with_a_daemon_and_without(site: Site, tmp_path: Path) -> None:
    site.prepare()
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(50)]
    assert statuses(door.deliver(agent, stream, items)) == ["ACCEPTED"] * 50

    ledger = LedgerProcess(tmp_path / "ledger", site.directory / "collector/log")

    def said(*words: str) -> Any:
        done = ledger.command(*words)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def booked() -> Any:
        status = ledger.command("status", "--json")
        return status.returncode == 0 and json.loads(status.stdout)["agents"] == 1

    everything = ("usage", "--from", "1970-01-01", "--to", "2200-01-01", "--json")
    with ledger:
        assert ledger.port
        until(booked, 60)
        first = said(*everything)
        (line,) = first["rows"]
        assert (line["tenant"], first["more"]) == (stream.tenant, False)
        assert line["rows"] > 0
        assert ledger.command("reread").returncode == 0
        until(booked, 60)
        assert said(*everything) == first, "booked once"
        assert said("verify", "--json")["ok"] is True
        assert ledger.command("usage", "--to", "2200-01-01", "--from", "1970-01-01").stdout.startswith(
            "TENANT"
        )
        refused = ledger.command("close", "2190-01")
        assert (refused.returncode, "has not ended" in refused.stderr) == (2, True)
        ledger.process.send_signal(signal.SIGTERM)
        assert ledger.process.wait(60) == 0, ledger.journal.read_text()
    assert said(*everything) == first, "the command has opened the ledger itself"
    status = ledger.command("status")
    assert (status.returncode, "not ready: not_running" in status.stdout) == (1, True)


def test_a_kill_leaves_nothing_that_a_start_minds(site: Site, tmp_path: Path) -> None:
    site.prepare()
    site.start_collector()
    ledger = LedgerProcess(tmp_path / "ledger", site.directory / "collector/log")
    for _ in range(2):
        with ledger:
            assert ledger.port
            until(lambda: ledger.command("status").returncode == 0, 60)
    assert '"lock_held"' not in ledger.journal.read_text()


def test_a_store_from_the_future_ends_the_start_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    ledger = LedgerProcess(tmp_path / "ledger", tmp_path / "log")
    assert ledger.command("periods").stdout == "no periods yet\n"
    from ledger.store.client import Store

    store = Store(ledger.state / "db", "", "", "weighbridge", 1 << 30)
    store.command("INSERT INTO migrations VALUES (9999, '9999_future.sql', 'x', 1)")
    store.close()
    with ledger:
        assert ledger.process.wait(60) == 2
    assert "weighbridge-ledger: " in ledger.journal.read_text()
    assert "9999" in ledger.journal.read_text()
