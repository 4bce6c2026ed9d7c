"""When the collector's certificates end: read without changing anything."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from collector.cli import main
from collector.config import Settings, Tls
from collector.door.ca import ROOT_LIFE, SERVER_LIFE, CertificateAuthority
from collector.door.expiry import expiries

A_DAY = timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.init(tmp_path / "ca", "example.org", ["collector.example.org"])


def test_ends_are_those_of_the_files_whoever_made_them(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    own = dict(expiries(Settings(state_dir=tmp_path)))
    assert ROOT_LIFE - SERVER_LIFE - A_DAY < own["ca"] - own["server"] < ROOT_LIFE - SERVER_LIFE + A_DAY
    ca = tmp_path / "ca" / "ca.crt"
    foreign = Tls(certificate_file=ca, key_file=ca, client_ca_file=ca, trust_domain="example.org")
    assert dict(expiries(Settings(tls=foreign))) == {"server": own["ca"], "ca": own["ca"]}
    (tmp_path / "ca" / "server.pem").write_text("nothing of the kind")
    assert dict(expiries(Settings(state_dir=tmp_path))) == {"ca": own["ca"]}


def test_whoever_only_checks_does_not_renew(
    authority: CertificateAuthority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As root it would leave a key that the collector's user cannot read.
    old = (tmp_path / "ca" / "server.pem").read_bytes()
    settings = tmp_path / "collector.yaml"
    settings.write_text(f"state_dir: {tmp_path}\n")
    monkeypatch.setattr("collector.door.ca.SERVER_LIFE", timedelta(seconds=60))
    monkeypatch.setattr(
        "sys.argv", ["weighbridge-collector", "--config", str(settings), "check-config", "--online"]
    )
    assert main() == 0
    assert "certificate: good until" in capsys.readouterr().out
    assert (tmp_path / "ca" / "server.pem").read_bytes() == old
    assert authority.server_pair()[1] not in old, "it is due"
