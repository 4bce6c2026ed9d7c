"""`import` and `usage-replay`: batches by files and from logs, by the same way as all others, and never twice."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from bench.fleet import Stream
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.resend.bookmark import Bookmark
from collector.resend.files import MAX_LINE_OBJECTS, BatchFiles
from collector.resend.progress import Progress
from tests.collector.door import Door, statuses
from tests.waiting import until
from wire.delimited import delimit
from wire.identity import new_agent_id
from wire.v1 import ingest_pb2 as pb
from wire.v1 import usage_pb2


@pytest.fixture
def brought(site: Site) -> Door:
    site.prepare(collector={"validation": {"tenants": ["acme", "globex"]}})
    site.start_collector()
    return Door(site, CertificateAuthority(site.directory / "collector" / "ca"))


def exported(path: Path, items: list[pb.Item]) -> Path:
    path.write_bytes(b"".join(delimit(item.batch) for item in items))
    return path


def importing(door: Door, *words: object) -> tuple[int, dict[str, Any], str]:
    """(exit code, what became of the batches, what was named on standard error)."""
    done = door.site.command("collector", "import", "--json", *map(str, words), check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def held(door: Door) -> list[tuple[str, str, int, str]]:
    """What the log has handed on, kind and all."""
    return [(line["kind"], line["agent_id"], line["seq"], line["digest"]) for line in door.log()]


def sums(door: Door) -> dict[str, Any]:
    """Everything that somebody downstream could add up."""
    verdict = json.loads(door.site.command("collector", "log", "verify", "--json").stdout)
    lines = door.log()
    totals: dict[str, int] = {}
    for line in lines:
        totals[line["tenant"]] = totals.get(line["tenant"], 0) + line["cpu_usage_ns"]
    return {"verdict": verdict, "cpu": totals, "lines": lines, "rejected": door.log("--rejected")}


def acts(door: Door) -> list[dict[str, Any]]:
    shown = door.site.command("collector", "audit", "show", "--json").stdout.splitlines()
    return [json.loads(line) for line in shown]


def test_an_export_comes_in_byte_for_byte_and_a_second_import_adds_nothing(
    brought: Door, tmp_path: Path
) -> None:
    agent = brought.agent()
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(700)]
    assert set(statuses(brought.deliver(agent, stream, items[:100]))) == {"ACCEPTED"}
    file = exported(tmp_path / "export", items)
    assert importing(brought, file) == (
        0,
        {"accepted": 600, "duplicate": 100, "sent": 700, "not_in": 0, "sent_before": 0},
        "",
    )
    before = sums(brought)
    assert before["verdict"]["batches"] == 700
    assert [line[2] for line in held(brought)] == list(range(1, 701))
    code, answers, _ = importing(brought, file)
    assert (code, answers["duplicate"], "accepted" in answers) == (0, 700, False)
    assert sums(brought) == before
    begun, ended = [entry for entry in acts(brought) if entry["act"].startswith("import_")][:2]
    assert (begun["how"], begun["names"], begun["by"]) == ("import", [str(file)], {"uid": os.getuid()})
    assert ended["answers"] == {"accepted": 600, "duplicate": 100}
    assert set(statuses(brought.deliver(agent, stream, [stream.next()]))) == {"ACCEPTED"}


def test_bad_records_are_named_with_file_and_offset_and_the_others_come_in(
    brought: Door, tmp_path: Path
) -> None:
    agent = brought.agent(frozenset({"acme"}))
    stream = Stream(agent.agent_id, 1)
    first, second = stream.next(), stream.next()
    foreign = Stream(agent.agent_id, 2, tenant="globex").next()
    unknown = Stream(new_agent_id(), 1, tenant="nobody").next()
    vouched = Stream(new_agent_id(), 1, tenant="globex").next()
    spoiled = bytearray(first.batch)
    spoiled[40] ^= 1
    pieces = [
        delimit(first.batch),
        delimit(b"\xff" * 50),
        delimit(foreign.batch),
        delimit(unknown.batch),
        delimit(vouched.batch),
        delimit(second.batch),
        delimit(second.batch)[:-7],
    ]
    file = tmp_path / "mixed"
    file.write_bytes(b"".join(pieces))
    at = [sum(map(len, pieces[:n])) for n in range(len(pieces))]
    code, answers, named = importing(brought, file)
    assert (code, answers["accepted"], answers["rejected"], answers["not_in"]) == (1, 3, 2, 4)
    lines = sorted(named.splitlines(), key=lambda line: int(line.split(" at byte ")[1].split(":")[0]))
    assert [line.split(": ", 1)[0] for line in lines] == [f"{file} at byte {at[n]}" for n in (1, 2, 3, 6)]
    for line, why in zip(
        lines, ("no UsageBatch", "TENANT_NOT_PERMITTED", "UNKNOWN_TENANT", "in the middle"), strict=True
    ):
        assert why in line
    kept = [(line["reason"], line["field"], line["tenant"]) for line in brought.log("--rejected")]
    assert kept == [
        ("REASON_TENANT_NOT_PERMITTED", "tenant", "globex"),
        ("REASON_UNKNOWN_TENANT", "tenant", "nobody"),
    ]


def test_other_bytes_under_a_known_identity_are_a_conflict_here_as_well(
    brought: Door, tmp_path: Path
) -> None:
    agent = brought.agent()
    stream, twin = Stream(agent.agent_id, 1), Stream(agent.agent_id, 1, rows=4)
    brought.deliver(agent, stream, [stream.next()])
    code, answers, named = importing(brought, exported(tmp_path / "twin", [twin.next()]))
    assert (code, answers["rejected"]) == (1, 1)
    assert "REASON_IDENTITY_CONFLICT" in named
    assert brought.refusals("METER-006", "identity_conflict") == 1


def test_batches_whose_forerunners_are_missing_come_in_once_those_are_there(
    brought: Door, tmp_path: Path
) -> None:
    stream = Stream(new_agent_id(), 1)
    items = [stream.next() for _ in range(400)]
    late = exported(tmp_path / "late", items[50:])
    code, answers, named = importing(brought, late)
    assert (code, answers["accepted"], answers["missing_before"]) == (1, 206, 144)
    assert "bring those first" in named
    assert importing(brought, exported(tmp_path / "early", items[:50]))[0] == 0
    code, answers, _ = importing(brought, late)
    assert (code, answers["accepted"], answers["duplicate"]) == (0, 144, 206)
    assert sorted(line[2] for line in held(brought)) == list(range(1, 401))


def as_json(stream: Stream, batches: int) -> list[dict[str, Any]]:
    """What a writer would send who knows nothing of digests."""
    out = []
    for _ in range(batches):
        batch = stream.plain_message()
        stream.seal(batch)
        batch.ClearField("previous_digest")
        out.append(json_format.MessageToDict(batch, preserving_proto_field_name=True))
    return out


def test_json_lines_come_in_chained_and_the_same_lines_again_are_duplicates(
    brought: Door, tmp_path: Path
) -> None:
    stream = Stream(new_agent_id(), 1)
    records = as_json(stream, 6)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(r) + "\n" for r in records[:3]) + "\n")
    bad = [{**records[0], "no_such_field": 1}, {**records[5], "seq": 9}]
    second.write_text("".join(json.dumps(r) + "\n" for r in [*records[3:], *bad]) + "{")
    code, answers, named = importing(brought, first, second)
    assert (code, answers["accepted"], answers["not_in"]) == (1, 6, 3)
    assert named.count(f"{second} at byte ") == 3
    assert "no_such_field" in named
    assert "seq 8 is not before it" in named
    code, answers, _ = importing(brought, first, second)
    assert (code, answers["duplicate"], answers["not_in"]) == (1, 6, 3)
    verdict = sums(brought)["verdict"]
    assert (verdict["batches"], verdict["chain_breaks"]) == (6, [])


def test_a_line_that_is_nothing_but_objects_is_named_before_it_costs_anything(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    good = json.dumps(as_json(Stream(new_agent_id(), 1), 1)[0])
    file.write_text('{"gaps": [' + ",".join(["{}"] * MAX_LINE_OBJECTS) + "]}\n" + good + "\n")
    many, batch = BatchFiles().read(file)
    assert f"a line of {MAX_LINE_OBJECTS + 1} objects, at most {MAX_LINE_OBJECTS}" in many.trouble
    assert not batch.trouble


def test_json_and_delimited_forms_of_a_batch_are_the_same_batch(tmp_path: Path) -> None:
    stream = Stream(new_agent_id(), 1)
    item = stream.next()
    batch = usage_pb2.UsageBatch.FromString(item.batch)
    line = tmp_path / "line"
    line.write_text(json_format.MessageToJson(batch, indent=None))
    (of_json,) = BatchFiles().read(line)
    (of_export,) = BatchFiles().read(exported(tmp_path / "export", [item]))
    assert of_json.body == of_export.body == item.batch
    assert of_json.identity == of_export.identity == (stream.agent_id, 1, 1)


def test_an_import_that_was_stopped_goes_on_where_it_was(brought: Door, tmp_path: Path) -> None:
    items = []
    for _ in range(10):
        stream = Stream(new_agent_id(), 1, rows=40)
        items += [stream.next() for _ in range(400)]
    file = exported(tmp_path / "large", items)
    file.write_bytes(delimit(b"\xff" * 50) + file.read_bytes())
    command = [sys.executable, "-m", "collector", "--config", brought.site.collector_file, "import", file]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        # By the files: the collector has better to do than to answer in time.
        segments = brought.site.directory / "collector" / "log"
        until(lambda: sum(file.stat().st_size for file in segments.iterdir()) > 2e6)
        running.send_signal(signal.SIGINT)
        running.wait(20)
    finally:
        if running.poll() is None:
            running.kill()
            running.wait()
    bookmark = Bookmark(file)
    assert 0 < bookmark.offset < file.stat().st_size
    assert bookmark.refused == 1
    code, answers, _ = importing(brought, file)
    assert (code, answers["not_in"]) == (1, 1), "what was bad before the stop still is"
    assert answers["sent_before"] > 0
    assert answers["sent_before"] + answers["sent"] == len(items)
    assert sums(brought)["verdict"]["batches"] == len(items)
    assert not (tmp_path / ".large.import").exists()


def test_a_bookmark_of_a_file_that_has_changed_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    bookmark = Bookmark(file)
    bookmark.move(6, 2)
    bookmark.keep()
    assert (Bookmark(file).offset, Bookmark(file).refused) == (6, 2)
    file.write_bytes(b"0123456789 and more")
    assert Bookmark(file).offset == 6
    file.write_bytes(b"0123X56789")
    assert Bookmark(file).offset == 0


def test_over_the_rate_an_import_is_parked_like_anybody(site: Site, tmp_path: Path) -> None:
    site.prepare(collector={"admission": {"tenants": {"acme": {"rate": 0.001, "burst": 62}}}})
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    stream = Stream(new_agent_id(), 1, rows=30)
    code, answers, _ = importing(door, exported(tmp_path / "export", [stream.next() for _ in range(300)]))
    assert code == 0
    assert answers["accepted"] + answers["parked"] == 300
    assert answers["parked"] > 100


def test_a_replay_of_everything_changes_nothing_downstream(brought: Door, tmp_path: Path) -> None:
    agent = brought.agent(frozenset({"acme"}))
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(300)]
    brought.deliver(agent, stream, items[:250])
    brought.deliver(agent, stream, items[250:])
    other = Stream(agent.agent_id, 2, tenant="globex")
    assert statuses(brought.deliver(agent, other, [other.next()])) == ["REJECTED"]
    before = sums(brought)
    assert (before["verdict"]["batches"], before["verdict"]["rejected"]) == (300, 1)
    end = brought.metrics()["weighbridge_collector_log_end_bytes"]
    code, answers, _ = brought.replay("--log")
    assert (code, answers["duplicate"], answers["sent"]) == (0, 301, 301)
    code, answers, _ = brought.replay(exported(tmp_path / "spool", items))
    assert (code, answers["duplicate"]) == (0, 300)
    assert sums(brought) == before
    assert brought.metrics()["weighbridge_collector_log_end_bytes"] - end < 1_000, "marks at the most"
    brought.site.stop("collector", signal.SIGKILL)
    brought.site.start_collector()
    assert brought.replay("--log")[1]["duplicate"] == 301
    assert sums(brought) == before


def test_another_collector_takes_a_log_up_as_it_was(brought: Door, tmp_path: Path) -> None:
    agent = brought.agent()
    stream = Stream(agent.agent_id, 1)
    brought.deliver(agent, stream, [stream.next() for _ in range(200)])
    with Site(tmp_path / "second") as second:
        second.prepare()
        second.start_collector()
        there = Door(second, CertificateAuthority(second.directory / "collector" / "ca"))
        log = brought.site.directory / "collector" / "log"
        code, answers, _ = there.replay("--log", log)
        assert (code, answers["accepted"]) == (0, 200)
        assert held(there) == held(brought)
        assert there.replay("--log", log)[1]["duplicate"] == 200


def test_a_replay_sends_what_was_chosen_and_a_dry_run_sends_nothing(brought: Door, tmp_path: Path) -> None:
    stream, other = Stream(new_agent_id(), 1), Stream(new_agent_id(), 1, tenant="globex")
    other.start_unix_ns = stream.start_unix_ns = 1_790_000_000 * 10**9
    items = [stream.next() for _ in range(20)] + [other.next() for _ in range(5)]
    file = exported(tmp_path / "export", items)
    brought.site.stop("collector")

    def would(*words: object) -> tuple[int, dict[str, int]]:
        code, found, _ = brought.replay("--dry-run", *words, file)
        assert code == 0
        return found["batches"], found["tenants"]

    assert would() == (25, {"acme": 20, "globex": 5})
    assert would("--tenant", "globex") == (5, {"globex": 5})
    assert would("--agent-id", stream.agent_id) == (20, {"acme": 20})
    # seq n covers [start + n, start + n + 1) seconds.
    begin = "2026-09-21T14:13:23Z"
    assert would("--to", begin) == (4, {"acme": 2, "globex": 2})
    assert would("--from", begin) == (21, {"acme": 18, "globex": 3})
    assert would("--from", begin, "--to", "2026-09-21T14:13:24") == (2, {"acme": 1, "globex": 1})
    code, _, said = brought.replay(file)
    assert (code, "is the daemon running" in said) == (2, True)
    brought.site.start_collector()
    code, answers, _ = brought.replay("--tenant", "globex", "--rate", "50", file)
    assert (code, answers["sent"]) == (0, 5)
    assert {line["tenant"] for line in brought.log()} <= {"globex"}


def test_wrong_usage_names_what_to_do(brought: Door, tmp_path: Path) -> None:
    for words, says in (
        ((), "--log"),
        (("--log", tmp_path / "nowhere"), "no log at"),
        ((tmp_path / "nothing",), "nothing was sent"),
        (("--from", "yesterday", "--log"), "2026-07-01T00:00Z"),
        (("--rate", "0", "--log"), "more than 0"),
    ):
        code, _, said = brought.replay(*words)
        assert code == 2
        assert says in said
    code, _, said = importing(brought, tmp_path / "nothing")
    assert (code, "nothing was imported" in said) == (2, True)


def test_the_bar_is_drawn_on_a_terminal_and_nowhere_else(brought: Door, tmp_path: Path) -> None:
    file = exported(tmp_path / "export", [Stream(new_agent_id(), 1).next()])
    assert importing(brought, file)[2] == "", "no terminal, no bar"
    leader, follower = pty.openpty()
    try:
        with os.fdopen(follower, "w") as terminal:
            progress = Progress(1_000, terminal)
            until(lambda: progress.at(500, 7) or select.select([leader], [], [], 0)[0])
            shown = os.read(leader, 4_096).decode()
    finally:
        os.close(leader)
    assert "###" in shown
    assert "50%" in shown
    assert "7 batches" in shown
    quiet = io.StringIO()
    Progress(1_000, quiet).aside()
    assert quiet.getvalue() == ""
