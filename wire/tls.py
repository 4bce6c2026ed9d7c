"""TLS credentials and channel options of both sides.

TLS 1.3 is what two Weighbridge ends negotiate. grpcio offers no switch to refuse 1.2, so the 1.2 suites
are cut down to ECDHE with AEAD; the variable is read when gRPC makes its first credentials.
"""

from __future__ import annotations

import os

os.environ["GRPC_SSL_CIPHER_SUITES"] = ":".join(  # noqa: FLY002 - one line per kind of suite
    (
        "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256",
        "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305",
    )
)

from collections.abc import Callable

import grpc

from wire.limits import MAX_MESSAGE_BYTES, MAX_METADATA_BYTES

KEEPALIVE_MS = 30_000

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Each channel its own connection, so that a reconnect really is one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]

SERVER_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", 16),
    # None but `identity`: gRPC opens messages on the threads that answer everybody, and batches are packed already.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # A stream may be ahead of its reader by one message's worth, on a fast link, too: 40 MB/s at a round trip of 100 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", MAX_MESSAGE_BYTES),
    # Until the other side acknowledges our SETTINGS, gRPC holds it to nothing they say: 16 MiB of metadata a stream,
    # not 16 KiB. Two round trips are enough for an honest one.
    ("grpc.http2.settings_timeout", 3_000),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 4),
    ("grpc.keepalive_time_ms", 4 * KEEPALIVE_MS),
    ("grpc.so_reuseport", 0),
]

PemPair = tuple[bytes, bytes]
"""(private key, certificate chain), PEM."""


def client_credentials(
    ca_pem: bytes, certificate_chain_pem: bytes, key_pem: bytes
) -> grpc.ChannelCredentials:
    """Of an enrolled agent: verifies the collector and shows the agent's certificate."""
    return grpc.ssl_channel_credentials(ca_pem, key_pem, certificate_chain_pem)


def client_credentials_without_certificate(ca_pem: bytes) -> grpc.ChannelCredentials:
    """Of an agent that enrols: verifies the collector, has nothing to show yet."""
    return grpc.ssl_channel_credentials(ca_pem)


def server_credentials(
    current: Callable[[], PemPair], client_ca_pem: Callable[[], bytes] | None
) -> grpc.ServerCredentials:
    """Of the collector. `current` is asked at each handshake, so a renewed certificate needs no restart.

    With `client_ca_pem` a client certificate from that CA is demanded, without it none is asked for.
    """

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [current()], client_ca_pem() if client_ca_pem else None
        )

    last: list[tuple[PemPair, bytes | None]] = [(current(), client_ca_pem() if client_ca_pem else None)]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        now = (current(), client_ca_pem() if client_ca_pem else None)
        if now == last[0]:
            return None
        last[0] = now
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        fetch,  # type: ignore[arg-type] # None means unchanged, which the stubs do not know
        require_client_authentication=client_ca_pem is not None,
    )
