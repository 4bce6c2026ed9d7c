"""The CA and its registry, judged by openssl and by what they refuse."""

from __future__ import annotations

import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from bench.fleet import key_and_request
from collector.door.authenticate import Authenticator, NotAuthenticated, Standing
from collector.door.ca import CertificateAuthority, CsrRefused
from collector.door.registry import Registry, TokenRefused
from collector.errors import CollectorError
from wire.identity import AgentId, new_agent_id

DOMAIN = "example.org"


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.init(tmp_path / "ca", DOMAIN, ["collector.example.org", "127.0.0.1"])


def context(pem: bytes) -> dict[str, list[bytes]]:
    return {"x509_pem_cert": [pem]}


def openssl(*words: str) -> str:
    return subprocess.run(["openssl", *words], capture_output=True, text=True, check=True).stdout


def test_openssl_accepts_what_the_ca_signs(authority: CertificateAuthority, tmp_path: Path) -> None:
    agent = new_agent_id()
    _, csr = key_and_request()
    (tmp_path / "agent.pem").write_bytes(authority.issue_agent(csr, agent, timedelta(hours=24)))
    ca = str(tmp_path / "ca" / "ca.crt")
    assert "OK" in openssl(
        "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", ca, str(tmp_path / "agent.pem")
    )
    assert "OK" in openssl(
        "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", ca, str(tmp_path / "ca" / "server.pem")
    )
    text = openssl("x509", "-in", str(tmp_path / "agent.pem"), "-noout", "-text")
    assert f"URI:spiffe://{DOMAIN}/agent/{agent}" in text
    assert "CA:FALSE" in text
    with pytest.raises(subprocess.CalledProcessError):
        openssl("verify", "-purpose", "sslserver", "-CAfile", ca, str(tmp_path / "agent.pem"))


def test_secrets_are_for_their_owner_only(authority: CertificateAuthority) -> None:
    for name in ("ca.key", "server.pem"):
        assert (authority.directory / name).stat().st_mode & 0o077 == 0


def test_an_existing_ca_is_never_overwritten(authority: CertificateAuthority) -> None:
    before = authority.ca_pem
    with pytest.raises(CollectorError, match="never overwritten"):
        CertificateAuthority.init(authority.directory, DOMAIN, ["x"])
    assert (authority.directory / "ca.crt").read_bytes() == before


def test_a_missing_ca_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(CollectorError, match="ca init"):
        CertificateAuthority(tmp_path)


def _request(key: object) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "csr",
    [
        b"",
        b"rubbish",
        b"\x30" * 9_000,
        _request(ec.generate_private_key(ec.SECP192R1())),
        _request(ed25519.Ed25519PrivateKey.generate()),
        key_and_request()[1][:-5] + b"xxxxx",
    ],
    ids=["empty", "rubbish", "huge", "weak curve", "other algorithm", "bad signature"],
)
def test_a_request_that_cannot_be_signed_says_why(authority: CertificateAuthority, csr: bytes) -> None:
    with pytest.raises(CsrRefused):
        authority.issue_agent(csr, new_agent_id(), timedelta(hours=1))


def test_an_enrolled_agent_is_recognised_with_its_tenants(authority: CertificateAuthority) -> None:
    agent = new_agent_id()
    pem = authority.issue_agent(key_and_request()[1], agent, timedelta(hours=1))
    authority.registry.add_agent(agent, "host", frozenset({"acme"}))
    peer = Authenticator(DOMAIN, authority.registry).peer(context(pem))
    assert peer.agent_id == agent
    assert peer.tenants == frozenset({"acme"})


def test_strangers_are_refused_by_name(authority: CertificateAuthority, tmp_path: Path) -> None:
    authenticator = Authenticator(DOMAIN, authority.registry)
    agent = new_agent_id()
    pem = authority.issue_agent(key_and_request()[1], agent, timedelta(hours=1))
    other = CertificateAuthority.init(tmp_path / "other", "elsewhere.org", ["x"])
    foreign = other.issue_agent(key_and_request()[1], agent, timedelta(hours=1))
    server = (authority.directory / "server.pem").read_bytes()
    expired = authority.issue_agent(key_and_request()[1], agent, timedelta(seconds=-1))
    with pytest.raises(NotAuthenticated, match="METER-003.*not enrolled here"):
        authenticator.peer(context(pem))
    authority.registry.add_agent(agent, "host", None)
    for auth, says in (
        ({}, "no client certificate"),
        (context(foreign), "not for one agent"),
        (context(server[server.index(b"-----BEGIN CERT") :]), "not for one agent"),
        (context(b"rubbish"), "names no agent"),
        (context(expired), "revoked or has expired"),
    ):
        with pytest.raises(NotAuthenticated, match=says):
            authenticator.peer(auth)  # type: ignore[arg-type]


def test_revocation_is_seen_at_once_by_another_process_view(authority: CertificateAuthority) -> None:
    agent = new_agent_id()
    pem = authority.issue_agent(key_and_request()[1], agent, timedelta(hours=1))
    authority.registry.add_agent(agent, "host", None)
    authenticator = Authenticator(DOMAIN, Registry(authority.directory / "registry.db"))
    peer = authenticator.peer(context(pem))
    version = authenticator.version
    assert authenticator.standing(peer) is Standing.GOOD
    assert authority.registry.permit(agent, frozenset({"acme"}))
    assert authenticator.standing(peer) is Standing.CHANGED
    assert authenticator.version != version
    version = authenticator.version
    assert authority.registry.revoke(agent) == 2
    assert authenticator.standing(peer) is Standing.REVOKED
    assert authenticator.version != version
    assert authenticator.version == authenticator.version
    assert not authority.registry.permit(new_agent_id(), None)
    assert authority.registry.revoke("nobody") == 0


def test_a_token_is_good_once_and_only_for_what_it_was_made_for(authority: CertificateAuthority) -> None:
    registry, now = authority.registry, int(time.time())
    secret = registry.add_token(frozenset({"acme"}), None, 600)
    record = registry.spend(secret, None, "host", now)
    assert record.tenants == frozenset({"acme"})
    with pytest.raises(TokenRefused, match="used already"):
        registry.spend(secret, None, "host", now)
    with pytest.raises(TokenRefused, match="not known"):
        registry.spend("guess", None, "host", now)
    late = registry.add_token(None, None, 600)
    with pytest.raises(TokenRefused, match="expired"):
        registry.spend(late, None, "host", now + 3_601)
    mine, wanted = registry.add_token(None, None, 60), AgentId(new_agent_id())
    with pytest.raises(TokenRefused, match="--agent-id"):
        registry.spend(mine, wanted, "host", now)
    back = registry.add_token(None, wanted, 60)
    assert registry.spend(back, wanted, "host", now).agent_id == wanted
    with pytest.raises(CollectorError, match="at most 3600"):
        registry.add_token(None, None, 7_200)


def test_the_collectors_certificate_is_renewed_at_half_life(
    authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = authority.server_pair()
    assert authority.server_pair() == before
    monkeypatch.setattr("collector.door.ca.SERVER_LIFE", timedelta(seconds=60))
    after = authority.server_pair()
    assert after != before
    assert authority.server_hosts() == ["collector.example.org", "127.0.0.1"]
