"""Attacks on a running collector, each for a moment: it lives, serves the others, stays small, and is as before afterwards.

`./dev bench floods` measures the same attacks for longer.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import http2
from bench.agent import rss_mib
from bench.attacks import ATTACKS, IDLE_SOCKETS, run
from bench.floods import target_of
from bench.http2 import Connection, client_context
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.waiting import until

ATTACK_SECONDS = 1.5
CONNECTIONS = 200
MOST_ADDED_MIB = 50


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with Site(tmp_path_factory.mktemp("floods")) as site:
        site.prepare(
            collector={
                "connections": {"most": CONNECTIONS, "handshake": "2s"},
                "limits": {"streams": 50},
                "journal_level": "error",
            }
        )
        site.start_collector()
        yield Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
        assert site.collector is not None
        assert site.collector.poll() is None, f"the collector died:\n{site.journal('collector')}"
        assert site.command("collector", "log", "verify").returncode == 0


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_leaves_the_others_served_the_collector_small_and_nothing_behind(
    door: Door, name: str
) -> None:
    process = door.site.collector
    assert process is not None
    attacker = door.agent()
    with door.open(door.agent()) as beside:
        assert statuses(beside.deliver(5)) == ["ACCEPTED"] * 5
        before = rss_mib(process.pid)
        done = run(name, target_of(door.site, attacker), ATTACK_SECONDS)
        assert done.total() > 0, "it did attack"
        if name == "idle_sockets":
            assert done["connections"] == IDLE_SOCKETS
        assert rss_mib(process.pid) < before + MOST_ADDED_MIB
        assert statuses(beside.deliver(5)) == ["ACCEPTED"] * 5
    until(lambda: sockets(process.pid) < 20, 30)
    until(lambda: door.metrics()["weighbridge_collector_open_streams"] == 0)
    with door.open(door.agent()) as newcomer:
        assert statuses(newcomer.deliver(5)) == ["ACCEPTED"] * 5


def sockets(pid: int) -> int:
    """Sockets that a process has open."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += str(path.readlink()).startswith("socket:")
    return count


@pytest.fixture
def attacker(door: Door) -> Iterator[Connection]:
    target = target_of(door.site, door.agent())
    context = client_context(Path(target.ca_file), Path(target.agent_file))
    with Connection(target.ingest, context) as connection:
        yield connection


def test_a_thousand_handshakes_that_come_to_nothing_leave_nothing_behind(site: Site) -> None:
    """Each takes 25 KiB, and as it ends 35 KiB more, which glibc would keep."""
    site.prepare(collector={"connections": {"most": 1_050, "handshake": "2s"}, "limits": {"streams": 1_000}})
    site.start_collector()
    assert site.collector is not None
    pid = site.collector.pid
    agent = Door(site, CertificateAuthority(site.directory / "collector" / "ca")).agent()
    before = rss_mib(pid)
    run("slow_handshakes", target_of(site, agent), ATTACK_SECONDS)
    assert rss_mib(pid) > before + 10, "it did attack"
    until(lambda: sockets(pid) < 20 and rss_mib(pid) < before + 20, 30)


def test_pings_without_end_are_hung_up_on(attacker: Connection) -> None:
    attacker.acknowledge()
    attacker.send(http2.ping() * 20)
    assert attacker.closed_within(5)


def test_who_never_acknowledges_the_settings_is_hung_up_on(attacker: Connection) -> None:
    assert attacker.closed_within(10)


def test_metadata_over_the_bound_ends_that_call_and_nothing_else(door: Door, attacker: Connection) -> None:
    attacker.acknowledge()
    attacker.send(http2.request(1, http2.DELIVER, [(f"x-{i}", "a" * 3_000) for i in range(20)]))
    assert b"grpc-status\x018" in attacker.received(5, awaited=b"grpc-status"), "RESOURCE_EXHAUSTED"
    assert not attacker.closed_within(0.1)
    until(lambda: door.metrics()["weighbridge_collector_open_streams"] == 0)


def test_who_calls_with_much_metadata_and_hangs_up_leaves_nothing_behind(door: Door) -> None:
    assert door.site.collector is not None
    pid = door.site.collector.pid
    target = target_of(door.site, door.agent())
    calls = [
        http2.request(1 + 2 * n, http2.DELIVER, [(f"x-{i}", "a" * 4_000) for i in range(100)])
        for n in range(15)
    ]
    before = rss_mib(pid)
    for _ in range(30):
        with contextlib.suppress(OSError), Connection(target.ingest, target.agent()) as connection:
            for call in calls:
                connection.send(call)
    until(lambda: rss_mib(pid) < before + MOST_ADDED_MIB, 30)
    until(lambda: door.metrics()["weighbridge_collector_open_streams"] == 0)


def test_streams_over_the_bounds_of_a_connection_and_of_an_agent_are_refused(
    door: Door, attacker: Connection
) -> None:
    attacker.acknowledge()
    attacker.send(b"".join(http2.request(1 + 2 * number, http2.DELIVER) for number in range(100)))
    until(lambda: door.metrics()["weighbridge_collector_open_streams"] == 4)
    assert not attacker.closed_within(1)
    # Sixteen at once come through to the service, which takes four.
    assert door.refusals("METER-002", "too_many_streams_of_agent") >= 12
    assert door.metrics()["weighbridge_collector_open_streams"] == 4


def test_a_connection_that_is_slow_idle_or_old_is_ended(site: Site) -> None:
    site.prepare(collector={"connections": {"handshake": "1s", "idle": "2s", "age": "10s"}})
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    target = target_of(site, door.agent())
    context = client_context(Path(target.ca_file), Path(target.agent_file))
    with (
        socket.create_connection(("127.0.0.1", target.ingest)) as slow,
        Connection(target.ingest, context) as idle,
        Connection(target.ingest, context) as old,
    ):
        slow.settimeout(5)
        assert slow.recv(1) == b"", "it has not even said hello"
        for one in (idle, old):
            one.acknowledge()
        old.send(http2.request(1, http2.DELIVER) + http2.message(1, Path(target.hello_file).read_bytes()))
        assert idle.closed_within(8)
        assert b"max_age" in old.received(15, awaited=b"max_age"), "a GOAWAY that says why"
