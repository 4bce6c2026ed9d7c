"""The packages, put onto a machine's file system by apt, dpkg and rpm, and taken off again."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.packaging.built import LIGHT, ROOT, Built, build
from tests.packaging.fresh import Fresh

pytestmark = pytest.mark.root

APT = "apt-get -qq -y -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root"
RPM = "rpm --define '_dbpath /var/lib/rpm'"
# A systemctl that writes down what it is asked; probes and agent run, as far as it says.
SYSTEMCTL = '#!/bin/sh\necho "$*" >>/mnt/asked\nexit 0\n'

# What systemd would do of a unit, as far as this test goes: the daemon as its user, and back when it is ready.
START = """#!/bin/sh
for unit in "$@"; do case $unit in
    weighbridge-collector)
        runuser -u weighbridge-collector -- weighbridge-collector run 2>>/mnt/journal &
        until [ -e /var/lib/weighbridge-collector/endpoints.json ]; do sleep 0.1; done ;;
    weighbridge-agent) runuser -u weighbridge -- weighbridge-agent run 2>>/mnt/journal & ;;
esac; done
"""
OFTEN = "meter: {interval: 1s, memory_sample: 1s}\n"
WAIT = """
centre="runuser -u weighbridge-collector -- weighbridge-collector"
until $centre log cat --json --rows 2>/dev/null | grep -q cpu_usage_ns; do sleep 0.3; done
$centre log cat --json --rows >/mnt/log
runuser -u weighbridge -- weighbridge-agent status --json >/mnt/status || true
"""


def first_use(heading: str = "Install") -> list[str]:
    """The commands of a section of the operator guide."""
    guide = (ROOT / "docs/operator-guide.md").read_text()
    section = guide.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^# (.+)$", section.partition("```console\n")[2].partition("```")[0], re.MULTILINE)


@pytest.fixture(scope="module")
def next_revision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent, packaged once more."""
    out = tmp_path_factory.mktemp("next")
    build(out, "--part", "agent", "--revision", "2")
    return out


def users(fresh: Fresh) -> list[str]:
    return re.findall(r"^weighbridge[^:]*", fresh.run("cat /etc/passwd").stdout, re.MULTILINE)


def pretend_systemd(fresh: Fresh, systemctl: str = SYSTEMCTL) -> None:
    (fresh.run_directory / "systemd/system").mkdir(parents=True)
    (fresh.shared / "systemctl").write_text(systemctl)
    (fresh.shared / "systemctl").chmod(0o755)
    fresh.run("install -m 755 /mnt/systemctl /usr/bin/systemctl")


def asked(fresh: Fresh) -> list[str]:
    """Of systemctl since the last look."""
    file = fresh.shared / "asked"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_five_commands_lead_from_a_fresh_machine_to_the_first_delivered_usage(
    built: Built, fresh: Fresh
) -> None:
    """As the operator guide has them, word for word."""
    commands = first_use()
    assert len(commands) == 5
    fresh.give(*map(built.deb, LIGHT))
    pretend_systemd(fresh, START)
    (fresh.shared / "often.yaml").write_text(OFTEN)
    fresh.run(
        "install -D /mnt/often.yaml /etc/weighbridge/agent.d/often.yaml; cd /mnt\n"
        + "\n".join(commands)
        + WAIT,
        seconds=200,
    )
    assert '"cpu_usage_ns"' in (fresh.shared / "log").read_text()
    assert '"ready"' in (fresh.shared / "status").read_text()
    assert sorted(users(fresh)) == ["weighbridge", "weighbridge-collector"]
    strays = fresh.run("find /usr/lib/weighbridge -name __pycache__").stdout
    assert strays == "", "/usr is as it was shipped"
    compiled = fresh.run("find /var/cache/weighbridge -name '*.pyc' | wc -l").stdout
    assert int(compiled) > 500


