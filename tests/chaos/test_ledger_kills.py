"""kill -9 of the ledger while it books and adds up, and of the collector whose log it follows: each batch is booked once."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from bench.fleet import enrol
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.chaos.sender import Sender, sending
from tests.ledger.both_sides import accepted_in_log, booked, total
from tests.waiting import until
from wire.log import Kind, Record, scan

LEDGER_KILLS, COLLECTOR_KILLS = 20, 4
TABLES = ("batches", "progress", "usage_hours")
"""Amid whose writing every second kill comes; the others come at any time."""
PATIENCE_SECONDS = 20.0
"""For a moment to aim at: on a machine with other work a start alone takes several."""
TENANTS = {"acme": {"rate": 4, "burst": 62}}
"""One tenant parks most of what it sends and is released in the end, so that batches come to the books late."""
FOREVER_NS = 1 << 62
INTERVAL_NS = 10 * 10**9
"""So that the batches lie in some hours, of which most are added up before the last of them has come."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


def writing(database: Path, table: str) -> bool:
    """Whether ClickHouse has a part of this table half on the disk."""
    try:
        return any(
            entry.name.startswith("tmp_") for entry in os.scandir(database / "data/weighbridge" / table)
        )
    except FileNotFoundError:
        return False  # the table is not made yet


def until_writing(site: Site, table: str) -> bool:
    """Whether a write into this table was seen in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if writing(site.directory / "ledger/db", table):
            return True
        time.sleep(0.0005)
    return False


def test_every_accepted_batch_is_booked_once_however_often_ledger_and_collector_are_killed(
    site: Site,
) -> None:
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    print(f"seed {seed}")
    site.prepare(
        collector={"admission": {"tenants": TENANTS}}, ledger={"rollup": {"settle": "0s", "every": "2s"}}
    )
    authority = CertificateAuthority(site.directory / "collector" / "ca")
    site.start_collector()
    senders = [
        Sender(site, enrol(authority), tenant, random.Random(seed + number), 8, INTERVAL_NS)
        for number, tenant in enumerate(["acme", "globex", "initech"])
    ]
    aimed = dict.fromkeys(TABLES, 0)
    with sending(senders):
        for kill in range(LEDGER_KILLS):
            site.start_ledger()
            if kill % 2:
                table = TABLES[kill // 2 % len(TABLES)]
                aimed[table] += until_writing(site, table)
            else:
                time.sleep(rng.uniform(0.0, 4.0))
            site.stop("ledger", signal.SIGKILL)
            if kill % (LEDGER_KILLS // COLLECTOR_KILLS) == 2:
                site.stop("collector", signal.SIGKILL)
                site.start_collector()
        for tenant in TENANTS:
            site.command("collector", "plan", "set", tenant, "--rate", "unlimited")
    until(lambda: not site.ask("collector", "parked")["tenants"], 60)
    site.start_ledger()
    site.wait_booking()

    def done() -> bool:
        status = site.ask("ledger", "status")
        if "source_lag" not in status:
            return False  # too busy to say
        return not any(lag["lag"] for lag in status["source_lag"]) and not status["rollup_dirty_hours"]

    until(done, 90)
    sums = {by: total(usage(site, by)) for by in ("tenant", "hour", "unit")}
    status = site.ask("ledger", "status")
    verdict, hops = site.ask("ledger", "verify"), site.ask("ledger", "reconcile")
    assert site.stop("ledger") == 0, site.journal("ledger")[-2_000:]
    assert site.stop("collector") == 0, site.journal("collector")[-2_000:]

    made, there = accepted_in_log(site.directory / "collector/log"), booked(site.directory / "ledger")
    assert len(made.digests) == sum(len(sender.made) for sender in senders) > 500
    assert any(
        isinstance(r, Record) and r.kind is Kind.RELEASED for r in scan(site.directory / "collector/log")
    )
    assert there.digests == made.digests
    assert there.rows == made.rows
    assert there.sums == made.sums
    assert all(of_tenant["cpu_usage_ns"] > 0 for of_tenant in made.sums.values())
    # From hours that were built, by units and by rows: the same.
    assert status["rollup_built_hours"] > 0
    assert sums == dict.fromkeys(sums, made.sums)
    assert verdict["ok"], verdict
    assert verdict["hours_compared"] == status["rollup_built_hours"]
    assert hops["ok"], hops
    assert sum(hop["booked"] for hop in hops["hops"]) == len(made.digests)
    print(f"killed amid writing: {aimed}")
    assert sum(aimed.values()) > LEDGER_KILLS // 4, aimed
    assert aimed["batches"] > 0, aimed


def usage(site: Site, by: str) -> list[dict[str, object]]:
    answer = site.ask("ledger", "usage", 120, start_unix_ns=0, end_unix_ns=FOREVER_NS, by=by)
    assert not answer["more"]
    return list(answer["rows"])
