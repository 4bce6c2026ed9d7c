"""The agent as a process, and its commands, as an operator meets them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.cgroups import Cgroup, burner
from bench.site import Site, SiteError
from collector.handoff.log import Record, scan
from collector.log_commands import verify
from tests.agent.fakehost import CONTAINER, FakeHost
from tests.waiting import until
from wire.containers import table_of
from wire.v1 import usage_pb2


@pytest.fixture
def running(site: Site) -> Site:
    """A collector and an enrolled agent, metering this host."""
    site.prepare(
        agent={"owners": {"host": "host", "rules": [{"path": "/weighbridge-test-*/**", "tenant": "acme"}]}}
    )
    site.start_collector()
    site.enroll()
    site.start_agent()
    site.wait_metering()
    return site


def port_of(site: Site) -> int:
    return int(re.findall(r'"local_port": ([0-9]+)', site.journal("agent"))[-1])


def fetch(site: Site, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port_of(site)}{path}", timeout=10) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def accepted(site: Site) -> int:
    return int(site.ask("collector", "status")["answers"].get("accepted", 0))


@pytest.mark.root
def test_a_container_is_seen_explained_and_billed_to_its_tenant(running: Site, ours: Cgroup) -> None:
    container = ours.child("docker-" + "c0ffee00" * 8 + ".scope")
    process = container.run(burner(0.3))
    try:
        until(
            lambda: running.ask("collector", "status")["tenants"].get("acme", {}).get("cpu_usage_ns", 0) > 0
        )
        table = running.command("agent", "top", "--once").stdout
        assert "acme" in table
        assert "c0ffee00" in table
        explained = running.command("agent", "explain", "c0ffee").stdout
        assert "docker" in explained
        assert "rule 1: matches; tenant is acme" in explained
        assert "unknown: " in explained
        assert json.loads(running.command("agent", "explain", "c0ffee", "--json").stdout)["found"][0][
            "cgroup_id"
        ] == (container.cgroup_id)
    finally:
        process.kill()
        process.wait()
    assert running.command("agent", "explain", "no-such-thing", check=False).returncode == 2


def test_status_doctor_and_readiness_agree_that_all_is_well(running: Site) -> None:
    until(lambda: accepted(running) >= 1)
    status = json.loads(running.command("agent", "status", "--json").stdout)
    assert status["connected"]
    assert status["ready"] == {}
    assert "network" in " ".join(status["unseen"])
    assert fetch(running, "/readyz") == (200, "ok\n")
    assert fetch(running, "/livez") == (200, "ok\n")
    doctor = running.command("agent", "doctor", "--json").stdout
    findings = [json.loads(line) for line in doctor.splitlines()]
    assert {f["level"] for f in findings} <= {"ok", "warning"}
    assert {"cgroups", "clock", "state", "identity", "collector", "daemon"} <= {f["check"] for f in findings}


@pytest.mark.root
def test_what_root_made_for_the_daemon_is_the_daemons_and_what_is_not_doctor_names(
    site: Site, tmp_path: Path
) -> None:
    somebody = 4711
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, somebody, somebody)
    site.prepare(agent={"state_dir": str(state)})
    site.start_collector()
    site.enroll()
    assert (state / "identity.json").stat().st_uid == somebody
    assert "belongs to user" not in site.command("agent", "doctor", check=False).stdout
    os.chown(state / "identity.json", 0, 0)
    said = site.command("agent", "doctor", check=False)
    assert said.returncode == 1
    assert f"identity.json belongs to user 0, its directory to {somebody}: chown --reference" in said.stdout


def test_metrics_are_clean_for_promtool_and_bounded(running: Site) -> None:
    until(lambda: accepted(running) >= 2)
    code, text = fetch(running, "/metrics")
    assert code == 200
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert 'weighbridge_tenant_cpu_usage_seconds_total{tenant="host"}' in text
    assert "weighbridge_container_" not in text
    assert len(text.splitlines()) < 300


def test_a_collector_that_is_away_is_said_and_nothing_is_lost(running: Site) -> None:
    until(lambda: accepted(running) >= 1)
    running.stop("collector")
    until(lambda: fetch(running, "/readyz")[0] == 503)
    reasons = json.loads(fetch(running, "/readyz")[1])["reasons"]
    assert "collector_unavailable" in reasons
    assert fetch(running, "/livez")[0] == 200
    assert running.command("agent", "status", check=False).returncode == 1
    failed = running.command("agent", "doctor", check=False)
    assert failed.returncode == 1
    assert "start the collector" in failed.stdout
    until(lambda: running.ask("agent", "status")["spool_batches"] >= 2)
    listed = running.command("agent", "spool", "list", "--json").stdout.splitlines()
    assert len(listed) >= 2
    assert running.command("agent", "spool", "verify").returncode == 0
    running.start_collector()
    until(lambda: running.ask("agent", "status")["connected"], 70)
    running.stop("agent")
    running.stop("collector")
    verdict = verify(running.directory / "collector" / "log")
    assert verdict.sound, verdict
    assert verdict.streams == 1


def test_certificates_are_renewed_at_half_life_without_losing_a_batch(site: Site) -> None:
    # Certificates are backdated by five minutes, so half of this one's life is over at once.
    site.prepare(collector={"tls": {"certificate_life": "12s"}})
    site.start_collector()
    site.enroll()
    first = json.loads((site.directory / "agent" / "identity.json").read_text())
    site.start_agent()
    site.wait_metering()
    until(lambda: site.journal("agent").count('"certificate_renewed"') >= 2, 30)
    second = json.loads((site.directory / "agent" / "identity.json").read_text())
    assert second["agent_id"] == first["agent_id"]
    assert second["key_pem"] != first["key_pem"]
    before = accepted(site)
    until(lambda: accepted(site) >= before + 2)
    site.stop("agent")
    site.stop("collector")
    verdict = verify(site.directory / "collector" / "log")
    assert verdict.sound
    assert verdict.streams == 1
    assert verdict.rejected == 0


def test_a_revoked_agent_keeps_metering_says_why_and_can_come_back_under_its_name(running: Site) -> None:
    agent_id = running.ask("agent", "status")["agent_id"]
    until(lambda: accepted(running) >= 1)
    running.command("collector", "ca", "revoke", agent_id)
    until(lambda: "METER-003" in json.dumps(running.ask("agent", "status")["ready"]))
    made = running.ask("agent", "status")["next_seq"]
    until(lambda: running.ask("agent", "status")["next_seq"] > made)
    running.stop("agent")
    token = running.command("collector", "token", "create", "--agent-id", agent_id).stdout.strip()
    refused = running.command("agent", "enroll", token, check=False)
    assert "--force" in refused.stderr
    running.command("agent", "enroll", "--force", "--agent-id", agent_id, token)
    running.start_agent()
    until(
        lambda: (
            (running.directory / "run" / "agent.sock").exists()
            and running.ask("agent", "status")["connected"]
        )
    )
    running.stop("agent")
    running.stop("collector")
    verdict = verify(running.directory / "collector" / "log")
    assert verdict.sound
    assert verdict.streams == 1


def test_a_reload_takes_up_rules_and_a_bad_file_keeps_the_old_ones(running: Site) -> None:
    good = running.agent_file.read_text()
    assert running.agent is not None
    running.agent_file.write_text(good + "ownerz: {}\n")
    running.agent.send_signal(signal.SIGHUP)
    until(lambda: "reload_failed" in running.ask("agent", "status")["ready"])
    assert "did you mean `owners`?" in running.ask("agent", "status")["ready"]["reload_failed"]
    running.agent_file.write_text(good.replace("host: host", "host: kernel"))
    running.agent.send_signal(signal.SIGHUP)
    until(lambda: "kernel" in running.ask("collector", "status")["tenants"])
    assert "reload_failed" not in running.ask("agent", "status")["ready"]


def test_an_export_replayed_any_number_of_times_changes_nothing(running: Site) -> None:
    until(lambda: accepted(running) >= 1)
    running.stop("collector", signal.SIGKILL)
    until(lambda: running.ask("agent", "status")["spool_batches"] >= 3)
    running.stop("agent", signal.SIGKILL)
    exported = running.directory / "export"
    assert "batches in" in running.command("agent", "spool", "export", str(exported)).stdout
    assert (
        "exists; name a new file"
        in running.command("agent", "spool", "export", str(exported), check=False).stderr
    )
    running.start_collector()
    first = running.command("agent", "replay", str(exported)).stdout
    assert re.search(r"\d+ accepted", first)
    second = running.command("agent", "replay", str(exported)).stdout
    assert "accepted" not in second
    assert "duplicate" in second
    running.start_agent()
    running.wait_metering()
    until(lambda: accepted(running) >= 1)
    running.stop("agent")
    running.stop("collector")
    assert verify(running.directory / "collector" / "log").sound


@pytest.mark.root
@pytest.mark.parametrize("had_a_spool", [False, True])
def test_on_a_full_disk_the_agent_waits_says_why_and_then_meters_what_ran_meanwhile(
    site: Site, had_a_spool: bool
) -> None:
    fake = FakeHost(site.directory / "host")
    fake.cpu(CONTAINER, 1_000)
    disk = site.directory / "agent"
    disk.mkdir()
    read = {"cgroup_root": str(fake.cgroup_root), "proc_root": str(fake.proc_root)}
    site.prepare(agent={"read": read, "owners": {"host": "host", "default": "acme"}})
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    try:
        site.start_collector()
        site.enroll()
        if had_a_spool:
            site.start_agent()
            site.wait_metering()
            site.stop("agent")
        starts = site.journal("agent").count('"started"')
        with pytest.raises(OSError, match="space"), (disk / "filler").open("wb") as filler:
            while True:
                filler.write(b"\0" * 4_096)
                filler.flush()
        site.start_agent()
        until(lambda: (site.directory / "run" / "agent.sock").exists())
        reason = until(lambda: site.ask("agent", "status")["ready"].get("spool_unavailable"))
        assert "METER-002" in reason
        assert "free space" in reason
        asked = site.command("agent", "status", check=False)
        assert asked.returncode == 1
        assert "not ready: spool_unavailable: METER-002" in asked.stdout
        assert "not metering yet" in site.command("agent", "top", "--once", check=False).stderr
        fake.cpu(CONTAINER, 5_000)
        (disk / "filler").unlink()
        until(lambda: site.journal("agent").count('"started"') > starts, 60)
        assert site.ask("agent", "status")["ready"].get("spool_unavailable") is None
        fake.cpu(CONTAINER, 6_000)
        site.stop("agent")
    finally:
        site.close()
        subprocess.run(["umount", disk], check=True)
    rows = [
        batch.cpu_usage_ns[row] if batch.cpu_usage_ns else 0
        for record in scan(site.directory / "collector" / "log")
        if isinstance(record, Record) and (batch := usage_pb2.UsageBatch.FromString(record.body))
        for row, path in enumerate(table_of(batch).cgroup_path)
        if path == CONTAINER
    ]
    # With a baseline nothing is lost by waiting; without one, metering begins where it can be written down.
    assert sum(rows) == (5_000_000 if had_a_spool else 1_000_000)


def test_without_an_identity_the_start_says_which_two_commands_are_missing(site: Site) -> None:
    site.prepare()
    site.start_agent()
    with pytest.raises(SiteError, match=r"token create.*weighbridge-agent enroll"):
        site.wait_metering()


def test_two_agents_on_one_spool_and_a_taken_port_are_named(running: Site) -> None:
    second = running.command("agent", "run", check=False)
    assert second.returncode == 2
    assert "in use by another weighbridge-agent" in second.stderr
    other = Site(running.directory / "other")
    other.prepare(agent={"local_port": {"port": port_of(running)}})
    (running.directory / "other" / "agent").mkdir()
    identity = (running.directory / "agent" / "identity.json").read_text()
    (running.directory / "other" / "agent" / "identity.json").write_text(identity)
    taken = other.command("agent", "run", check=False)
    assert taken.returncode == 2
    assert "local_port.port" in taken.stderr


def test_a_settings_file_that_cannot_be_used_names_file_line_and_fix(tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    for text, says in (
        ("meter:\n  intervall: 5s\n", "agent.yaml:2: meter.intervall: unknown key; did you mean `interval`?"),
        ("meter: {interval: 2h}\n", "between 1s and 1h"),
        ("owners: {rules: [{tenant: 'no good', path: '/x'}]}\n", "no tenant name"),
        ("spool: {max_bytes: 1KiB}\n", "at least 16MiB"),
    ):
        path.write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "agent", "--config", str(path), "check-config"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert says in done.stderr
    path.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "agent", "--config", str(path), "check-config"],
        capture_output=True,
        check=True,
    )
    assert b"good" in done.stdout


def test_identify_and_read_work_without_any_settings(tmp_path: Path) -> None:
    def run(*words: str, stdin: bytes = b"") -> list[Any]:
        command = [sys.executable, "-m", "agent", *words]
        done = subprocess.run(command, input=stdin, capture_output=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    (line, odd) = run("identify", stdin=b"/docker/" + b"ab" * 32 + b"\n\xff\xfe\n")
    assert set(line) == {"path", "runtime", "container_id", "pod_uid", "unit", "kind"}
    assert (line["runtime"], line["container_id"], line["kind"]) == ("docker", "ab" * 32, "container")
    assert odd["kind"] == "other"
    lines = run("read", "--json")
    assert lines[0]["path"] == "/"
    assert lines[0]["cpu_usage_ns"] > 0


@pytest.mark.root
def test_the_demo_meters_this_host_exactly() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.demo", "--seconds", "4", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"containers", "tenants", "batches", "rows"} <= set(result)
    assert result["containers"] >= 3
    assert result["tenants"] >= 3
    assert result["lost"] == result["duplicated"] == 0
    assert result["cpu_usage_ns_kernel"] == result["cpu_usage_ns_delivered"] > 10**8
    assert result["host_cpu_usage_ns_kernel"] == result["host_cpu_usage_ns_delivered"]
    assert result["cpu_usage_ns_ledger"] == result["cpu_usage_ns_kernel"]
    assert result["host_cpu_usage_ns_ledger"] == result["host_cpu_usage_ns_kernel"]
    assert result["batches_booked"] == result["batches"]
    assert result["intervals_compared"] > 0


def _nobody_left() -> Iterator[str]:
    for path in Path("/sys/fs/cgroup").glob("**/weighbridge-demo-*"):
        yield str(path)


@pytest.mark.root
def test_the_demo_leaves_nothing_behind() -> None:
    assert list(_nobody_left()) == []


def test_reload_waits_for_the_answer_and_fails_on_a_bad_file_that_changes_nothing(running: Site) -> None:
    settings = running.agent_file.read_text()
    running.agent_file.write_text(settings + "ship: {collectors: ['127.0.0.1:9']}\n")
    said = running.command("agent", "reload").stdout
    assert said == "reloaded; only a restart takes up: ship\n"
    running.agent_file.write_text(settings + "owners: {host: [}\n")
    # The file cannot say where the daemon listens: it is looked for in the default place.
    assert running.command("agent", "reload", check=False).returncode == 2
    answer = ask_directly(running, {"command": "reload"})
    assert "agent.yaml:" in answer["error"]
    assert "weighbridge_agent_reload_failed 1.0" in fetch(running, "/metrics")[1]
    assert "reload_failed" in json.loads(fetch(running, "/readyz")[1])["reasons"]
    running.agent_file.write_text(settings)
    assert running.command("agent", "reload").stdout == "reloaded\n", "it is as at the start"
    assert "weighbridge_agent_reload_failed 0.0" in fetch(running, "/metrics")[1]


def ask_directly(site: Site, request: dict[str, Any]) -> dict[str, Any]:
    """The answer as it comes, errors too."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(site.directory / "run/agent.sock"))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as file:
            answer: dict[str, Any] = json.loads(file.readline())
    return answer


def test_a_started_agent_says_so_to_systemd_and_goes_on_saying_that_it_lives(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.prepare()
    site.start_collector()
    site.enroll()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "600000")
        site.start_agent()
        said: list[str] = []

        def hear(line: str) -> None:
            while line not in said:
                said.extend(manager.recv(65_536).decode().split("\n"))

        hear("READY=1")
        said.clear()
        hear("WATCHDOG=1")
        assert site.agent
        site.agent.send_signal(signal.SIGTERM)
        hear("STOPPING=1")
