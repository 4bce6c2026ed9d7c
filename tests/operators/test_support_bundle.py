"""Support bundles: what somebody far away needs, and never a secret, in whatever form it was written down."""

from __future__ import annotations

import base64
import gzip
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

import agent.support
import collector.support
from agent.config import Settings as AgentSettings
from bench.site import Site
from collector.config import Settings as CollectorSettings
from tests.waiting import until
from wire.daemon.redaction import shown
from wire.daemon.settings import _all_keys

CANARY = "cAnAry-4711+/x"
"""With characters that base64, URLs and JSON write in ways of their own."""


def canary(where: str) -> str:
    return f"{CANARY}.{where}"


def forms(secret: str) -> set[bytes]:
    """As bytes: plain, in hexadecimal, quoted, as JSON, and inside base64 at each of the three places it can begin at."""
    data = secret.encode()
    found = {data, data.hex().encode(), quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()}
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + data)
        inner = coded[4 * bool(shift) : len(coded) // 4 * 4 - 4]
        found |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def everything(bundle: Path) -> dict[str, bytes]:
    """Name -> content: the file as it is, its whole stream, and each member, unpacked if it is packed itself."""
    raw = bundle.read_bytes()
    found = {"(file)": raw, "(stream)": gzip.decompress(raw)}
    with tarfile.open(bundle) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None, f"{member.name} is no file"
            content = file.read()
            found[member.name.partition("/")[2]] = content
            assert not content.startswith((b"\x1f\x8b", b"PK", b"\x28\xb5\x2f\xfd")), (
                f"{member.name} is packed"
            )
    return found


def assert_nowhere(secrets: dict[str, str], bundle: Path) -> None:
    for name, content in everything(bundle).items():
        for where, secret in secrets.items():
            for form in forms(secret):
                assert form not in content, f"{where} in {name}: {form!r}"


def parts_of(bundle: Path) -> dict[str, str]:
    return {name: text.decode() for name, text in everything(bundle).items() if name[0] != "("}


def bundle(site: Site, part: str, journal: Path | None = None, **environment: str) -> Path:
    output = site.directory / f"{part}.tar.gz"
    output.unlink(missing_ok=True)
    file = site.agent_file if part == "agent" else site.collector_file
    words = ["--output", str(output), "--journal", str(journal or site.directory / f"{part}.journal")]
    done = subprocess.run(
        [sys.executable, "-m", part, "--config", str(file), "support-bundle", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    return output


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and nobody else takes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def settings_with(secrets: dict[str, str], directory: Path, port: int) -> dict[str, Any]:
    """A collector's settings with a secret wherever they take one, beside whom nobody answers."""
    directory.mkdir(parents=True)
    (directory / "webhook.secret").write_text(secrets["webhook-secret"] + "\n")
    key = base64.b64encode(secrets["key-file"].encode() * 20).decode()
    (directory / "kafka.key").write_text(f"-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\n")
    client = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "weighbridge",
        "sasl.password": secrets["sasl-password"],
        "ssl.key.password": secrets["key-password"],
        "ssl.key.location": str(directory / "kafka.key"),
    }
    broker = f"127.0.0.1:{port}"
    return {
        "shared": {"redis": f"redis://weigh:{quote(secrets['redis-password'], safe='')}@{broker}/0"},
        "webhook": {
            "url": f"http://{broker}/hook/{secrets['webhook-path']}",
            "secret_file": str(directory / "webhook.secret"),
        },
        "handoff": {"kafka": {"brokers": [broker], "delivery_timeout": "1s", "client": client}},
    }


def spoil(journal: Path, secrets: dict[str, str], token: str) -> None:
    """Leave in a journal what libraries' messages and people's commands leave there."""
    with journal.open("a") as file:
        for secret in secrets.values():
            file.write(json.dumps({"event": "library_warning", "text": f"trouble with {secret}"}) + "\n")
            coded = base64.b64encode(f"me:{secret}".encode()).decode()
            file.write(
                json.dumps({"event": "library_warning", "text": f"Authorization: Basic {coded}"}) + "\n"
            )
            file.write(f"header={coded}\n")
        file.write(f"weighbridge-agent enroll {token}\n")
        file.write(f"token={canary('unknown-token')}\n")
        file.write(f"connecting to https://proxy:{canary('unknown-proxy')}@proxy.example.org:3128 failed\n")


def test_no_secret_of_a_collector_or_an_agent_is_in_their_bundles(site: Site, closed_port: int) -> None:
    names = ("redis-password", "webhook-path", "webhook-secret", "sasl-password", "key-password", "key-file")
    secrets = {where: canary(where) for where in names}
    site.prepare(collector=settings_with(secrets, site.directory, closed_port))
    site.start_collector()
    token = site.command("collector", "token", "create").stdout.strip()
    site.command("agent", "enroll", token)
    site.start_agent()
    site.wait_metering()
    of_both = {"environment": canary("environment")}
    key = json.loads((site.directory / "agent/identity.json").read_bytes())["key_pem"]
    own = {"agent": of_both | {"agent-key": key.splitlines()[1]}, "collector": of_both | secrets}
    for name in ("ca.key", "server.pem"):
        own["collector"][name] = (site.directory / "collector/ca" / name).read_text().splitlines()[1]
    for part in ("agent", "collector"):
        spoil(site.directory / f"{part}.journal", own[part], token)
        (site.directory / part / "notes.txt").write_text(canary("stray-file"))
        with (site.directory / f"{part}.yaml").open("a") as file:
            file.write(f"# the old password was {canary('comment')}\n")
        proxy = f"http://me:{canary('proxy')}@127.0.0.1:{closed_port}"
        made = bundle(site, part, MY_SECRET=own[part]["environment"], http_proxy=proxy)
        assert b"[hidden]" in everything(made)["journal.txt"]
        # Every canary, wherever it was planted.
        assert_nowhere(own[part] | {"join-token": token, "any": CANARY}, made)


def test_the_search_for_canaries_finds_them(tmp_path: Path) -> None:
    secret = canary("x")
    for number, text in enumerate(
        (
            secret,
            base64.b64encode(f"ab{secret}cd".encode()).decode(),
            quote(secret, safe=""),
            secret.encode().hex(),
        )
    ):
        (tmp_path / "part").write_text(f"before {text} after")
        with tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "part", "bundle/part")
        with pytest.raises(AssertionError, match="x in "):
            assert_nowhere({"x": secret}, tmp_path / f"{number}.tar.gz")


def test_bundles_say_what_is_needed_and_nothing_of_what_anybody_used(site: Site) -> None:
    site.prepare(agent={"metrics": {"per_container": True}, "owners": {"host": "acme"}})
    site.start_collector()
    agent_id = site.enroll()
    site.start_agent()
    site.wait_metering()
    until(lambda: site.ask("collector", "status")["answers"].get("accepted", 0) > 1)
    parts = parts_of(bundle(site, "agent"))
    assert agent_id in parts["doctor.txt"]
    assert json.loads(parts["status.json"])["connected"]
    assert "weighbridge_agent_spool_bytes " in parts["metrics.txt"]
    assert not [line for line in parts["metrics.txt"].splitlines() if line.startswith(agent.support.USAGE)]
    assert "identity.json" in parts["files.txt"]
    assert '"started"' in parts["journal.txt"]
    assert json.loads(parts["kernel.txt"])["facts"]["kernel"] == os.uname().release
    assert json.loads(parts["settings.json"])["owners.host"] == "acme"
    assert json.loads(parts["spool.json"])["quarantine"] == []
    parts = parts_of(bundle(site, "collector"))
    tenants = json.loads(parts["status.json"])["tenants"]
    assert "acme" in tenants
    assert all(isinstance(tenant, str) for tenant in tenants), "names, and nothing else"
    assert "certificate: good until" in parts["check.txt"]
    assert "weighbridge_collector_log_end_bytes " in parts["metrics.txt"]
    assert not [
        line for line in parts["metrics.txt"].splitlines() if line.startswith(collector.support.USAGE)
    ]


def test_a_bundle_is_made_where_nothing_works_and_says_so(site: Site, tmp_path: Path) -> None:
    site.prepare(agent={"state_dir": str(tmp_path / "nothing")})
    journal = tmp_path / "no-such-journal"
    parts = parts_of(bundle(site, "agent", journal))
    assert "is the daemon running" in parts["status.json"]
    assert "not enrolled" in parts["doctor.txt"]
    assert "could not be had: FileNotFoundError" in parts["journal.txt"]
    assert "kernel" in parts["versions.json"]
    again = site.command(
        "agent", "support-bundle", "--output", str(site.directory / "agent.tar.gz"), check=False
    )
    assert again.returncode == 2
    assert "File exists" in again.stderr


@pytest.mark.parametrize("part", ["agent", "collector"])
def test_settings_that_cannot_be_used_do_not_tell_their_secrets(site: Site, part: str) -> None:
    site.prepare()
    file = site.agent_file if part == "agent" else site.collector_file
    site.start_collector()
    for name in ("agent", "run"):
        (site.directory / name).mkdir()
    bad = yaml.safe_load(file.read_text())
    bad["spool" if part == "agent" else "webhook"] = {
        "max_bytes" if part == "agent" else "timeout": canary("value")
    }
    file.write_text(yaml.safe_dump(bad))
    if part == "collector":
        # The running one repeats in its journal what it does not like.
        assert site.collector is not None
        site.collector.send_signal(signal.SIGHUP)
        until(lambda: CANARY in site.journal("collector"))
    made = bundle(site, part, site.directory / "collector.journal")
    assert_nowhere({"value": canary("value")}, made)
    assert f"{file}:" in everything(made)["settings.json"].decode()


@pytest.mark.parametrize(
    ("settings", "module"), [(AgentSettings, agent.support), (CollectorSettings, collector.support)]
)
def test_a_text_nobody_has_declared_harmless_is_hidden(settings: type, module: Any) -> None:
    declared = {pattern.removesuffix(".*") for pattern in module.HARMLESS}
    keys = set(_all_keys(settings))
    assert {key for key in declared if ".client" not in key and key not in keys} == set(), "no such key"
    text = settings(**({"host_name": "h"} if settings is AgentSettings else {}))
    assert shown(text, (), ())["journal_level"] == "[hidden]"
    assert shown(text, module.HARMLESS, ())["journal_level"] == "info"


def test_of_a_url_only_what_is_surely_no_secret_is_shown() -> None:
    def redis(url: str) -> str:
        from collector.config import Shared

        return shown(CollectorSettings(shared=Shared(redis=url)), (), collector.support.ENDPOINTS)[
            "shared.redis"
        ]

    assert redis("redis://user:pw@cache.example.org:6379/0") == "redis://cache.example.org:6379/[hidden]"
    assert redis("rediss://cache") == "rediss://cache"
    assert redis("") == ""
    # A password with a slash in it ends the host too early; which part is which is then anybody's guess.
    assert redis("redis://user:1/2@cache:6379") == "[hidden]"
    assert redis("redis://user:p/w@cache:6379") == "[hidden]"
    assert redis("not a url at all") == "[hidden]"
