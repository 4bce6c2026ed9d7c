"""What one agent, one address, or all of them together may ask of a running collector; and that agents come back."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import yaml

from bench import http2
from bench.floods import target_of
from bench.http2 import Connection
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.door.noise import NOISE_BYTES, STREAM_BYTES
from tests.collector.door import Door, statuses
from tests.waiting import until
from wire.limits import MAX_MESSAGE_BYTES
from wire.statuses import Reason


def running(site: Site, **collector: Any) -> Door:
    site.prepare(collector=collector)
    site.start_collector()
    return Door(site, CertificateAuthority(site.directory / "collector" / "ca"))


def change(site: Site, **collector: Any) -> None:
    """Lay new sections over the settings and tell the collector."""
    settings = yaml.safe_load(site.collector_file.read_text())
    for key, section in collector.items():
        settings[key] = {**settings.get(key, {}), **section}
    site.collector_file.write_text(yaml.safe_dump(settings))
    assert site.collector is not None
    site.collector.send_signal(signal.SIGHUP)


def events(site: Site, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in site.journal("collector").splitlines())
    return [line for line in lines if line["event"] == event]


def refused(door: Door, agent: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        door.open(agent)
    return error.value


def test_whoever_is_one_too_many_is_told_so_by_name_and_let_in_when_there_is_room(site: Site) -> None:
    door = running(site, limits={"streams": 4, "streams_per_agent": 2})
    one, other = door.agent(), door.agent()
    with door.open(one), door.open(one) as second:
        error = refused(door, one)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "ERR_MAX_CONCURRENCY_REACHED: `limits.streams_per_agent`" in error.details()
        with door.open(other), door.open(other):
            error = refused(door, door.agent())
            assert "ERR_MAX_CONCURRENCY_REACHED: `limits.streams`" in error.details()
            assert statuses(second.deliver(3)) == ["ACCEPTED"] * 3, "who is in is not disturbed"
    assert door.refusals("METER-002", "too_many_streams_of_agent") == 1
    assert door.refusals("METER-002", "too_many_streams") == 1
    until(lambda: door.metrics()["weighbridge_collector_open_streams"] == 0)
    change(site, limits={"streams_per_address": 2})
    until(lambda: events(site, "reloaded"))
    assert events(site, "reloaded")[0]["needs_restart"] == []
    with door.open(one), door.open(other):
        assert "`limits.streams_per_address`" in refused(door, door.agent()).details()


def test_an_agent_that_finds_no_room_backs_off_and_delivers_everything_when_there_is(site: Site) -> None:
    door = running(site, limits={"streams": 1, "streams_per_agent": 2})
    with door.open(door.agent()):
        site.enroll()
        site.start_agent()
        site.wait_metering()
        until(lambda: site.ask("agent", "status")["spool_batches"] >= 3)
        time.sleep(4)
        tried = door.refusals("METER-002", "too_many_streams")
        # Full jitter from 0.2 s on, doubling: twelve tries would take 400 s on average.
        assert 1 <= tried <= 12
        assert "ERR_MAX_CONCURRENCY_REACHED" in site.journal("agent")
    until(lambda: door.metrics()['weighbridge_collector_answers_total{status="accepted"}'] >= 3, 90)
    assert door.metrics()['weighbridge_collector_answers_total{status="rejected"}'] == 0


def test_who_sends_more_than_its_rate_is_read_more_slowly_loses_nothing_and_delays_nobody(site: Site) -> None:
    door = running(site, limits={"bytes_per_second": "1MiB", "burst": "4MiB"})
    with door.open(door.agent()) as loud, door.open(door.agent()) as quiet:
        loud.stream.rows = 800
        size = len(loud.stream.message().SerializeToString())
        count = (8 << 20) // size
        begun = time.monotonic()
        answers = [answer for _ in range(count) for answer in loud.deliver(1)]
        seconds = time.monotonic() - begun
        assert statuses(answers) == ["ACCEPTED"] * count
        assert seconds > (count * size - (4 << 20)) / (1 << 20) * 0.9
        assert door.metrics()["weighbridge_collector_slowed_messages_total"] > 0
        assert statuses(quiet.deliver(5)) == ["ACCEPTED"] * 5


@contextlib.contextmanager
def short_memory(door: Door) -> Iterator[None]:
    """What one agent sent beyond its rate is held until it is its turn."""
    with contextlib.ExitStack() as greedy:
        agent = door.agent()
        for one in [greedy.enter_context(door.open(agent)) for _ in range(20)]:
            one.send_rubbish(3 * [MAX_MESSAGE_BYTES - 100])
        until(lambda: door.metrics()["weighbridge_collector_memory_short"] == 1)
        yield


ONE_IS_GREEDY = {
    "memory": "128MiB",
    "bytes_per_second": "1MiB",
    "burst": "4MiB",
    "streams_per_agent": 64,
}


def test_short_memory_is_a_retry_and_no_new_stream_until_there_is_enough(site: Site) -> None:
    door = running(site, limits=ONE_IS_GREEDY)
    with door.open(door.agent()) as stream:
        assert statuses(stream.deliver(2)) == ["ACCEPTED"] * 2
        with short_memory(door):
            answers = stream.deliver(2)
            assert statuses(answers) == ["RETRY"] * 2
            assert {answer.reason for answer in answers} == {Reason.REASON_MEMORY}
            assert all(answer.retry_after_ms >= 1_000 for answer in answers)
            error = refused(door, door.agent())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "`limits.memory`" in error.details()
            assert "METER-002" in unready(site)["memory_short"]
        until(lambda: door.metrics()["weighbridge_collector_memory_short"] == 0)
        assert unready(site) == {}
        assert statuses(stream.again()) == ["ACCEPTED"] * 2
    assert events(site, "memory_short")
    assert events(site, "memory_recovered")


@pytest.mark.parametrize(
    ("door_of", "most_bytes"), [("ingest", NOISE_BYTES + STREAM_BYTES), ("enrolment", NOISE_BYTES)]
)
def test_who_sent_much_that_is_no_message_is_hung_up_on(site: Site, door_of: str, most_bytes: int) -> None:
    door = running(site, limits=ONE_IS_GREEDY)
    target = target_of(site, door.agent())
    context = target.agent() if door_of == "ingest" else target.nobody()
    with door.open(door.agent()) as stream, Connection(site.ports[door_of], context) as noisy:
        assert statuses(stream.deliver(2)) == ["ACCEPTED"] * 2
        noisy.acknowledge()
        frames = http2.priority(1) * (most_bytes // 8 // len(http2.priority(1)))
        with contextlib.suppress(OSError):  # hung up on before all is sent
            for _ in range(10):
                noisy.send(frames)
        with short_memory(door):
            assert noisy.closed_within(5)
            assert statuses(stream.deliver(2)) == ["RETRY"] * 2, "this stream was not cut"
        until(lambda: door.metrics()["weighbridge_collector_memory_short"] == 0)
        assert statuses(stream.again()) == ["ACCEPTED"] * 2
    (ended,) = events(site, "noise_ended")
    assert ended["connections"] == 1
    assert most_bytes < ended["bytes_received"] < 2 * most_bytes
    assert door.refusals("METER-002", "noise") == 1


def unready(site: Site) -> dict[str, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{site.ports['local']}/readyz", timeout=10):
            return {}
    except urllib.error.HTTPError as error:
        reasons: dict[str, str] = json.load(error)["reasons"]
        return reasons


def test_other_tenants_for_an_agent_hold_within_five_seconds_without_a_new_certificate(site: Site) -> None:
    door = running(site)
    agent = door.agent(frozenset({"globex"}))
    with door.open(agent) as stream:
        (answer,) = stream.deliver(1)
        assert answer.reason == Reason.REASON_TENANT_NOT_PERMITTED
        with door.open(door.agent()) as other:
            site.command("collector", "ca", "permit", agent.agent_id, "--tenant", "acme")
            begun = time.monotonic()
            error = stream.end()
            assert time.monotonic() - begun <= 5
            assert error.code() is grpc.StatusCode.UNAVAILABLE, "the agent connects again at once"
            assert statuses(other.deliver(1)) == ["ACCEPTED"]
    with door.open(agent, epoch=2) as stream:
        assert statuses(stream.deliver(1)) == ["ACCEPTED"]
    assert site.command("collector", "ca", "permit", "nobody", "--any", check=False).returncode == 2
    assert "tenants_permitted" in site.command("collector", "audit", "show").stdout
