"""The collector as a process of its own: started, stopped, killed, reloaded, and told of what it lacks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bench.fleet import SimulatedAgent, Stream
from bench.site import Site, SiteError
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.waiting import until
from wire.daemon.control import ControlError
from wire.statuses import Reason
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub


def accepted(site: Site) -> tuple[Door, SimulatedAgent, Stream]:
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    agent = door.agent()
    return door, agent, Stream(agent.agent_id, 1)


def test_what_was_accepted_before_a_kill_is_a_duplicate_after_it(site: Site) -> None:
    site.prepare()
    door, agent, stream = accepted(site)
    items = [stream.next() for _ in range(100)]
    assert statuses(door.deliver(agent, stream, items)) == ["ACCEPTED"] * 100
    site.stop("collector", signal.SIGKILL)
    site.start_collector()
    assert statuses(door.deliver(agent, stream, items)) == ["DUPLICATE"] * 100
    site.stop("collector", signal.SIGKILL)
    (site.directory / "collector" / "streams.db").unlink()
    site.start_collector()
    assert statuses(door.deliver(agent, stream, items)) == ["DUPLICATE"] * 100


def test_a_refused_disk_is_a_retry_and_readyz_says_so_until_there_is_room(site: Site) -> None:
    site.prepare(collector={"log": {"min_free": "1000TiB"}})
    door, agent, stream = accepted(site)
    item = stream.next()
    (answer,) = door.deliver(agent, stream, [item])
    assert (statuses([answer]), answer.reason) == (["RETRY"], Reason.REASON_STORAGE_UNAVAILABLE)
    assert answer.retry_after_ms >= 1_000
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{site.ports['local']}/readyz", timeout=10)
    assert error.value.code == 503
    assert "METER-001" in json.load(error.value)["reasons"]["log_unavailable"]
    assert site.command("collector", "status", check=False).returncode == 1


def test_a_reload_that_fails_keeps_the_old_settings_and_says_so(site: Site) -> None:
    site.prepare(collector={"validation": {"tenants": ["globex"]}})
    door, agent, stream = accepted(site)
    good = site.collector_file.read_text()
    (refused,) = door.deliver(agent, stream, [stream.next()])
    assert refused.reason == Reason.REASON_UNKNOWN_TENANT
    site.collector_file.write_text(good + "tenantz: 1\n")
    assert site.collector is not None
    site.collector.send_signal(signal.SIGHUP)
    until(lambda: door.metrics()["weighbridge_collector_reload_failed"] == 1)
    assert "reload_failed" in site.ask("collector", "status")["ready"]
    site.collector_file.write_text(good.replace("globex", "acme"))
    site.collector.send_signal(signal.SIGHUP)
    until(lambda: door.metrics()["weighbridge_collector_reload_failed"] == 0)
    assert statuses(door.deliver(agent, stream, [stream.next()])) == ["ACCEPTED"]


def test_sigterm_answers_what_was_read_and_ends_with_zero(site: Site) -> None:
    site.prepare()
    door, agent, stream = accepted(site)
    items = [stream.next() for _ in range(200)]

    def requests() -> Iterator[pb.DeliverRequest]:
        yield stream.hello(1)
        yield pb.DeliverRequest(delivery=pb.Delivery(items=items))
        time.sleep(20)

    answers: list[pb.Answer] = []
    with door.channel(agent) as channel:
        responses = IngestStub(channel).Deliver(requests(), timeout=30)
        next(responses)
        answers.extend(next(responses).answers.answers)
        assert site.collector is not None
        site.collector.terminate()
        with pytest.raises(grpc.RpcError) as error:
            next(responses)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert site.stop("collector") == 0
    verdict = json.loads(site.command("collector", "log", "verify", "--json").stdout)
    assert verdict["batches"] == len(answers) == 200


def test_a_taken_port_is_named_with_the_key_to_change(site: Site) -> None:
    site.prepare()
    site.start_collector()
    other = Site(site.directory / "other")
    other.prepare(collector={"listen": {"ingest": f"127.0.0.1:{site.ports['ingest']}"}})
    with pytest.raises(SiteError, match=r"set `listen\.ingest` to another"):
        other.start_collector()
    third = Site(site.directory / "third")
    third.prepare(collector={"local_port": {"port": site.ports["local"]}})
    with pytest.raises(SiteError, match=r"local_port\.port"):
        third.start_collector()


def test_a_damaged_log_stops_the_start_with_the_command_that_helps(site: Site) -> None:
    site.prepare()
    door, agent, stream = accepted(site)
    door.deliver(agent, stream, [stream.next() for _ in range(50)])
    site.stop("collector")
    (segment,) = (site.directory / "collector" / "log").glob("*.log")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    assert site.command("collector", "log", "verify", check=False).returncode == 1
    with pytest.raises(SiteError, match="log repair"):
        site.start_collector()
    site.command("collector", "log", "repair")
    site.start_collector()
    assert site.ask("collector", "status")["streams"] == 1


def test_without_a_ca_the_start_names_the_command_that_makes_one(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.prepare()
    os.rename(tmp_path / "collector" / "ca", tmp_path / "elsewhere")
    done = site.command("collector", "check-config", check=False)
    assert done.returncode == 2
    assert "ca init" in done.stderr


def test_a_torn_tail_is_cut_off_by_the_start_and_said_in_journal_and_metrics(site: Site) -> None:
    site.prepare()
    door, agent, stream = accepted(site)
    items = [stream.next() for _ in range(5)]
    door.deliver(agent, stream, items)
    site.stop("collector")
    directory = site.directory / "collector" / "log"
    (segment,) = directory.glob("*.log")
    whole = segment.read_bytes()
    segment.write_bytes(whole + whole[: len(whole) // 2 - 1])
    unsound = site.command("collector", "log", "verify", "--json", check=False)
    assert json.loads(unsound.stdout)["unfinished_bytes"] == len(whole) // 2 - 1
    site.start_collector()
    assert '"torn_tail_cut"' in site.journal("collector")
    assert door.metrics()["weighbridge_collector_log_torn_bytes"] == len(whole) // 2 - 1
    (copy,) = directory.glob("*.torn")
    assert copy.read_bytes() == whole[: len(whole) // 2 - 1]
    assert segment.read_bytes() == whole
    assert statuses(door.deliver(agent, stream, items)) == ["DUPLICATE"] * 5


def test_reload_answers_what_came_of_it(site: Site) -> None:
    site.prepare()
    site.start_collector()
    assert site.command("collector", "reload").stdout == "reloaded\n"
    good = site.collector_file.read_text()
    site.collector_file.write_text(good.replace("min_free: 1MiB", "min_free: 2MiB"))
    for _ in range(2):  # it still does
        assert site.command("collector", "reload").stdout == "reloaded; only a restart takes up: log\n"
    site.collector_file.write_text(good + "nonsense: 1\n")
    with pytest.raises(ControlError, match="nonsense: unknown key"):
        site.ask("collector", "reload")
    assert "reload_failed" in site.ask("collector", "status")["ready"]
    assert site.command("collector", "reload", check=False).returncode == 2
    site.collector_file.write_text(good)
    site.command("collector", "reload")
    assert site.ask("collector", "status")["ready"] == {}


@pytest.mark.root
def test_what_roots_commands_write_belongs_to_whom_the_directory_belongs_and_the_audit_says_root() -> None:
    nobody = 65_534
    # A user who is nobody may not look into pytest's directories.
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        site = Site(Path(scratch) / "site")
        site.directory.mkdir()
        for part in ("collector", "agent"):
            (site.directory / part).mkdir()
            os.chown(site.directory / part, nobody, nobody)
        site.prepare()
        token = site.command("collector", "token", "create", "--address", "127.0.0.1:9").stdout
        assert token.startswith("wb1.")
        made = list((site.directory / "collector").rglob("*"))
        assert {"ca.key", "registry.db", "audit.log"} <= {path.name for path in made}
        assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(nobody, nobody)}
        acts = site.command("collector", "audit", "show", "--json").stdout.splitlines()
        assert [json.loads(act)["by"]["uid"] for act in acts] == [0] * len(acts)


@pytest.mark.root
def test_a_start_on_a_full_disk_waits_for_room_and_says_so(site: Site) -> None:
    site.prepare()
    state = site.directory / "collector"
    moved = state.rename(site.directory / "moved")
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", state], check=True)
    try:
        shutil.copytree(moved, state, dirs_exist_ok=True)
        full = state / "full"
        with full.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4_096))
        starting = threading.Thread(target=site.start_collector, args=(60.0,))
        starting.start()
        until(lambda: '"log_unavailable"' in site.journal("collector"), 30)
        full.unlink()
        starting.join()
        assert site.ask("collector", "status")["open_streams"] == 0
        assert '"log_recovered"' in site.journal("collector")
    finally:
        site.close()
        subprocess.run(["umount", state], check=True)
