"""Listeners that change while agents are connected, and a collector that is nobody in particular."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from bench.ports import free_port
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.door.listeners import affordable
from tests.collector.door import Door, statuses
from tests.collector.test_bounds_of_the_door import change, events, running
from tests.waiting import until


def endpoints(site: Site) -> dict[str, int]:
    found: dict[str, int] = json.loads((site.directory / "collector" / "endpoints.json").read_text())
    return found


def connectable(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_new_address_is_open_before_the_old_one_is_left_and_what_was_sent_is_answered(site: Site) -> None:
    door = running(site)
    agent, old = door.agent(), dict(site.ports)
    with door.open(agent) as stream:
        assert statuses(stream.deliver(5)) == ["ACCEPTED"] * 5
        new = free_port()
        change(site, listen={"ingest": f"127.0.0.1:{new}"})
        error = stream.end()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert connectable(new), "there is a new door when an agent is sent away from the old one"
    until(lambda: events(site, "reloaded"))
    until(lambda: not connectable(old["ingest"]))
    assert endpoints(site)["ingest"] == new
    assert endpoints(site)["enrolment"] == old["enrolment"]
    assert connectable(old["enrolment"]), "what did not change was not touched"
    site.ports["ingest"] = new
    with door.open(agent) as again:
        again.last = stream.last
        assert statuses(again.again()) == ["DUPLICATE"] * 5
    change(site, listen={"enrolment": ""})
    until(lambda: not connectable(old["enrolment"]))
    assert "enrolment" not in endpoints(site)


def test_an_address_that_cannot_be_opened_leaves_every_door_and_every_setting_as_it_was(site: Site) -> None:
    door = running(site, validation={"tenants": ["acme"]})
    with socket.socket() as taken, door.open(door.agent()) as stream:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before, new = endpoints(site), free_port()
        change(
            site,
            listen={
                "ingest": f"127.0.0.1:{new}",
                "enrolment": f"127.0.0.1:{taken.getsockname()[1]}",
            },
            validation={"tenants": ["globex"]},
        )
        until(lambda: door.metrics()["weighbridge_collector_reload_failed"] == 1)
        assert "listen.enrolment" in site.ask("collector", "status")["ready"]["reload_failed"]
        assert endpoints(site) == before
        assert not connectable(new), "a door of a reload that failed is shut again"
        assert statuses(stream.deliver(3)) == ["ACCEPTED"] * 3, "with the old tenants, over the old stream"


def test_connections_stay_within_the_limit_of_open_files() -> None:
    code = (
        "import resource\n"
        "from collector.door.listeners import affordable\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (400, 1_000))\n"
        "print(affordable(500), resource.getrlimit(resource.RLIMIT_NOFILE)[0], affordable(5_000))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["500", "820", "680"]
    assert '"open_files_limited"' in done.stderr
    assert affordable(10) == 10


AS_NOBODY = [
    *("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"),
    *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
]


@pytest.mark.root
def test_the_collector_runs_as_a_user_of_its_own_without_any_capability() -> None:
    """From making its CA to a delivery and a reload; what it needs is its state directory."""
    nobody = pwd.getpwnam("nobody")
    if subprocess.run([*AS_NOBODY, sys.executable, "-c", "import grpc"], capture_output=True).returncode:
        pytest.skip("nobody may not read this checkout and its virtual environment")
    # Below a directory that everybody may pass through.
    base = Path("/var/tmp") / f"weighbridge-test-{os.getpid()}"
    base.mkdir(mode=0o755)
    try:
        with Site(base / "site", AS_NOBODY) as site:
            site.prepare()
            for path in (base / "site", *(base / "site").rglob("*")):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            site.start_collector()
            assert site.collector is not None
            status = Path(f"/proc/{site.collector.pid}/status").read_text()
            assert f"Uid:\t{nobody.pw_uid}\t{nobody.pw_uid}" in status
            for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert f"{kind}:\t0000000000000000" in status, kind
            assert "NoNewPrivs:\t1" in status
            authority = CertificateAuthority(site.directory / "collector" / "ca")
            door = Door(site, authority)
            agent = door.agent()
            with door.open(agent) as stream:
                assert statuses(stream.deliver(10)) == ["ACCEPTED"] * 10
                change(site, limits={"streams": 5})
                until(lambda: events(site, "reloaded"))
                authority.registry.revoke(agent.agent_id)
                begun = time.monotonic()
                assert stream.end().code() is grpc.StatusCode.UNAUTHENTICATED
                assert time.monotonic() - begun <= 5
            assert site.stop("collector") == 0
    finally:
        shutil.rmtree(base)
