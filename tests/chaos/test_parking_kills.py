"""kill -9 of the collector while it parks and releases: each batch is handed on once, in its tenant's order."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict

import pytest

from bench.fleet import enrol
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.handoff.log import HANDED_ON, Kind, Record, scan
from collector.log_commands import verify
from tests.chaos.sender import Sender, sending
from tests.waiting import until

KILLS = 20
TENANTS = {"acme": {"rate": 60, "burst": 62}, "globex": {"rate": 100, "burst": 62, "park_batches": 200}}

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


def parked_tenants(site: Site) -> set[str]:
    return {view["tenant"] for view in site.ask("collector", "parked")["tenants"]}


def test_every_batch_is_handed_on_once_in_order_and_as_it_was_however_often_the_collector_is_killed(
    site: Site,
) -> None:
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    print(f"seed {seed}")
    site.prepare(collector={"admission": {"tenants": TENANTS}})
    authority = CertificateAuthority(site.directory / "collector" / "ca")
    site.start_collector()
    senders = [
        Sender(site, enrol(authority), tenant, random.Random(seed + number))
        for number, tenant in enumerate([*TENANTS, *TENANTS])
    ]
    with sending(senders):
        for kill in range(KILLS):
            time.sleep(rng.uniform(0.0, 1.5) if kill % 5 else 6.0)  # sometimes a checkpoint is in between
            site.stop("collector", signal.SIGKILL)
            site.start_collector()
        until(lambda: parked_tenants(site) == set(TENANTS))  # else nothing would be shown
        for tenant in TENANTS:
            site.command("collector", "plan", "set", tenant, "--rate", "unlimited")
    until(lambda: not parked_tenants(site), 60)
    assert site.stop("collector") == 0, site.journal("collector")[-2_000:]

    records = list(scan(site.directory / "collector" / "log"))
    assert all(isinstance(record, Record) for record in records)
    log = [record for record in records if isinstance(record, Record)]
    delivered: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
    for record in log:
        if record.kind in HANDED_ON:
            delivered[record.agent_id].append((record.seq, record.body))
    for sender in senders:
        mine = delivered.pop(sender.agent.agent_id)
        assert sorted(mine) == [(item.seq, item.batch) for item in sender.made]
    assert not delivered
    verdict = verify(site.directory / "collector" / "log")
    assert verdict.sound, verdict
    assert verdict.parked == 0
    assert verdict.released == sum(record.kind is Kind.PARKED for record in log) > 500
