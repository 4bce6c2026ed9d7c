"""The TLS of both sides, judged by openssl against a real gRPC server."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from bench.fleet import key_and_request
from collector.door.ca import CertificateAuthority
from wire.identity import new_agent_id
from wire.tls import (
    CHANNEL_OPTIONS,
    SERVER_OPTIONS,
    client_credentials,
    client_credentials_without_certificate,
    server_credentials,
)


class Echo(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, _: request)


class Server:
    """Echoes to whoever shows a certificate of its CA."""

    def __init__(self, directory: Path) -> None:
        self.authority = CertificateAuthority.init(directory / "ca", "example.org", ["127.0.0.1"])
        self.ca_file = directory / "ca" / "ca.crt"
        self.client_ca_pem = self.authority.ca_pem
        self.pair = self.authority.server_pair()
        self.key_file, self.certificate_file = directory / "agent.key", directory / "agent.pem"
        self.key, csr = key_and_request()
        self.certificate = self.authority.issue_agent(csr, new_agent_id(), timedelta(hours=1))
        self.key_file.write_bytes(self.key)
        self.certificate_file.write_bytes(self.certificate)
        self._server = grpc.server(ThreadPoolExecutor(2), handlers=[Echo()], options=SERVER_OPTIONS)
        credentials = server_credentials(lambda: self.pair, lambda: self.client_ca_pem)
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def openssl(self, *words: str) -> str:
        """What `openssl s_client` says of one handshake with the agent's certificate."""
        done = subprocess.run(
            [
                *("openssl", "s_client", "-connect", f"127.0.0.1:{self.port}", "-alpn", "h2"),
                *("-CAfile", self.ca_file, "-key", self.key_file, "-cert", self.certificate_file),
                *words,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # session tickets and frames are printed too
            timeout=20,
            check=False,
        )
        return done.stdout + done.stderr

    def echo(self, credentials: grpc.ChannelCredentials) -> bytes:
        """One call over a connection of its own."""
        with grpc.secure_channel(f"127.0.0.1:{self.port}", credentials, CHANNEL_OPTIONS) as channel:
            answer: bytes = channel.unary_unary("/test/Echo")(b"hello", timeout=10)
            return answer

    def agent(self) -> grpc.ChannelCredentials:
        return client_credentials(self.authority.ca_pem, self.certificate, self.key)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def hung_up_on(shown: str) -> bool:
    """A client hello was sent, and the server closed without a word (gRPC sends no alert)."""
    written = re.search("SSL handshake has read 0 bytes and written ([0-9]+) bytes", shown)
    return written is not None and int(written[1]) > 50 and "Cipher is (NONE)" in shown


def serial(shown: str) -> int:
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    pem = begin + shown.split(begin)[1].split(end)[0] + end
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def test_two_ends_that_can_choose_speak_tls_1_3(server: Server) -> None:
    shown = server.openssl()
    assert "New, TLSv1.3, Cipher is TLS_" in shown
    assert "Verify return code: 0 (ok)" in shown
    assert "ALPN protocol: h2" in shown


def test_tls_1_2_is_spoken_with_aead_suites_only(server: Server) -> None:
    assert "Cipher is ECDHE-ECDSA-AES128-GCM-SHA256" in server.openssl(
        "-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"
    )
    for suite in ("ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES256-SHA"):
        assert hung_up_on(server.openssl("-tls1_2", "-cipher", f"{suite}:@SECLEVEL=0"))


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_versions_before_tls_1_2_are_refused(server: Server, version: str) -> None:
    assert hung_up_on(server.openssl(version, "-cipher", "ALL:@SECLEVEL=0"))


def test_a_client_without_a_certificate_is_refused_and_one_with_it_is_served(server: Server) -> None:
    assert server.echo(server.agent()) == b"hello"
    with pytest.raises(grpc.RpcError) as error:
        server.echo(client_credentials_without_certificate(server.authority.ca_pem))
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_a_client_of_another_ca_is_refused_until_that_ca_is_trusted(server: Server, tmp_path: Path) -> None:
    other = CertificateAuthority.init(tmp_path / "other", "example.org", ["127.0.0.1"])
    key, csr = key_and_request()
    stranger = client_credentials(
        server.authority.ca_pem, other.issue_agent(csr, new_agent_id(), timedelta(hours=1)), key
    )
    with pytest.raises(grpc.RpcError):
        server.echo(stranger)
    server.client_ca_pem += other.ca_pem
    assert server.echo(stranger) == b"hello"
    assert server.echo(server.agent()) == b"hello"


def test_a_server_of_another_ca_is_not_spoken_to(server: Server, tmp_path: Path) -> None:
    other = CertificateAuthority.init(tmp_path / "other", "example.org", ["127.0.0.1"])
    with pytest.raises(grpc.RpcError) as error:
        server.echo(client_credentials(other.ca_pem, server.certificate, server.key))
    assert "CERTIFICATE_VERIFY_FAILED" in str(error.value)


def test_a_new_server_certificate_is_shown_from_the_next_handshake_on(server: Server) -> None:
    before = serial(server.openssl())
    server.authority.issue_server(["127.0.0.1"])
    server.pair = server.authority.server_pair()
    after = serial(server.openssl())
    assert after != before
    assert after == x509.load_pem_x509_certificate(server.pair[1]).serial_number
    assert server.echo(server.agent()) == b"hello"
