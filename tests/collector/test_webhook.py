"""The webhook: signed notices to a real HTTP server, again until they are taken, and never in the way."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bench.fleet import Stream
from bench.site import Site
from collector.door.ca import CertificateAuthority
from collector.notices import EVENTS, Notices
from tests.collector.door import Door, statuses
from tests.waiting import until
from wire.identity import AgentId
from wire.statuses import Reason
from wire.v1 import ingest_pb2 as pb
from wire.v1 import usage_pb2

SECRET = b"0123456789abcdef0123456789abcdef"
REPEAT_NS = 60 * 10**9
A, B = AgentId("a"), AgentId("b")


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what it is told, and answers with the next of `answers`, or 204."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[int] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hooks/weighbridge?team=billing"

    def events(self) -> list[dict[str, Any]]:
        return [event for _, _, body in self.requests for event in json.loads(body)["events"]]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), body))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.shutdown()
    made.server_close()


def told(site: Site, url: str, **webhook: Any) -> Door:
    site.directory.mkdir(parents=True, exist_ok=True)
    secret = site.directory / "secret"
    secret.write_bytes(SECRET + b"\n")
    site.prepare(
        collector={
            "webhook": {"url": url, "secret_file": str(secret), **webhook},
            "validation": {"tenants": ["acme", "globex", "small"]},
            "admission": {"tenants": {"small": {"rate": 0.001, "burst": 62, "park_batches": 5}}},
        }
    )
    site.start_collector()
    return Door(site, CertificateAuthority(site.directory / "collector" / "ca"))


def provoke(door: Door, tenants: tuple[str, ...] = ("nobody",)) -> None:
    """One rejection of each tenant that does not exist."""
    for tenant in tenants:
        agent = door.agent()
        stream = Stream(agent.agent_id, 1, tenant=tenant)
        assert statuses(door.deliver(agent, stream, [stream.next()])) == ["REJECTED"]


def test_rejections_conflicts_gaps_and_quotas_are_told_signed(site: Site, receiver: Receiver) -> None:
    door = told(site, receiver.url)
    agent = door.agent()
    stream, twin = Stream(agent.agent_id, 1), Stream(agent.agent_id, 1, rows=4)
    with_gap = stream.message()
    with_gap.gaps.add(
        start_unix_ns=1, end_unix_ns=2, reason=usage_pb2.GAP_REASON_SPOOL_LOST, detail="moved aside"
    )
    assert statuses(door.deliver(agent, stream, [stream.seal(with_gap)])) == ["ACCEPTED"]
    assert statuses(door.deliver(agent, stream, [twin.next()])) == ["REJECTED"]
    lost = Stream(agent.agent_id, 2, tenant="nobody")
    assert statuses(door.deliver(agent, lost, [lost.next() for _ in range(3)])) == ["REJECTED"] * 3
    heavy = Stream(agent.agent_id, 3, rows=30, tenant="small")
    answers = statuses(door.deliver(agent, heavy, [heavy.next() for _ in range(150)]))
    assert {"ACCEPTED", "PARKED", "RETRY"} == set(answers)
    events = until(lambda: (found := receiver.events()) and len(found) >= 5 and found)
    by_reason = {event["reason"]: event for event in events}
    assert {event["reason"]: event["event"] for event in events} == {
        "spool_lost": "gap",
        "identity_conflict": "conflict",
        "unknown_tenant": "rejection",
        "parked": "quota",
        "park_full": "quota",
    }
    gap = by_reason["spool_lost"]
    assert (gap["agent_id"], gap["tenant"], gap["epoch"], gap["seq"]) == (agent.agent_id, "acme", 1, 1)
    assert gap["detail"] == "moved aside"
    assert by_reason["parked"]["tenant"] == "small"
    for path, headers, body in receiver.requests:
        assert path == "/hooks/weighbridge?team=billing"
        at, _, stated = headers["Weighbridge-Signature"].partition(",v1=")
        expected = hmac.new(SECRET, at.removeprefix("t=").encode() + b"." + body, hashlib.sha256)
        assert stated == expected.hexdigest()
        assert abs(time.time() - int(at.removeprefix("t="))) < 60
    metrics = until(
        lambda: (m := door.metrics())["weighbridge_collector_webhook_delivered_notices"] >= 5 and m
    )
    assert metrics["weighbridge_collector_webhook_lost_notices"] == 0


def test_a_server_that_fails_is_asked_again_with_the_same_request(site: Site, receiver: Receiver) -> None:
    receiver.answers = [503, 429]
    door = told(site, receiver.url)
    provoke(door)
    until(lambda: len(receiver.requests) >= 3)
    bodies = {body for _, _, body in receiver.requests[:3]}
    assert len(bodies) == 1, "the same id, so that the receiver can tell"
    until(lambda: '"webhook_recovered"' in site.journal("collector"))
    assert '"webhook_unavailable"' in site.journal("collector")
    metrics = door.metrics()
    assert metrics["weighbridge_collector_webhook_failures"] == 2
    assert metrics["weighbridge_collector_webhook_delivered_notices"] == 1


def test_a_request_that_will_never_be_taken_is_given_up_and_counted(site: Site, receiver: Receiver) -> None:
    receiver.answers = [404]
    door = told(site, receiver.url)
    provoke(door)
    until(lambda: door.metrics()["weighbridge_collector_webhook_lost_notices"] == 1)
    provoke(door)
    until(lambda: door.metrics()["weighbridge_collector_webhook_delivered_notices"] == 1)
    assert len(receiver.requests) == 2


def test_with_nobody_at_the_other_end_batches_are_answered_and_what_does_not_fit_is_counted(
    site: Site, receiver: Receiver
) -> None:
    url = receiver.url
    receiver.shutdown()
    receiver.server_close()
    door = told(site, url, waiting=3)
    provoke(door)
    until(lambda: door.metrics()["weighbridge_collector_webhook_failures"] >= 1)
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    provoke(door, ("one", "two", "three", "four", "five"))
    metrics = door.metrics()
    assert metrics["weighbridge_collector_webhook_waiting_notices"] == 3
    assert metrics["weighbridge_collector_webhook_lost_notices"] == 2
    assert set(statuses(door.deliver(agent, stream, [stream.next() for _ in range(100)]))) == {"ACCEPTED"}
    assert site.stop("collector") == 0, "it ends all the same"


@pytest.mark.parametrize(
    ("webhook", "says"),
    [
        ({"url": "ftp://x/"}, "https://HOST/PATH"),
        ({"url": "https://x/"}, "webhook.secret_file"),
        ({"url": "https://x/", "secret_file": "/nowhere/secret"}, "/nowhere/secret"),
    ],
)
def test_a_webhook_that_cannot_work_is_refused_before_anything_runs(
    site: Site, webhook: dict[str, str], says: str
) -> None:
    site.prepare()
    text = site.collector_file.read_text()
    site.collector_file.write_text(text + f"webhook: {json.dumps(webhook)}\n")
    done = site.command("collector", "check-config", check=False)
    assert done.returncode == 2
    assert says in done.stderr


def item(seq: int) -> pb.Item:
    return pb.Item(epoch=1, seq=seq)


def test_a_flood_of_one_kind_is_one_notice_now_and_one_number_later() -> None:
    notices = Notices(EVENTS, 10, REPEAT_NS)
    for seq in range(1, 1_001):
        notices.rejected(A, item(seq), Reason.REASON_MALFORMED, "no UsageBatch")
    now_ns = time.monotonic_ns()
    (first,) = notices.take(now_ns, 100)
    assert (first.count, first.seq, first.reason) == (1_000, 1, "malformed")
    for seq in range(2_000, 2_050):
        notices.rejected(A, item(seq), Reason.REASON_MALFORMED, "no UsageBatch")
    notices.rejected(B, item(1), Reason.REASON_MALFORMED, "no UsageBatch")
    assert [n.agent_id for n in notices.take(now_ns + 10**9, 100)] == ["b"]
    (later,) = notices.take(now_ns + REPEAT_NS + 1, 100)
    assert (later.agent_id, later.count, later.seq) == ("a", 50, 2_000)


def test_the_table_is_bounded_and_what_found_no_room_is_counted() -> None:
    notices = Notices(EVENTS, 5, REPEAT_NS)
    for number in range(8):
        notices.quota(f"tenant-{number}", "parked")
        notices.quota("tenant-0", "parked")
    assert (len(notices), notices.not_fitted) == (5, 3)
    assert [n.tenant for n in notices.take(time.monotonic_ns(), 2)] == ["tenant-0", "tenant-1"]
    assert len(notices) == 3


def test_only_what_is_wanted_is_gathered() -> None:
    notices = Notices(["conflict"], 5, REPEAT_NS)
    notices.quota("acme", "parked")
    notices.gap(A, "acme", item(1), "reboot", "")
    notices.rejected(A, item(1), Reason.REASON_MALFORMED, "")
    assert len(notices) == 0
    notices.rejected(A, item(1), Reason.REASON_IDENTITY_CONFLICT, "")
    assert [n.event for n in notices.take(time.monotonic_ns(), 5)] == ["conflict"]