def test_a_removal_keeps_the_state_and_a_purge_takes_everything(built: Built, fresh: Fresh) -> None:
    fresh.give(*map(built.deb, LIGHT))
    fresh.run(f"{APT} install /mnt/*.deb")
    for part in LIGHT:
        compiled = fresh.run(f"find /var/cache/weighbridge/{part}/usr/lib/python3* -name 'base_events.*.pyc'")
        assert compiled.stdout, (
            "a daemon that may not write there does not compile Python's own modules at each start"
        )
    fresh.run(
        "touch /var/lib/weighbridge/spool.db /etc/weighbridge/agent.d/mine.yaml; echo '#' >>/etc/weighbridge/agent.yaml"
    )
    names = "weighbridge-agent weighbridge-collector"
    fresh.run(f"dpkg --remove {names}")
    left = fresh.run(
        "ls -d /usr/lib/weighbridge /var/cache/weighbridge /usr/bin/weighbridge-agent", check=False
    )
    assert left.stdout == ""
    for kept in (
        "/var/lib/weighbridge/spool.db",
        "/etc/weighbridge/agent.yaml",
        "/etc/weighbridge/agent.d/mine.yaml",
    ):
        fresh.run(f"ls {kept} /var/lib/weighbridge-collector")
    fresh.run(f"dpkg --purge {names}")
    assert fresh.run("ls -d /var/lib/weighbridge* /etc/weighbridge*", check=False).stdout == ""


def test_what_an_operator_wrote_outlives_an_upgrade(built: Built, fresh: Fresh, next_revision: Path) -> None:
    fresh.give(built.deb("agent"), *next_revision.glob("*.deb"))
    fresh.run(f"{APT} install /mnt/*-1+*.deb")
    fresh.run("echo 'host_name: mine' >>/etc/weighbridge/agent.yaml; touch /var/lib/weighbridge/spool.db")
    fresh.run(f"{APT} install /mnt/*-2+*.deb && {APT} --allow-downgrades install /mnt/*-1+*.deb")
    assert (
        "host_name: mine"
        in fresh.run("cat /etc/weighbridge/agent.yaml; ls /var/lib/weighbridge/spool.db").stdout
    )
    fresh.run("runuser -u weighbridge -- weighbridge-agent check-config")


def test_deb_scripts_restart_on_an_upgrade_and_stop_on_a_removal(
    built: Built, fresh: Fresh, next_revision: Path
) -> None:
    fresh.give(built.deb("agent"), *next_revision.glob("*.deb"))
    pretend_systemd(fresh)
    fresh.run("dpkg --install /mnt/*-1+*.deb")
    first = asked(fresh)
    assert "daemon-reload" in first
    assert not any(line.startswith(("enable", "start")) for line in first), "an agent without an identity"
    fresh.run("dpkg --install /mnt/*-2+*.deb")
    upgrade = asked(fresh)
    wanted = ["daemon-reload", "reload weighbridge-probes.service", "try-restart weighbridge-agent.service"]
    assert [line for line in upgrade if not line.startswith("-q is-active")] == wanted
    fresh.run("dpkg --remove weighbridge-agent")
    removal = asked(fresh)
    assert removal[0] == "disable --now weighbridge-agent.service"
    assert removal[1].startswith("disable --now weighbridge-probes.service")
    assert removal[-1] == "daemon-reload"
    fresh.run("dpkg --purge weighbridge-agent")
    assert asked(fresh) == []


def test_rpm_scripts_restart_on_an_upgrade_and_stop_on_an_erasure(
    built: Built, fresh: Fresh, next_revision: Path
) -> None:
    fresh.give(built.rpm("agent"), *next_revision.glob("*.rpm"))
    pretend_systemd(fresh)
    fresh.run(f"{RPM} --install --nodeps /mnt/*-1.py*.rpm && weighbridge-agent check-config")
    assert "daemon-reload" in asked(fresh)
    fresh.run("touch /var/lib/weighbridge/spool.db; echo 'host_name: mine' >>/etc/weighbridge/agent.yaml")
    for step in ("--upgrade", "--upgrade --oldpackage"):
        revision = "1" if "old" in step else "2"
        fresh.run(f"{RPM} {step} --nodeps /mnt/*-{revision}.py*.rpm")
        lines = [line for line in asked(fresh) if not line.startswith("-q is-active")]
        wanted = [
            "daemon-reload",
            "reload weighbridge-probes.service",
            "try-restart weighbridge-agent.service",
        ]
        assert lines == wanted, step
        assert "host_name: mine" in fresh.run("cat /etc/weighbridge/agent.yaml").stdout
    verified = fresh.run(f"{RPM} --verify --nodeps weighbridge-agent", check=False).stdout
    assert re.findall(r"\S+$", verified, re.MULTILINE) == ["/etc/weighbridge/agent.yaml"]
    fresh.run(f"{RPM} --erase weighbridge-agent")
    removal = asked(fresh)
    assert removal[0] == "disable --now weighbridge-agent.service"
    left = fresh.run("ls -d /usr/lib/weighbridge /var/cache/weighbridge", check=False)
    assert left.stdout == ""
    fresh.run("ls /var/lib/weighbridge/spool.db")


