"""Parking in a running collector: what is over the rate is durable, waits, and comes out once, in order, as it was."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

from bench.fleet import SimulatedAgent, Stream
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.handoff.log import HANDED_ON, Kind, Record, scan
from collector.handoff.park_notes import read_note
from tests.collector.door import Door, statuses
from tests.waiting import until
from wire.statuses import Reason
from wire.v1 import ingest_pb2 as pb

SLOW = {"rate": 0.001, "burst": 62}
"""Nothing comes out by itself while a test runs."""


def opened(site: Site, **tenants: dict[str, Any]) -> tuple[Door, SimulatedAgent]:
    site.prepare(collector={"admission": {"tenants": tenants}})
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    return door, door.agent()


def records(site: Site) -> list[Record]:
    found = list(scan(site.directory / "collector" / "log"))
    assert all(isinstance(record, Record) for record in found)
    return [record for record in found if isinstance(record, Record)]


def handed_on(site: Site) -> list[tuple[int, bytes]]:
    return [(record.seq, record.body) for record in records(site) if record.kind in HANDED_ON]


def verify(site: Site) -> dict[str, Any]:
    done = site.command("collector", "log", "verify", "--json", check=False)
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def queues(site: Site) -> dict[str, dict[str, Any]]:
    answer = json.loads(site.command("collector", "parked", "--json").stdout)
    return {tenant["tenant"]: tenant for tenant in answer["tenants"]}


def heavy(agent: SimulatedAgent) -> Stream:
    """Each of its batches weighs about 0.7 tokens."""
    return Stream(agent.agent_id, 1, rows=30)


def flood(door: Door, agent: SimulatedAgent, stream: Stream, most: int) -> list[pb.Item]:
    """Deliver far more than the tenant's bucket holds: some were accepted, the rest are parked."""
    items = [stream.next() for _ in range(most)]
    answers: list[str] = []
    for start in range(0, most, 50):
        answers += statuses(door.deliver(agent, stream, items[start : start + 50]))
    assert set(answers) == {"ACCEPTED", "PARKED"}
    first = answers.index("PARKED")
    assert set(answers[first:]) == {"PARKED"}, "nothing overtakes what waits"
    return items


def test_what_is_over_the_rate_is_parked_and_comes_out_in_order_byte_for_byte(site: Site) -> None:
    door, agent = opened(site, acme=SLOW)
    stream = heavy(agent)
    items = flood(door, agent, stream, 400)
    accepted = len(handed_on(site))
    assert 0 < accepted < 400
    assert statuses(door.deliver(agent, stream, items[-50:])) == ["DUPLICATE"] * 50
    other = door.agent()
    calm = Stream(other.agent_id, 1, tenant="globex")
    assert statuses(door.deliver(other, calm, [calm.next()])) == ["ACCEPTED"], "nobody else notices"

    queue = queues(site)["acme"]
    assert queue["batches"] == 400 - accepted
    assert queue["bytes"] == sum(len(item.batch) for item in items[accepted:])
    assert queue["debt_tokens"] > 0
    metrics = door.metrics()
    assert metrics['weighbridge_collector_answers_total{status="parked"}'] == 400 - accepted
    assert metrics['weighbridge_collector_tenant_parked_batches{tenant="acme"}'] == 400 - accepted
    assert metrics['weighbridge_collector_tenant_parked_bytes{tenant="acme"}'] == queue["bytes"]
    assert metrics['weighbridge_collector_tenant_parked_oldest_seconds{tenant="acme"}'] > 0
    assert metrics['weighbridge_collector_tenant_batches_total{tenant="acme"}'] == accepted
    assert "acme" in site.command("collector", "parked").stdout

    site.command("collector", "plan", "set", "acme", "--rate", "unlimited")
    until(lambda: not queues(site))
    assert site.command("collector", "parked").stdout == "nothing is parked\n"
    mine = [(seq, body) for seq, body in handed_on(site) if b"globex" not in body]
    assert mine == [(item.seq, item.batch) for item in items]
    metrics = door.metrics()
    assert metrics["weighbridge_collector_released_batches_total"] == 400 - accepted
    assert metrics['weighbridge_collector_tenant_batches_total{tenant="acme"}'] == 400
    assert 'tenant_parked_batches{tenant="acme"}' not in metrics
    verdict = verify(site)
    assert (verdict["sound"], verdict["batches"], verdict["released"], verdict["parked"]) == (
        True,
        401,
        400 - accepted,
        0,
    )
    received = {r.seq: r.received_at_unix_ns for r in records(site) if r.kind is Kind.PARKED}
    released = {r.seq: r.received_at_unix_ns for r in records(site) if r.kind is Kind.RELEASED}
    assert received == released
    shown = [line["seq"] for line in door.log("--parked")]
    assert shown == sorted(received)


