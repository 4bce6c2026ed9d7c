"""HTTP/2 frames by hand (RFC 9113), for what no proper client sends: resets, pings, settings and headers without end."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
CANCEL = 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME_BYTES = 16_384
DELIVER = "/weighbridge.v1.Ingest/Deliver"
ENROL = "/weighbridge.v1.Enrolment/Enrol"

Field = tuple[str, str]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def ping() -> bytes:
    return frame(PING, 0, 0, bytes(8))


def settings(pairs: Sequence[tuple[int, int]] = ()) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack("!HI", *pair) for pair in pairs))


def priority(stream: int) -> bytes:
    return frame(PRIORITY, 0, stream, bytes(5))


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big"))


def request(stream: int, path: str, more: Sequence[Field] = ()) -> bytes:
    """The head of a gRPC call, in as many frames as it takes."""
    fields = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", "collector"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]
    block = b"".join(_literal(name, value) for name, value in fields)
    parts = [block[at : at + MAX_FRAME_BYTES] for at in range(0, len(block), MAX_FRAME_BYTES)]
    out = []
    for index, part in enumerate(parts):
        kind = HEADERS if index == 0 else CONTINUATION
        out.append(frame(kind, END_HEADERS if part is parts[-1] else 0, stream, part))
    return b"".join(out)


def message(stream: int, body: bytes, flags: int = 0) -> bytes:
    """One gRPC message, uncompressed, in DATA frames."""
    data = b"\0" + len(body).to_bytes(4, "big") + body
    return b"".join(
        frame(
            DATA, flags if at + MAX_FRAME_BYTES >= len(data) else 0, stream, data[at : at + MAX_FRAME_BYTES]
        )
        for at in range(0, len(data), MAX_FRAME_BYTES)
    )


def _literal(name: str, value: str) -> bytes:
    """A header field without indexing and without Huffman (RFC 7541, 6.2.2)."""
    return b"\0" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    data = text.encode()
    length, out = len(data), bytearray()
    if length < 127:
        return bytes((length,)) + data
    out.append(127)
    length -= 127
    while length >= 128:
        out.append(length % 128 + 128)
        length //= 128
    out.append(length)
    return bytes(out) + data


def client_context(ca_file: Path, agent_file: Path | None) -> ssl.SSLContext:
    """TLS of an agent (certificate and key in one file), or of somebody without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca_file)
    context.set_alpn_protocols(["h2"])
    if agent_file is not None:
        context.load_cert_chain(agent_file)
    return context


class Connection:
    """A TLS connection on which the HTTP/2 preface has been sent."""

    def __init__(
        self, port: int, context: ssl.SSLContext, seconds: float = 10.0, host: str = "127.0.0.1"
    ) -> None:
        raw = socket.create_connection((host, port), timeout=seconds)
        self._seconds = seconds
        try:
            self._socket = context.wrap_socket(raw)
            self._socket.sendall(PREFACE + settings())
        except BaseException:
            raw.close()
            raise

    def send(self, data: bytes) -> None:
        """OSError once the other side has hung up, or does not read."""
        self._socket.sendall(data)

    def acknowledge(self) -> None:
        """The SETTINGS of the other side, as an honest client does."""
        self.send(frame(SETTINGS, ACK, 0))

    def send_paced(self, stream: int, data: bytes) -> None:
        """DATA, throwing away what comes meanwhile."""
        for at in range(0, len(data), MAX_FRAME_BYTES):
            self.send(frame(DATA, 0, stream, data[at : at + MAX_FRAME_BYTES]))
            self.drain()

    @property
    def acknowledged_bytes(self) -> int:
        """What the other side's kernel has acknowledged: tcpi_bytes_acked of struct tcp_info (linux/tcp.h)."""
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        (acknowledged,) = struct.unpack("=120xQ", info)
        assert isinstance(acknowledged, int)
        return acknowledged

    def drain(self) -> None:
        """Throw away what has come. OSError once the other side has hung up."""
        self._socket.setblocking(False)
        try:
            while self._socket.recv(65_536):
                pass
            raise ConnectionResetError("hung up")
        except ssl.SSLWantReadError:
            pass
        finally:
            self._socket.settimeout(self._seconds)

    def received(self, seconds: float, awaited: bytes | None = None) -> bytes:
        """What comes in that time, or until what is awaited is among it, or the other side hangs up."""
        ends, out = time.monotonic() + seconds, b""
        while (left := ends - time.monotonic()) > 0 and (awaited is None or awaited not in out):
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65_536)
            except OSError:
                break
            if not data:
                break
            out += data
        return out

    def closed_within(self, seconds: float) -> bool:
        """Whether the other side hangs up in that time."""
        self._socket.settimeout(seconds)
        try:
            while self._socket.recv(65_536):
                pass
        except (TimeoutError, ssl.SSLWantReadError):
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
