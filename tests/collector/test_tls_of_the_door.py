"""Who gets through the TLS handshake of a running collector, and what is negotiated: judged by openssl, and by what comes
after the handshake.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from bench import http2
from bench.fleet import SimulatedAgent, Stream, enrol, key_and_request
from bench.http2 import Connection, client_context
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door
from wire.identity import new_agent_id
from wire.tls import CHANNEL_OPTIONS, client_credentials
from wire.v1.ingest_pb2_grpc import IngestStub


@pytest.fixture
def s_client(door: Door, tmp_path: Path) -> Callable[..., tuple[bool, str]]:
    """`openssl s_client` with an agent's certificate: (did the handshake succeed, what was shown)."""
    good = certificate_file(door.agent(), tmp_path)

    def run(*words: str, certificate: Path | None = good) -> tuple[bool, str]:
        shown = [] if certificate is None else ["-cert", certificate, "-key", certificate]
        ca = door.site.directory / "collector" / "ca" / "ca.crt"
        done = subprocess.run(
            ["openssl", "s_client", "-connect", door.address, "-alpn", "h2", "-CAfile", ca, *shown, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
        return done.returncode == 0, done.stdout + done.stderr

    return run


def certificate_file(agent: SimulatedAgent, directory: Path) -> Path:
    file = directory / f"{agent.agent_id}.pem"
    file.write_bytes(agent.key_pem + agent.certificate_pem)
    return file


def certificate_of(authority: CertificateAuthority, life: timedelta) -> SimulatedAgent:
    agent_id = new_agent_id()
    key, csr = key_and_request()
    chain = authority.issue_agent(csr, agent_id, life)
    authority.registry.add_agent(agent_id, "host", None)
    return SimulatedAgent(agent_id, client_credentials(authority.ca_pem, chain, key), chain, key)


def test_tls_1_3_and_http_2_are_negotiated(s_client: Callable[..., tuple[bool, str]]) -> None:
    done, shown = s_client()
    assert done
    assert "New, TLSv1.3, Cipher is TLS_" in shown
    assert "ALPN protocol: h2" in shown
    assert "Verify return code: 0 (ok)" in shown


@pytest.mark.parametrize(
    "suite",
    ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"],
)
def test_of_tls_1_2_only_ecdhe_with_aead_is_left(
    s_client: Callable[..., tuple[bool, str]], suite: str
) -> None:
    done, shown = s_client("-tls1_2", "-cipher", suite)
    assert done
    assert f"Cipher is {suite}" in shown


@pytest.mark.parametrize(
    "words",
    [
        ("-tls1", "-cipher", "ALL:@SECLEVEL=0"),
        ("-tls1_1", "-cipher", "ALL:@SECLEVEL=0"),
        ("-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA384:@SECLEVEL=0"),
        ("-tls1_2", "-cipher", "AES128-SHA:AES128-GCM-SHA256:@SECLEVEL=0"),
        ("-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256:@SECLEVEL=0"),
        ("-tls1_2", "-cipher", "NULL:aNULL:@SECLEVEL=0"),
    ],
    ids=["TLS 1.0", "TLS 1.1", "CBC", "static RSA", "DHE", "null"],
)
def test_everything_older_or_weaker_is_refused(
    s_client: Callable[..., tuple[bool, str]], words: tuple[str, ...]
) -> None:
    done, shown = s_client(*words)
    assert not done
    assert "Cipher is (NONE)" in shown


def test_without_a_valid_certificate_of_this_ca_the_handshake_fails(
    door: Door, s_client: Callable[..., tuple[bool, str]], tmp_path: Path
) -> None:
    other = CertificateAuthority.init(tmp_path / "ca", "demo.example", ["127.0.0.1"])
    outsiders = {
        "none": None,
        "unknown CA": certificate_file(enrol(other), tmp_path),
        "expired": certificate_file(certificate_of(door.authority, timedelta(seconds=-30)), tmp_path),
        "a server's": door.site.directory / "collector" / "ca" / "server.pem",
    }
    for name, certificate in outsiders.items():
        # In TLS 1.2 the client hears of it within the handshake.
        assert not s_client("-tls1_2", certificate=certificate)[0], name
    assert s_client("-tls1_2")[0]
    ca = door.site.directory / "collector" / "ca" / "ca.crt"
    for name, certificate in outsiders.items():
        # In TLS 1.3 it has sent its request already, and is hung up on without an answer.
        with Connection(door.site.ports["ingest"], client_context(ca, certificate)) as connection:
            try:
                connection.send(http2.request(1, http2.DELIVER))
            except OSError:
                continue
            assert connection.received(5) == b"", name


def test_a_revoked_certificate_gets_through_the_handshake_and_no_further(door: Door) -> None:
    agent = certificate_of(door.authority, timedelta(hours=1))
    serial = next(c.serial for c in door.authority.registry.certificates() if c.agent_id == agent.agent_id)
    door.open(agent).close()
    assert door.authority.registry.revoke(serial) == 1
    with grpc.secure_channel(door.address, agent.credentials, CHANNEL_OPTIONS) as channel:
        with pytest.raises(grpc.RpcError, match="METER-003") as error:
            list(IngestStub(channel).Deliver(iter([Stream(agent.agent_id, 1).hello()]), timeout=10))
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