def test_tokens_that_come_in_release_what_waits_without_anybodys_doing(site: Site) -> None:
    door, agent = opened(site, acme={"rate": 40, "burst": 62})
    stream = heavy(agent)
    items = [stream.next() for _ in range(250)]
    assert "PARKED" in statuses(door.deliver(agent, stream, items))
    until(lambda: not queues(site))
    assert handed_on(site) == [(item.seq, item.batch) for item in items]
    assert statuses(door.deliver(agent, stream, [stream.next()])) == ["ACCEPTED"]


def test_a_full_queue_is_a_retry_with_a_time_and_leaves_no_mark(site: Site) -> None:
    door, agent = opened(site, acme={**SLOW, "park_batches": 10})
    stream = heavy(agent)
    items = [stream.next() for _ in range(256)]
    answers = door.deliver(agent, stream, items)
    names = statuses(answers)
    first = names.index("RETRY")
    assert names[first - 10 :] == ["PARKED"] * 10 + ["RETRY"] * (256 - first)
    assert {answer.reason for answer in answers[first:]} == {Reason.REASON_PARK_FULL}
    assert all(answer.retry_after_ms >= 1_000 for answer in answers[first:])
    assert door.refusals("METER-002", "park_full") == 256 - first
    debt = queues(site)["acme"]["debt_tokens"]
    assert set(statuses(door.deliver(agent, stream, items[first:]))) == {"RETRY"}
    assert queues(site)["acme"]["debt_tokens"] <= debt, "who was sent away is not charged"
    site.command("collector", "plan", "set", "acme", "--rate", "unlimited")
    until(lambda: not queues(site))
    assert set(statuses(door.deliver(agent, stream, items[first:]))) == {"ACCEPTED"}
    assert [seq for seq, _ in handed_on(site)] == list(range(1, 257))


def test_for_a_full_queue_nothing_new_is_looked_at_and_what_is_known_is_known(site: Site) -> None:
    door, agent = opened(site, acme={**SLOW, "park_batches": 10})
    stream = heavy(agent)
    items = [stream.next() for _ in range(200)]
    first = statuses(door.deliver(agent, stream, items)).index("RETRY")
    other = pb.Item()
    other.CopyFrom(items[first])
    other.digest = bytes(32)
    assert statuses(door.deliver(agent, stream, [items[0], items[first - 1], other])) == [
        "DUPLICATE",
        "DUPLICATE",
        "RETRY",
    ]
    site.command("collector", "plan", "set", "acme", "--rate", "unlimited")
    until(lambda: not queues(site))
    (answer,) = door.deliver(agent, stream, [other])
    assert answer.reason == Reason.REASON_DIGEST_MISMATCH
    assert set(statuses(door.deliver(agent, stream, items[first:]))) == {"ACCEPTED"}


def test_a_queue_outlives_kill_nine_with_its_checkpoint_and_without(site: Site) -> None:
    door, agent = opened(site, acme=SLOW)
    stream = heavy(agent)
    items = flood(door, agent, stream, 400)
    before = queues(site)["acme"]
    for lose_checkpoint in (False, True):
        site.stop("collector", signal.SIGKILL)
        if lose_checkpoint:
            (site.directory / "collector" / "streams.db").unlink()
        site.start_collector()
        after = queues(site)["acme"]
        assert (after["batches"], after["bytes"]) == (before["batches"], before["bytes"])
        assert statuses(door.deliver(agent, stream, items[-10:])) == ["DUPLICATE"] * 10
        items.append(stream.next())
        assert statuses(door.deliver(agent, stream, items[-1:])) == ["PARKED"]
        before = queues(site)["acme"]
    site.stop("collector")
    site.start_collector()
    assert queues(site)["acme"]["batches"] == before["batches"]
    site.command("collector", "plan", "set", "acme", "--rate", "unlimited")
    until(lambda: not queues(site))
    assert handed_on(site) == [(item.seq, item.batch) for item in items]
    assert verify(site)["sound"]


