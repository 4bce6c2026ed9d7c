"""The rules of the operator guide: what the collector cannot tell apart, the kernel counts by address."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from bench.netns import THERE4, namespace
from bench.site import Site
from tests.waiting import until

GUIDE = Path(__file__).parents[2] / "docs/operator-guide.md"


@pytest.mark.root
@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft: apt-get install nftables")
def test_an_address_gets_as_many_connections_as_the_rules_say_and_again_when_they_are_closed(
    tmp_path: Path,
) -> None:
    rules = re.search(r"^```nft\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert rules is not None
    with namespace() as inside, Site(tmp_path / "site", inside.command([])) as site:
        subprocess.run(inside.command(["nft", "-f", "-"]), input=rules[1], text=True, check=True)
        site.prepare(collector={"listen": {"ingest": "0.0.0.0:9460"}, "connections": {"handshake": "1m"}})
        site.start_collector()
        opened = [_connected() for _ in range(40)]
        assert sum(one is not None for one in opened) == 32
        for one in opened:
            if one is not None:
                one.close()
        # The kernel forgets a connection when the collector has closed its end, too.
        until(_works, 30)


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