def test_an_installation_without_room_for_compiled_modules_works(built: Built, fresh: Fresh) -> None:
    fresh.give(built.deb("agent"))
    full = "mkdir /var/cache/weighbridge && mount -t tmpfs -o size=64k tmpfs /var/cache/weighbridge"
    done = fresh.run(f"{full} && dpkg --install /mnt/*.deb && weighbridge-agent check-config")
    assert done.stdout.endswith("settings are good\n")


ENGINE = """
import sys
sys.path.insert(0, "/usr/lib/weighbridge/ledger")
import clickhouse_connect
client = clickhouse_connect.get_client(interface="chdb", path="/var/lib/weighbridge-ledger/db")
client.command("CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a")
client.raw_insert("t", column_names=["a"], insert_block=(7).to_bytes(8, "little"), fmt="RowBinary")
print(*client.query("SELECT a FROM t").result_rows)
client.close()
"""


@pytest.mark.parametrize("first", ["ledger", "collector"])
def test_the_ledger_reads_the_collectors_log_whichever_is_installed_first(
    built: Built, fresh: Fresh, first: str
) -> None:
    """And its engine works as its user, in its directory; a purge leaves the collector's things alone."""
    fresh.give(*map(built.deb, ("ledger", "collector")))
    (fresh.shared / "engine.py").write_text(ENGINE)
    pretend_systemd(fresh)
    second = "collector" if first == "ledger" else "ledger"
    fresh.run(f"dpkg --install /mnt/weighbridge-{first}_*.deb")
    fresh.run(f"dpkg --install /mnt/weighbridge-{second}_*.deb")
    told = asked(fresh)
    assert "try-restart weighbridge-ledger.service" in told
    assert not any(line.startswith(("enable", "start")) for line in told)
    fresh.run(
        "runuser -u weighbridge-collector -- sh -c 'umask 027; cd; mkdir log; echo a batch >log/1.log; mkdir -m 700 ca'"
    )
    as_ledger = "runuser -u weighbridge-ledger --"
    assert fresh.run(f"{as_ledger} cat /var/lib/weighbridge-collector/log/1.log").stdout == "a batch\n"
    for denied in ("ls /var/lib/weighbridge-collector/ca", "touch /var/lib/weighbridge-collector/log/1.log"):
        assert fresh.run(f"{as_ledger} {denied}", check=False).returncode != 0, denied
    fresh.run(f"{as_ledger} weighbridge-ledger check-config")
    assert fresh.run(f"{as_ledger} python3.11 -IS /mnt/engine.py").stdout == "(7,)\n"
    fresh.run("dpkg --remove weighbridge-ledger && ls /var/lib/weighbridge-ledger/db")
    assert "disable --now weighbridge-ledger.service weighbridge-reconcile.timer" in asked(fresh)
    fresh.run("dpkg --purge weighbridge-ledger")
    left = fresh.run("ls -d /var/lib/weighbridge-* /etc/weighbridge/*").stdout.split()
    assert left == [
        "/etc/weighbridge/collector.d",
        "/etc/weighbridge/collector.yaml",
        "/var/lib/weighbridge-collector",
    ]


def test_nothing_of_this_machine_is_changed(built: Built, fresh: Fresh) -> None:
    before = set(os.listdir("/usr/bin"))
    fresh.give(built.deb("agent"))
    fresh.run("dpkg --install /mnt/*.deb")
    assert set(os.listdir("/usr/bin")) == before
    assert shutil.which("weighbridge-agent", path="/usr/bin") is None