def test_a_checkpoint_of_a_log_that_is_gone_is_forgotten_for_good(site: Site) -> None:
    door, agent = opened(site, acme=SLOW)
    stream = heavy(agent)
    items = flood(door, agent, stream, 200)
    site.stop("collector")
    shutil.rmtree(site.directory / "collector" / "log")
    site.start_collector()
    assert '"checkpoint_ahead_of_log"' in site.journal("collector")
    assert queues(site) == {}
    site.stop("collector")
    site.start_collector()
    assert queues(site) == {}
    assert "DUPLICATE" not in statuses(door.deliver(agent, stream, items)), "nobody has them any more"


def test_the_balance_outlives_an_orderly_restart(site: Site) -> None:
    door, agent = opened(site, acme=SLOW)
    stream = heavy(agent)
    assert set(statuses(door.deliver(agent, stream, [stream.next() for _ in range(50)]))) == {"ACCEPTED"}
    site.stop("collector")
    site.start_collector()
    (plan,) = site.ask("collector", "plans", tenant="acme")["tenants"]
    assert plan["balance"] < 40, "not full again"


def test_an_override_holds_until_it_is_cleared_also_over_a_restart(site: Site) -> None:
    door, _ = opened(site, acme=SLOW)

    def plan() -> dict[str, Any]:
        shown = json.loads(site.command("collector", "plan", "show", "acme", "--json").stdout)
        (found,) = shown["tenants"]
        return dict(found)

    assert (plan()["source"], plan()["rate"], plan()["burst"]) == ("settings", 0.001, 62)
    site.command("collector", "plan", "set", "acme", "--rate", "7", "--park-batches", "3")
    for restart in (False, True):
        if restart:
            site.stop("collector", signal.SIGKILL)
            site.start_collector()
        assert (plan()["source"], plan()["rate"], plan()["burst"], plan()["park_batches"]) == (
            "override",
            7,
            420,
            3,
        )
        assert door.metrics()["weighbridge_collector_plan_overrides"] == 1
    assert "override" in site.command("collector", "plan", "show").stdout
    site.command("collector", "plan", "clear", "acme")
    assert (plan()["source"], plan()["rate"]) == ("settings", 0.001)
    for words, says in (
        (("clear", "acme"), "not overridden"),
        (("set", "acme"), "nothing to set"),
        (("set", "acme", "--burst", "5"), ">= 62"),
    ):
        done = site.command("collector", "plan", *words, check=False)
        assert done.returncode == 2
        assert says in done.stderr


def test_a_reload_takes_up_other_plans_and_releases_what_they_allow(site: Site) -> None:
    door, agent = opened(site, acme=SLOW)
    flood(door, agent, heavy(agent), 400)
    text = site.collector_file.read_text()
    site.collector_file.write_text(text.replace("rate: 0.001", "rate: 1000000"))
    assert site.collector is not None
    site.collector.send_signal(signal.SIGHUP)
    until(lambda: not queues(site))
    assert len(handed_on(site)) == 400


def test_a_parked_batch_whose_record_was_spoiled_is_named_and_the_others_go_on(site: Site) -> None:
    door, agent = opened(site, acme=SLOW)
    items = flood(door, agent, heavy(agent), 400)
    parked = [record for record in records(site) if record.kind is Kind.PARKED]
    spoiled = parked[len(parked) // 2]
    (segment,) = (site.directory / "collector" / "log").glob("*.log")
    _flip_byte(segment, spoiled.offset + 200)
    site.command("collector", "plan", "set", "acme", "--rate", "unlimited")
    until(lambda: not queues(site))
    assert '"parked_batch_unreadable"' in site.journal("collector")
    assert door.metrics()["weighbridge_collector_unreadable_parked_batches_total"] == 1
    found = [record for record in scan(segment.parent) if isinstance(record, Record)]
    released = [record.seq for record in found if record.kind is Kind.RELEASED]
    assert released == [item.seq for item in items[-len(parked) :] if item.seq != spoiled.seq]
    assert all(read_note(record.note).tenant == "acme" for record in found if record.kind is Kind.PARKED)


def _flip_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))
