"""Bytes and packets per cgroup against what the interface counted, to the byte.

The formula (docs/what-is-counted-where.md): bytes of an interface = bytes of the probes + 14 per skb, the Ethernet header. The
counters are compared while connections are open: what the kernel answers for a connection that is gone
(TIME_WAIT, resets) and ARP belong to no socket, and so to no cgroup.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import bcc
from bench.cgroups import Cgroup
from bench.netns import HERE4, HERE6, THERE4, THERE6, Namespace, namespace
from bench.probe_set import ProbeSet
from tests.probes.conftest import needs_bcc
from tests.probes.holding import Traffic, network, overflow

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

ETHERNET_HEADER = 14
PORT = "7000"

# Each says a line when it is done with a step, and waits for one to go on.
_SERVER = """
import socket, sys
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
with socket.create_server((address, port), family=family) as listening:
    print("listening", flush=True)
    connection, _ = listening.accept()
left = size
while left:
    left -= len(connection.recv(1 << 16))
connection.sendall(b"x" * size)
print("done", flush=True)
sys.stdin.readline()
"""
_CLIENT = """
import socket, sys
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
connection = socket.create_connection((address, port))
connection.sendall(b"y" * size)
left = size
while left:
    left -= len(connection.recv(1 << 16))
print("done", flush=True)
sys.stdin.readline()
"""
_DATAGRAMS = """
import socket, sys
address, port, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
to = socket.socket(family, socket.SOCK_DGRAM)
for _ in range(count):
    to.sendto(b"z" * size, (address, port))
