"""A network namespace with a veth pair into it, for tests and benchmarks; gone afterwards.

Addresses are of the documentation ranges (RFC 5737, RFC 3849), so they collide with nothing and are external unless
somebody says otherwise.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE4, THERE4 = "198.51.100.1", "198.51.100.2"
HERE6, THERE6 = "2001:db8:77::1", "2001:db8:77::2"


class Namespace:
    def __init__(self, name: str, device: str, peer: str) -> None:
        self.name = name
        self.device = device
        """Our end of the pair, outside of the namespace."""
        self.peer = peer

    def command(self, words: Sequence[str]) -> list[str]:
        """`words` as a command that runs inside."""
        return ["ip", "netns", "exec", self.name, *words]

    def wait_quiet(self, seconds: float, at_most: float = 20.0) -> None:
        """Until nothing crossed the pair for that long."""
        deadline = time.monotonic() + at_most
        last, since = self.counters(), time.monotonic()
        while time.monotonic() - since < seconds:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.device} is never quiet")
            time.sleep(0.02)
            if (now := self.counters()) != last:
                last, since = now, time.monotonic()

    def know_each_other(self) -> None:
        """Enter the neighbours for good, so that nothing but what is asked for crosses the pair."""
        ends = ((None, self.device, THERE4, THERE6), (self.name, self.peer, HERE4, HERE6))
        macs = {
            None: _address(["cat", f"/sys/class/net/{self.device}/address"]),
            self.name: _address(self.command(["cat", f"/sys/class/net/{self.peer}/address"])),
        }
        for where, device, *peers in ends:
            other = macs[self.name if where is None else None]
            for peer in peers:
                inside = [] if where is None else ["-n", where]
                _ip(*inside, "neighbour", "replace", peer, "lladdr", other, "dev", device, "nud", "permanent")

    def counters(self) -> dict[str, int]:
        """rx and tx bytes and packets of our end."""
        folder = Path("/sys/class/net") / self.device / "statistics"
        return {
            name: int((folder / name).read_text())
            for name in ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets", "rx_dropped", "tx_dropped")
        }


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """Root is needed."""
    name, device = f"wb-{os.getpid()}", f"wb{os.getpid() % 1_000_000}a"
    peer = device[:-1] + "b"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", device, "type", "veth", "peer", "name", peer, "netns", name)
        # The kernel's own router solicitations and listener reports are not to be, or to be over at once.
        for end, inside in ((device, []), (peer, ["ip", "netns", "exec", name])):
            link = ["ip", "link", "set", end, "addrgenmode", "none"]
            report = ["sysctl", "-q", f"net.ipv6.conf.{end}.mldv2_unsolicited_report_interval=1"]
            for words in (link, report):
                subprocess.run([*inside, *words], check=True, capture_output=True)
        for address, length in ((HERE4, 24), (HERE6, 64)):
            _ip("address", "add", f"{address}/{length}", "dev", device, *(["nodad"] if length == 64 else []))
        for address, length in ((THERE4, 24), (THERE6, 64)):
            _ip(
                "-n",
                name,
                "address",
                "add",
                f"{address}/{length}",
                "dev",
                peer,
                *(["nodad"] if length == 64 else []),
            )
        _ip("link", "set", device, "up")
        _ip("-n", name, "link", "set", peer, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        made = Namespace(name, device, peer)
        made.wait_quiet(0.5)
        yield made
    finally:
        # The pair goes with the namespace, once its last process has.
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", device], capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _address(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
