"""Who sends what is no message: told from honest ones by what the kernel and the service have counted, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import pytest

from collector.door.noise import (
    FRAMING,
    LOOK_SECONDS,
    NOISE_BYTES,
    STREAM_BYTES,
    Address,
    Noise,
    Received,
    address_of,
    connections,
)
from collector.tally import Tally
from tests.waiting import until
from wire.statuses import Meter
from wire.tls import SERVER_OPTIONS

PEER = "ipv4:192.0.2.1:50000"
ADDRESS = Address("192.0.2.1", 50000)


def too_much(noise: Noise, size: int, unknown_streams: int = 0) -> bool:
    return noise.too_much(Received(9460, ADDRESS, size), unknown_streams)


def there(port: int) -> list[Received]:
    return [received for received, _ in connections(os.listdir("/proc/self/fd"), [port])]


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (PEER, ADDRESS),
        ("ipv6:%5B2001:db8::1%5D:50000", Address("2001:db8::1", 50000)),
        ("ipv6:[2001:db8:0::1]:50000", Address("2001:db8::1", 50000)),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", Address("fe80::1", 50000)),
        ("ipv6:%5B::ffff:192.0.2.1%5D:50000", ADDRESS),
    ],
)
def test_grpc_and_the_kernel_name_the_same_connection(peer: str, address: Address) -> None:
    assert address_of(peer) == address


def test_who_has_no_stream_may_send_what_a_handshake_and_a_call_take() -> None:
    noise = Noise(Tally())
    assert not too_much(noise, NOISE_BYTES)
    assert too_much(noise, NOISE_BYTES + 1)
    assert not too_much(noise, NOISE_BYTES + STREAM_BYTES, unknown_streams=1)
    assert too_much(noise, NOISE_BYTES + STREAM_BYTES + 1, unknown_streams=1)


def test_messages_their_framing_and_what_is_not_read_yet_are_no_noise() -> None:
    noise = Noise(Tally())
    heard = noise.enter(PEER)
    heard.message_bytes = 1 << 30
    honest = NOISE_BYTES + (1 << 30) * (FRAMING + 1) // FRAMING + STREAM_BYTES
    assert not too_much(noise, honest)
    assert too_much(noise, honest + 1)
    noise.enter(PEER)
    assert not too_much(noise, honest + STREAM_BYTES)
    heard.streams = 0
    assert not too_much(noise, honest - STREAM_BYTES), "what it said counts as long as it is there"
    assert too_much(noise, honest)


def test_who_is_gone_is_forgotten_unless_it_came_since_the_kernel_was_asked() -> None:
    noise = Noise(Tally())
    gone, fresh = noise.enter(PEER), noise.enter("ipv4:192.0.2.2:1")
    gone.message_bytes = fresh.message_bytes = 1 << 30
    gone.streams = 0
    noise.forget_all_but([])
    assert noise.enter("ipv4:192.0.2.2:1") is fresh
    assert noise.enter(PEER) is not gone


class Listening:
    """A server in this process."""

    def __init__(self, server: socket.socket) -> None:
        self.server = server
        self.port: int = server.getsockname()[1]
        self.connected: list[tuple[socket.socket, socket.socket]] = []

    def connect(self, host: str) -> tuple[socket.socket, socket.socket]:
        """(client's, server's) side."""
        client = socket.create_connection((host, self.port), timeout=10)
        self.connected.append((client, self.server.accept()[0]))
        return self.connected[-1]


@pytest.fixture
def listening() -> Iterator[Listening]:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        one = Listening(server)
        yield one
        for pair in one.connected:
            for side in pair:
                side.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_says_what_each_connection_has_received(listening: Listening, host: str) -> None:
    quiet, loud = listening.connect(host), listening.connect(host)
    before = os.listdir("/proc/self/fd")
    sent = 100_000
    loud[0].sendall(bytes(sent))
    taken = 0
    while taken < sent:
        taken += len(loud[1].recv(1 << 20))
    loud[1].sendall(bytes(5_000))
    expected = {
        Received(listening.port, Address(host, side.getsockname()[1]), size)
        for (side, _), size in ((quiet, 0), (loud, sent))
    }
    assert set(there(listening.port)) == expected
    assert there(1) == []
    assert os.listdir("/proc/self/fd") == before


def talk(client: socket.socket, server: socket.socket) -> None:
    """Send without end, until either side is told that the other has hung up."""
    server.settimeout(10)
    with contextlib.suppress(ConnectionError):
        while True:
            client.sendall(bytes(10_000))
            if not server.recv(100_000):
                return


async def test_only_who_sent_too_much_is_shut_down(listening: Listening) -> None:
    quiet, loud = listening.connect("127.0.0.1"), listening.connect("127.0.0.1")
    noise = Noise(tally := Tally())
    watching = asyncio.create_task(noise.watch(lambda: {listening.port: 0}))
    quiet[0].sendall(bytes(5_000))
    await asyncio.to_thread(talk, *loud)
    await asyncio.to_thread(until, lambda: tally.refusals[Meter.BUFFER_OVERFLOW, "noise"] == 1)
    assert quiet[1].recv(10_000) == bytes(5_000)
    quiet[0].sendall(b"x")
    assert quiet[1].recv(1) == b"x"
    assert [one.address.port for one in there(listening.port)] == [quiet[0].getsockname()[1]]
    watching.cancel()


async def test_a_delivery_before_anybody_reads_the_hello_is_no_noise() -> None:
    """gRPC takes in 4 MiB of a stream before its handler has begun, which a busy event loop can put off."""
    noise = Noise(tally := Tally())
    begin = asyncio.Event()

    async def handler(
        requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        await begin.wait()
        heard = noise.enter(context.peer())
        async for message in requests:
            heard.message_bytes += len(message)
        yield b"thanks"

    server = grpc.aio.server(options=SERVER_OPTIONS)
    methods = {"Deliver": grpc.stream_stream_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    watching = asyncio.create_task(noise.watch(lambda: {port: 1}))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream("/Test/Deliver")(iter([bytes(3 << 20)] * 2))
        await asyncio.to_thread(until, lambda: [one.size > 4 << 20 for one in there(port)] == [True])
        await asyncio.sleep(2 * LOOK_SECONDS)
        begin.set()
        assert [answer async for answer in call] == [b"thanks"]
    assert not tally.refusals
    watching.cancel()
    await server.stop(0)
