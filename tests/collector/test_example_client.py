"""The example client (docs/examples/go): built from a copy of its folder as its README says, against a real collector."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.site import Site
from tests.collector.door import Door
from tests.waiting import until
from wire.measures import MEASURES

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/go"

BURN = "import time\nwhile time.process_time() < 0.2: pass\nprint(time.process_time_ns())"
"""A command that says how much CPU time it used, just before it ends."""


def missing() -> str:
    """Why the client cannot be built here, or empty."""
    if shutil.which("go") is None:
        return "needs Go 1.25 or newer"
    # An older one cannot read go.mod.
    return subprocess.run(["go", "list", "-m"], cwd=EXAMPLE, stderr=subprocess.PIPE, text=True).stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    why = missing()
    if why and not os.environ.get("CI"):
        pytest.skip(why)
    assert not why, why
    folder = tmp_path_factory.mktemp("example") / "go"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("stubs", "client"))
    (said,) = re.findall(r"```console\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)[:1]
    commands = [shlex.split(line[2:], comments=True) for line in said.splitlines() if line.startswith("$ ")]
    assert [words[:2] for words in commands] == [["buf", "generate"], ["go", "build"]]
    # What `./dev setup` fetched has to do.
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GOPROXY": "off",
    }
    for words in commands:
        here = [str(ROOT / "proto") if word == "../../../proto" else word for word in words]
        done = subprocess.run(here, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    return folder / "client"


class Client:
    """The program with an identity and a spool of its own."""

    def __init__(self, program: Path, site: Site, directory: Path, *token_options: str) -> None:
        self._program = program
        settings = directory / "agent.yaml"
        settings.write_text(json.dumps({"state_dir": str(directory / "identity")}))
        token = site.command("collector", "token", "create", *token_options).stdout.strip()
        enroll = [sys.executable, "-m", "agent", "--config", settings, "enroll", token]
        subprocess.run(enroll, check=True, stdout=subprocess.PIPE, timeout=60)
        self._identity = directory / "identity/identity.json"
        self.agent_id: str = json.loads(self._identity.read_text())["agent_id"]
        self.spool = directory / "spool"

    def words(self, *command: str) -> list[str]:
        return [str(self._program), str(self._identity), str(self.spool), *command]

    def run(self, *command: str) -> tuple[int, list[list[str]], str]:
        """(exit code, the words of each line on standard output, standard error)."""
        done = subprocess.run(self.words(*command), capture_output=True, text=True, timeout=60)
        return done.returncode, [line.split() for line in done.stdout.splitlines()], done.stderr

    def answers(self, *command: str) -> list[str]:
        """ "SEQ STATUS" of each answer, in the order in which they came. The command may say nothing."""
        code, lines, trouble = self.run(*command)
        assert code == 0, trouble
        return [f"{seq} {status.removeprefix('STATUS_')}" for seq, status, *_ in lines]

    def delivered(self, site: Site) -> list[dict[str, Any]]:
        lines = site.command("collector", "log", "cat", "--json", "--rows").stdout.splitlines()
        return [line for line in map(json.loads, lines) if line["agent_id"] == self.agent_id]


@pytest.fixture
def client(program: Path, door: Door, tmp_path: Path) -> Client:
    return Client(program, door.site, tmp_path)


def test_a_command_is_billed_once_however_often_its_spool_is_sent(client: Client, door: Door) -> None:
    code, (burnt, answer), _ = client.run("acme", sys.executable, "-c", BURN)
    assert (code, answer[:2]) == (0, ["1", "STATUS_ACCEPTED"])
    assert client.answers() == ["1 DUPLICATE"]
    assert client.answers("acme", "true") == ["1 DUPLICATE", "2 ACCEPTED"]
    assert client.answers() == ["2 DUPLICATE"], "the last one stays, and no other"

    first, second = client.delivered(door.site)
    assert [(b["seq"], b["tenant"], b["rows"]) for b in (first, second)] == [(1, "acme", 1), (2, "acme", 1)]
    assert first["epoch"] == second["epoch"]
    (row,) = first["usage"]
    # It ends a little later than it says, and the kernel gives microseconds.
    assert int(burnt[0]) - 2_000 <= row["cpu_usage_ns"] <= first["interval_duration_ns"]
    assert {name for name in MEASURES if row[name] is not None} == {"cpu_usage_ns"}, "unknown is not zero"
    assert row["cgroup_id"] != second["usage"][0]["cgroup_id"], "each command is an incarnation of its own"
    assert first["interval_end"] <= second["interval_start"]


def test_what_no_collector_took_goes_out_later_with_the_same_bytes(
    program: Path, site: Site, tmp_path: Path
) -> None:
    site.prepare(collector={"log": {"min_free": "1000TiB"}})
    site.start_collector()
    client = Client(program, site, tmp_path)
    said = tmp_path / "said"
    with (
        said.open("wb") as out,
        subprocess.Popen(client.words("acme", "true"), stdout=out, stderr=out) as told,
    ):
        try:
            # Refused by the disk, it comes again by itself ...
            until(lambda: said.read_text().count("1 STATUS_RETRY REASON_STORAGE_UNAVAILABLE") >= 2)
            site.stop("collector")
            assert told.wait(30) == 1
        finally:
            told.kill()
    # ... and a run with nobody there adds to what waits.
    code, _, trouble = client.run("globex", "true")
    assert (code, "Unavailable" in trouble) == (1, True), trouble
    waiting = client.spool.read_bytes()

    site.collector_file.write_text(site.collector_file.read_text().replace("1000TiB", "1MiB"))
    site.start_collector()
    assert client.answers() == ["1 ACCEPTED", "2 ACCEPTED"]
    # As if it had been killed before it heard of it.
    client.spool.write_bytes(waiting)
    assert client.answers() == ["1 DUPLICATE", "2 DUPLICATE"]
    assert [(b["seq"], b["tenant"]) for b in client.delivered(site)] == [(1, "acme"), (2, "globex")]
    for batch in client.delivered(site):
        assert bytes.fromhex(batch["digest"]) in waiting
    assert site.command("collector", "log", "verify").returncode == 0


def test_a_copy_of_a_spool_is_set_aside_and_a_new_epoch_begins(client: Client, door: Door) -> None:
    assert client.answers("acme", "true") == ["1 ACCEPTED"]
    copy = client.spool.read_bytes()
    assert client.answers("acme", "true") == ["1 DUPLICATE", "2 ACCEPTED"]

    client.spool.write_bytes(copy)
    code, lines, trouble = client.run()
    assert (code, lines, "older copy" in trouble) == (1, [], True)
    # With a batch of its own the copy says something else under a number that is used up.
    client.spool.write_bytes(copy)
    code, lines, trouble = client.run("acme", "true")
    assert (code, "kept as" in trouble) == (1, True), trouble
    assert lines[-1][:3] == ["2", "STATUS_REJECTED", "REASON_IDENTITY_CONFLICT"]
    assert len(list(client.spool.parent.glob("spool.aside-*"))) == 2

    assert client.answers("acme", "true") == ["1 ACCEPTED"]
    before, _, fresh = client.delivered(door.site)
    assert fresh["epoch"] > before["epoch"]


def test_a_rejected_batch_is_named_and_does_not_hold_up_the_next(
    program: Path, door: Door, tmp_path: Path
) -> None:
    client = Client(program, door.site, tmp_path, "--tenant", "acme")
    code, (answer,), trouble = client.run("globex", "true")
    assert (code, answer[:3]) == (1, ["1", "STATUS_REJECTED", "REASON_TENANT_NOT_PERMITTED"])
    assert "log cat --rejected" in trouble
    assert client.answers("acme", "true") == ["1 DUPLICATE", "2 ACCEPTED"]
    assert [b["tenant"] for b in client.delivered(door.site)] == ["acme"]


def test_a_command_that_fails_is_billed_and_one_that_cannot_start_is_not(client: Client, door: Door) -> None:
    assert client.answers("acme", "false") == ["1 ACCEPTED"]
    code, lines, trouble = client.run("acme", "/nonexistent")
    assert (code, lines, "/nonexistent" in trouble) == (1, [], True)
    assert len(client.delivered(door.site)) == 1