print("done", flush=True)
"""


@pytest.fixture(params=["core", pytest.param("bcc", marks=needs_bcc)])
def probes(request: pytest.FixtureRequest, pins: ProbeSet) -> Iterator[ProbeSet]:
    """Loaded by either engine: they count by the same text."""
    if request.param == "bcc":
        with bcc.helper(pins):
            yield pins
    else:
        pins.load()
        yield pins


@pytest.fixture
def space() -> Iterator[Namespace]:
    with namespace() as made:
        made.know_each_other()
        yield made


def start(cgroup: Cgroup, words: list[str]) -> subprocess.Popen[str]:
    procs = cgroup.path / "cgroup.procs"
    joined = ["/bin/sh", "-c", f'echo $$ > "{procs}" && exec "$@"', "sh", *words]
    return subprocess.Popen(joined, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word


def sum_of(probes: ProbeSet, cgroup: Cgroup, direction: str, *classes: str) -> Traffic:
    traffic = network(probes).get(cgroup.cgroup_id, {})
    parts = [
        traffic.get((direction, peer), Traffic(0, 0, 0))
        for peer in classes or ("loopback", "internal", "external")
    ]
    return Traffic(*(sum(column) for column in zip(*parts, strict=True)))


@pytest.mark.parametrize(("here", "there"), [(HERE4, THERE4), (HERE6, THERE6)], ids=["ipv4", "ipv6"])
def test_tcp_both_ways_equals_the_interface_to_the_byte(
    probes: ProbeSet, ours: Cgroup, space: Namespace, here: str, there: str
) -> None:
    outside, inside = ours.child("docker-" + "a" * 64 + ".scope"), ours.child("docker-" + "b" * 64 + ".scope")
    size = 20_000_000
    before = space.counters()
    server = start(inside, space.command([sys.executable, "-c", _SERVER, there, PORT, str(size)]))
    client = None
    try:
        said(server, "listening")
        client = start(outside, [sys.executable, "-c", _CLIENT, there, PORT, str(size)])
        said(server, "done")
        said(client, "done")
        space.wait_quiet(0.2)
        after = space.counters()
        sent, received = (sum_of(probes, outside, direction, "external") for direction in ("tx", "rx"))
        assert after["tx_bytes"] - before["tx_bytes"] == sent.bytes + ETHERNET_HEADER * sent.skbs
        assert after["tx_packets"] - before["tx_packets"] == sent.skbs
        assert after["rx_bytes"] - before["rx_bytes"] == received.bytes + ETHERNET_HEADER * received.skbs
        assert after["rx_packets"] - before["rx_packets"] == received.skbs
        # The other end of the same wire.
        assert sum_of(probes, inside, "rx", "external") == sent
        assert sum_of(probes, inside, "tx", "external") == received
        assert sent.bytes > size
        assert sent.segments > sent.skbs, "segments are what the wire carries, skbs what the stack handles"
        assert sum_of(probes, outside, "tx") == sent, "and nothing is in another class"
    finally:
        for process in (server, client):
            if process is not None:
                process.kill()
                process.communicate()


@pytest.mark.parametrize(("there", "header"), [(THERE4, 28), (THERE6, 48)], ids=["ipv4", "ipv6"])
def test_udp_equals_what_was_sent(
    probes: ProbeSet, ours: Cgroup, space: Namespace, there: str, header: int
) -> None:
    outside = ours.child("docker-" + "a" * 64 + ".scope")
    before = space.counters()
    sender = start(outside, [sys.executable, "-c", _DATAGRAMS, there, PORT, "1000", "300"])
    said(sender, "done")
    sender.communicate()
    sent = sum_of(probes, outside, "tx", "external")
    assert sent == Traffic(1_000 * (300 + header), 1_000, 1_000)
    # The other side has no such port and its kernel says so, at a limited rate: that is received by the socket's owner or nobody.
    assert space.counters()["tx_packets"] - before["tx_packets"] == 1_000


def test_loopback_is_a_class_of_its_own_on_the_host_and_in_a_namespace(
    probes: ProbeSet, ours: Cgroup, space: Namespace
) -> None:
    on_host, in_space = (
        ours.child("docker-" + "a" * 64 + ".scope"),
        ours.child("docker-" + "b" * 64 + ".scope"),
    )
    words = [sys.executable, "-c", _DATAGRAMS, "127.0.0.1", PORT, "500", "100"]
    for cgroup, command in ((on_host, words), (in_space, space.command(words))):
        sender = start(cgroup, command)
        said(sender, "done")
        sender.communicate()
        assert sum_of(probes, cgroup, "tx", "loopback") == Traffic(500 * 128, 500, 500)
        assert sum_of(probes, cgroup, "tx", "internal", "external") == Traffic(0, 0, 0)


def test_internal_and_external_are_split_exactly_and_the_split_changes_live(
    probes: ProbeSet, ours: Cgroup, space: Namespace, tmp_path: Path
) -> None:
    networks = tmp_path / "networks"
    steps = [
        ("# none\n", "external", "external"),
        ("198.51.100.0/24\n", "internal", "external"),
        ("198.51.100.0/24\n2001:db8::/32  # documentation\n", "internal", "internal"),
        ("198.51.100.0/24\n! 198.51.100.2\n2001:db8::/32\n!2001:db8:77::/64\n", "external", "external"),
        ("0.0.0.0/0\n::/0\n", "internal", "internal"),
    ]
    for number, (text, class4, class6) in enumerate(steps):
        networks.write_text(text)
        done = probes.run("networks", str(networks))
        assert (done.returncode, done.stderr) == (0, "")
        cgroup = ours.child(f"docker-{number:064x}.scope")
        for there in (THERE4, THERE6):
            sender = start(cgroup, [sys.executable, "-c", _DATAGRAMS, there, PORT, "100", "200"])
            said(sender, "done")
            sender.communicate()
        expected = {"internal": Traffic(0, 0, 0), "external": Traffic(0, 0, 0)}
        for peer, bytes_ in ((class4, 100 * 228), (class6, 100 * 248)):
            old = expected[peer]
            expected[peer] = Traffic(old.bytes + bytes_, old.skbs + 100, old.segments + 100)
        assert {peer: sum_of(probes, cgroup, "tx", peer) for peer in expected} == expected, text


@pytest.mark.parametrize(
    ("text", "said_of"),
    [
        ("10.0.0.0/8\n10.0.0.0/33\n", "networks:2: 10.0.0.0/33 needs a prefix length of 0 to 32"),
        ("\n# fine\nfe80::/129\n", "networks:3: fe80::/129 needs a prefix length of 0 to 128"),
        ("10.0.0.1/8\n", "networks:1: 10.0.0.1/8 has bits behind its prefix length"),
        ("intranet\n", "networks:1: intranet is no IPv4 or IPv6 address"),
        ("10.0.0.0/\n", "networks:1: 10.0.0.0/ needs a prefix length of 0 to 32"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_changes(
    probes: ProbeSet, tmp_path: Path, text: str, said_of: str
) -> None:
    before = probes.status()["maps"]["classes"]
    (tmp_path / "networks").write_text(text)
    done = probes.run("networks", str(tmp_path / "networks"))
    assert done.returncode == 1
    assert said_of in done.stderr
    assert probes.status()["maps"]["classes"] == before


def test_traffic_of_an_ended_cgroup_stays_until_the_agent_deletes_it(
    probes: ProbeSet, ours: Cgroup, space: Namespace
) -> None:
    made = ours.child("docker-" + "a" * 64 + ".scope")
    sender = start(made, [sys.executable, "-c", _DATAGRAMS, THERE4, PORT, "10", "100"])
    said(sender, "done")
    sender.communicate()
    made.wait_empty()
    made.path.rmdir()
    time.sleep(0.5)
    assert sum_of(probes, made, "tx", "external") == Traffic(1_280, 10, 10)


def test_what_finds_no_room_is_counted(pins: ProbeSet, ours: Cgroup, space: Namespace) -> None:
    pins.load("--max-cgroups", "1", "--max-ended", "1")
    for number in range(6):
        cgroup = ours.child(f"docker-{number:064x}.scope")
        sender = start(cgroup, [sys.executable, "-c", _DATAGRAMS, THERE4, PORT, "10", "100"])
        said(sender, "done")
        sender.communicate()
    assert len(network(pins)) == 2
    lost = overflow(pins)
    assert lost.network_skbs >= 40
    assert lost.network_bytes >= 40 * 128
