"""What connections send that is no message: floods of HTTP/2 frames.

gRPC reads ahead without a bound from a connection that never falls silent (docs/decisions/0025), and tells nobody of
frames. But the kernel counts what a connection has received, and the service what of it were messages. Where that differs
by more than honest framing the connection is shut down in the kernel, which for gRPC is a peer that hung up. Whoever is
shut down by mistake connects again and has lost nothing. Since it looks at the connections, it is also who sees that many
have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from ipaddress import IPv6Address
from operator import attrgetter
from typing import NamedTuple
from urllib.parse import unquote

from collector.door.pressure import FreeMemory, resident_bytes
from collector.tally import Tally
from wire.daemon.journal import Journal
from wire.limits import MAX_MESSAGE_BYTES
from wire.statuses import Meter

NOISE_BYTES = 256 << 10
"""Who enrols sends 10 KiB, without a stream."""
FRAMING = 16
"""One part in so many of the messages' bytes may be TLS, headers and pings; a two-hundredth is usual."""
STREAM_BYTES = 2 * MAX_MESSAGE_BYTES
"""Of a stream, what has come and is not read yet: a message, and the window beyond it."""

LOOK_SECONDS, RISING_SECONDS = 0.25, 0.05
"""Between two looks at the connections: usually, and while more memory is in use than before."""
RISE_BYTES = 4 << 20
REST, RISING_REST = 100, 20
"""At least so many times as long as a look took, likewise: some 20 us a connection."""
AT_ONCE = 16
"""Descriptors that are looked at before it is others' turn."""
NOTE_SECONDS = 10.0
"""Between two lines in the journal."""

_TCP_INFO_BYTES = 136
_state_and_size = struct.Struct("=B127xQ").unpack
"""tcpi_state and, since Linux 4.1, tcpi_bytes_received of struct tcp_info (linux/tcp.h)."""
_ESTABLISHED = 1

log = Journal("collector.noise")


class Address(NamedTuple):
    """The other end of a connection."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Received(NamedTuple):
    """What the kernel says of one connection."""

    port: int
    """Ours."""
    address: Address
    size: int


class Heard:
    """What the service says of one connection."""

    __slots__ = ("message_bytes", "streams")

    def __init__(self) -> None:
        self.message_bytes = 0
        self.streams = 0
        """Open ones that the service knows."""

    def most_bytes(self, unknown_streams: int) -> int:
        """What has come in at most if it is honest, and gRPC has so many more streams for the service."""
        framing = NOISE_BYTES + self.message_bytes // FRAMING
        return self.message_bytes + framing + (self.streams + unknown_streams) * STREAM_BYTES


_NOTHING = Heard()


class Noise:
    """Messages by connection, and who sends too much besides. Of one thread."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._heard: dict[Address, Heard] = {}
        """Some of them may be gone."""
        self._alive: set[Address] = set()
        """At the last look."""
        self._free = FreeMemory()
        self._unnoted: list[Received] = []
        self._noted = -math.inf

    def enter(self, peer: str) -> Heard:
        """A stream begins, of whom gRPC calls so. Whoever serves it counts its messages and when it ends."""
        heard = self._heard.setdefault(address_of(peer), Heard())
        heard.streams += 1
        return heard

    def too_much(self, received: Received, unknown_streams: int) -> bool:
        """Whether this connection has sent more than it may."""
        return received.size > self._heard.get(received.address, _NOTHING).most_bytes(unknown_streams)

    def forget_all_but(self, alive: Collection[Address]) -> None:
        """All the others are gone, if they have no stream."""
        self._heard = {at: heard for at, heard in self._heard.items() if heard.streams or at in alive}

    async def watch(self, ports_now: Callable[[], Mapping[int, int]]) -> None:
        """Shut down who sends too much, before gRPC's reading ahead of it takes much memory. Runs until cancelled.

        By port, `ports_now` says how many streams of a connection may have begun of which the service was not told yet.
        """
        floor_bytes = resident_bytes()
        took_seconds, looked = 0.0, -math.inf
        while True:
            await asyncio.sleep(RISING_SECONDS)
            used_bytes = resident_bytes()
            floor_bytes = min(floor_bytes, used_bytes)
            rising = used_bytes >= floor_bytes + RISE_BYTES
            rest_seconds = took_seconds * RISING_REST if rising else max(took_seconds * REST, LOOK_SECONDS)
            if time.monotonic() < looked + rest_seconds:
                continue
            took_seconds, ended, gone = await self._look(ports_now())
            if rising:
                self._free.collect()
            await self._free.look(gone)
            self._note(ended)
            floor_bytes, looked = resident_bytes(), time.monotonic()

    async def _look(self, ports: Mapping[int, int]) -> tuple[float, list[Received], int]:
        """At all connections once: seconds that took others their turn, those that were shut down, how many had gone."""
        took_seconds = 0.0
        alive: set[Address] = set()
        ended = []
        descriptors = os.listdir("/proc/self/fd")
        for first in range(0, len(descriptors), AT_ONCE):
            begun = time.monotonic()
            for received, connection in connections(descriptors[first : first + AT_ONCE], ports):
                alive.add(received.address)
                if self.too_much(received, ports[received.port]):
                    with contextlib.suppress(OSError):  # the other end was faster
                        connection.shutdown(socket.SHUT_RDWR)
                    ended.append(received)
            took_seconds += time.monotonic() - begun
            await asyncio.sleep(0)
        self.forget_all_but(alive)
        gone = len(self._alive - alive)
        self._alive = alive
        return took_seconds, ended, gone

    def _note(self, ended: list[Received]) -> None:
        """Count them all; a line in the journal is about all since the last one."""
        if ended:
            self._tally.refusals[Meter.BUFFER_OVERFLOW, "noise"] += len(ended)
            self._unnoted += ended
        if self._unnoted and time.monotonic() >= self._noted + NOTE_SECONDS:
            worst = max(self._unnoted, key=attrgetter("size"))
            log.warning(
                "noise_ended",
                code=Meter.BUFFER_OVERFLOW,
                connections=len(self._unnoted),
                address=str(worst.address),
                bytes_received=worst.size,
            )
            self._noted = time.monotonic()
            self._unnoted = []


def address_of(peer: str) -> Address:
    """From gRPC's name: ipv4:192.0.2.1:50000, ipv6:%5B2001:db8::1%5D:50000."""
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    return _address(host.strip("[]"), int(port))


def connections(
    descriptors: Iterable[str], ports: Collection[int]
) -> Iterator[tuple[Received, socket.socket]]:
    """The established TCP connections to these local ports; a socket is closed when the next one is asked for."""
    for name in descriptors:
        with contextlib.suppress(OSError), contextlib.closing(_own(int(name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and (port := one.getsockname()[1]) in ports:
                host, remote_port, *_ = one.getpeername()  # OSError of one that listens
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                state, size = _state_and_size(info)
                if state == _ESTABLISHED:
                    yield Received(port, _address(host, remote_port), size), one


def _own(descriptor: int) -> socket.socket:
    """A second descriptor of a socket: whoever closes the first one meanwhile closes no other's. OSError: it is none."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError(f"{descriptor} is no socket")
    mine = os.dup(descriptor)
    try:
        return socket.socket(fileno=mine)
    except OSError:
        os.close(mine)
        raise


def _address(host: str, port: int) -> Address:
    if ":" in host:
        plain = IPv6Address(host.partition("%")[0])
        host = str(plain.ipv4_mapped or plain)
    return Address(host, port)
