"""A repository that `publish` made: what apt and rpm accept from it, and what they refuse."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.built import LIGHT, ROOT, Built
from tests.packaging.fresh import Fresh

pytestmark = pytest.mark.root

PUBLISH = ROOT / "packaging/repository/publish"
APT = (
    "apt-get -y -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root -o Dir::Etc::sourcelist=/mnt/sources.list"
    " -o Dir::Etc::sourceparts=- -o Dir::State::lists=/mnt/lists"
)

CHECK = "rpm --import /mnt/weighbridge.asc && rpmkeys --define '_pkgverify_level signature' --checksig"


class Key:
    """A signing key in a keyring of its own, good for a day."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700)
        self.environment = {**os.environ, "GNUPGHOME": str(home)}
        self.gpg(
            "--batch",
            "--passphrase",
            "",
            "--quick-generate-key",
            "Tests <tests@example.org>",
            "ed25519",
            "sign",
            "1d",
        )
        listed = self.gpg("--batch", "--with-colons", "--list-secret-keys")
        self.fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr"))
        self.environment["WEIGHBRIDGE_SIGNING_KEY"] = self.fingerprint

    def gpg(self, *words: str) -> str:
        done = subprocess.run(
            ["gpg", *words], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def publish(self, directory: Path, suite: str, *packages: Path) -> subprocess.CompletedProcess[str]:
        words = [str(PUBLISH), str(directory), suite, *map(str, packages)]
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120)

    def close(self) -> None:
        subprocess.run(["gpgconf", "--kill", "all"], env=self.environment, check=True)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Key]:
    made = Key(tmp_path_factory.mktemp("key") / "home")
    yield made
    made.close()


@pytest.fixture(scope="module")
def published(built: Built, key: Key, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("repository")
    for suite, packages in (("bookworm", map(built.deb, LIGHT)), ("el9", map(built.rpm, LIGHT))):
        done = key.publish(directory, suite, *packages)
        assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def host(fresh: Fresh, published: Path) -> Fresh:
    """A host that knows the key and has a copy of the repository to itself."""
    shutil.copytree(published, fresh.shared / "repository")
    shutil.copy(published / "weighbridge.gpg", fresh.shared)
    shutil.copy(published / "weighbridge.asc", fresh.shared)
    (fresh.shared / "lists/partial").mkdir(parents=True)
    (fresh.shared / "sources.list").write_text(
        "deb [signed-by=/mnt/weighbridge.gpg] file:/mnt/repository/apt bookworm main\n"
    )
    return fresh


def alter(file: Path) -> None:
    """One byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def refused(host: Fresh, script: str) -> str:
    done = host.run(script, check=False)
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def test_apt_installs_from_it_and_names_where_it_is_from(host: Fresh) -> None:
    host.run(f"{APT} update && {APT} install weighbridge-agent weighbridge-collector")
    assert "Weighbridge" in host.run(f"{APT.replace('apt-get -y', 'apt-cache')} policy").stdout
    host.run("weighbridge-agent check-config")


def test_apt_refuses_a_package_that_was_altered(host: Fresh) -> None:
    host.run(f"{APT} update")
    (package,) = (host.shared / "repository/apt/pool/bookworm").glob("weighbridge-agent_*")
    alter(package)
    assert "Hash Sum mismatch" in refused(host, f"{APT} install weighbridge-agent")


@pytest.mark.parametrize("name", ["InRelease", "main/binary-amd64/Packages.gz"])
def test_apt_refuses_an_index_that_was_altered(host: Fresh, name: str) -> None:
    dists = host.shared / "repository/apt/dists/bookworm"
    alter(dists / name)
    for other in ("Release", "Release.gpg", "main/binary-amd64/Packages"):
        (dists / other).unlink()
    said = refused(host, f"{APT} -o APT::Update::Error-Mode=any update")
    assert re.search(r"BADSIG|invalid signature|NODATA|Hash Sum mismatch|not signed|Clearsigned", said), said


def test_apt_refuses_what_another_key_has_signed(host: Fresh, built: Built, tmp_path: Path) -> None:
    other = Key(tmp_path / "other")
    try:
        done = other.publish(host.shared / "repository", "bookworm", built.deb("agent"))
    finally:
        other.close()
    assert done.returncode == 0, done.stderr
    said = refused(host, f"{APT} -o APT::Update::Error-Mode=any update")
    assert "NO_PUBKEY" in said, said


def test_rpm_accepts_signed_packages_and_refuses_one_that_was_altered(host: Fresh) -> None:
    check = f"{CHECK} /mnt/repository/yum/el9/*/*.rpm"
    assert host.run(check).stdout.count("digests signatures OK") == len(LIGHT)
    (package,) = (host.shared / "repository/yum/el9").glob("*/weighbridge-agent*")
    alter(package)
    assert "NOT OK" in refused(host, check)


def test_an_unsigned_rpm_is_refused(host: Fresh, built: Built) -> None:
    host.give(built.rpm("agent"))
    check = f"{CHECK} /mnt/*.rpm"
    assert "NOT OK" in refused(host, check)


def test_the_index_of_rpms_is_signed_and_names_their_hashes(published: Path, key: Key) -> None:
    (repodata,) = published.glob("yum/el9/*/repodata")
    key.gpg("--verify", str(repodata / "repomd.xml.asc"), str(repodata / "repomd.xml"))
    (primary,) = repodata.glob("*-primary.xml.gz")
    text = subprocess.check_output(["zcat", primary], text=True)
    assert set(re.findall(r"<name>(.+?)</name>", text)) == {f"weighbridge-{part}" for part in LIGHT}
    assert primary.name in (repodata / "repomd.xml").read_text()


def test_a_package_for_another_python_is_refused(built: Built, key: Key, tmp_path: Path) -> None:
    done = key.publish(tmp_path, "trixie", built.deb("agent"))
    assert done.returncode == 2
    assert "suite trixie has Python 3.13" in done.stderr


def test_what_was_published_before_stays(published: Path, key: Key, built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(published, copy)
    again = tmp_path / built.deb("agent").name.replace("-1+", "-2+")
    shutil.copy(built.deb("agent"), again)
    assert key.publish(copy, "bookworm", again).returncode == 0
    index = (copy / "apt/dists/bookworm/main/binary-amd64/Packages").read_text()
    assert len(re.findall(r"^Filename: ", index, re.MULTILINE)) == len(LIGHT) + 1
    assert not list((copy / "apt/dists").glob("*.old"))
