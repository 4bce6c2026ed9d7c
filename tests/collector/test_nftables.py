"""The rules of the operator guide: what the collector cannot tell apart, the kernel counts by address."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import http2
from bench.agent import rss_mib
from bench.netns import THERE4, namespace
from bench.site import Site
from tests.waiting import until

GUIDE = Path(__file__).parents[2] / "docs/operator-guide.md"


needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft: apt-get install nftables")


@contextlib.contextmanager
def guarded(directory: Path) -> Iterator[Site]:
    """A collector in a namespace with the rules, at their ports."""
    rules = re.search(r"^```nft\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert rules is not None
    with namespace() as inside, Site(directory, inside.command([])) as site:
        subprocess.run(inside.command(["nft", "-f", "-"]), input=rules[1], text=True, check=True)
        listen = {"ingest": "0.0.0.0:9460", "enrolment": "0.0.0.0:9461"}
        site.prepare(collector={"listen": listen, "connections": {"handshake": "1m"}})
        site.start_collector()
        yield site


@pytest.mark.root
@needs_nft
def test_an_address_gets_as_many_connections_as_the_rules_say_and_again_when_they_are_closed(
    tmp_path: Path,
) -> None:
    with guarded(tmp_path / "site"):
        opened = [_connected() for _ in range(40)]
        assert sum(one is not None for one in opened) == 32
        for one in opened:
            if one is not None:
                one.close()
        # The kernel forgets a connection when the collector has closed its end, too.
        until(_works, 30)


@pytest.mark.root
@needs_nft
def test_who_floods_the_enrolment_door_gets_few_bytes_in(tmp_path: Path) -> None:
    with guarded(tmp_path / "site") as site:
        assert site.collector is not None
        before = rss_mib(site.collector.pid)
        nobody = http2.client_context(site.directory / "collector/ca/ca.crt", None)
        begun = time.monotonic()
        taken = 0
        while time.monotonic() < begun + 5:
            # What is dropped keeps its sender waiting, and the collector hangs up on it.
            with contextlib.suppress(OSError), http2.Connection(9461, nobody, 1.0, THERE4) as connection:
                connection.acknowledge()
                try:
                    while time.monotonic() < begun + 5:
                        connection.send(http2.priority(1) * 1_000)
                finally:
                    taken += connection.acknowledged_bytes
        seconds = time.monotonic() - begun
        assert 0 < taken < (256 << 10) * seconds + (3 << 20), f"{taken} bytes in {seconds:.1f} s"
        assert rss_mib(site.collector.pid) < before + 20


def _connected() -> socket.socket | None:
    one = socket.socket()
    one.settimeout(0.1)
    try:
        one.connect((THERE4, 9460))
    except OSError:
        one.close()
        return None
    time.sleep(0.02)  # below the bound of new ones a second
    return one


def _works() -> bool:
    one = _connected()
    if one is not None:
        one.close()
    return one is not None
