"""Whoever knocks, and whatever bytes they send: nobody comes in who may not, and no other agent notices."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.fleet import Stream, enrol, key_and_request
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.waiting import until
from wire.identity import new_agent_id
from wire.limits import MAX_ITEMS_PER_DELIVERY, MAX_MESSAGE_BYTES
from wire.tls import CHANNEL_OPTIONS, client_credentials, client_credentials_without_certificate
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import EnrolmentStub, IngestStub


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"\xff\xff\xff rubbish", "unreadable_message"), (b"\x12\xff\xff\xff\x7f", "unreadable_message")],
    ids=["rubbish", "truncated"],
)
def test_a_message_that_cannot_be_read_ends_that_stream_with_its_code(
    door: Door, data: bytes, reason: str
) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    item = stream.next()
    before = door.refusals("METER-005", reason)
    good = pb.DeliverRequest(delivery=pb.Delivery(items=[item])).SerializeToString()
    with door.channel(agent) as channel:
        call: Any = channel.stream_stream("/weighbridge.v1.Ingest/Deliver")
        answers: list[bytes] = []
        with pytest.raises(grpc.RpcError) as error:
            answers.extend(call(iter([stream.hello().SerializeToString(), good, data]), timeout=20))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "METER-005" in error.value.details()
    assert door.refusals("METER-005", reason) == before + 1
    # What was valid before it is not lost.
    assert statuses(door.deliver(agent, stream, [item])) == ["DUPLICATE"]


def test_a_stream_begins_with_hello(door: Door) -> None:
    agent = door.agent()
    with door.channel(agent) as channel, pytest.raises(grpc.RpcError, match="begins with Hello"):
        list(IngestStub(channel).Deliver(iter([pb.DeliverRequest(delivery=pb.Delivery())]), timeout=20))
    with door.channel(agent) as channel, pytest.raises(grpc.RpcError, match="impossible epoch"):
        list(IngestStub(channel).Deliver(iter([pb.DeliverRequest(hello=pb.Hello(epoch=2**63))]), timeout=20))


def test_an_oversized_message_is_refused_and_counted(door: Door) -> None:
    agent = door.agent()
    before = door.metrics()["weighbridge_collector_broken_streams_total"]
    stream = Stream(agent.agent_id, 1)
    huge = pb.Item(epoch=1, seq=1, batch=bytes(MAX_MESSAGE_BYTES + 1))

    def requests() -> Iterator[pb.DeliverRequest]:
        yield stream.hello()
        yield pb.DeliverRequest(delivery=pb.Delivery(items=[huge]))

    with door.channel(agent, max_send_message_length=-1) as channel:
        with pytest.raises(grpc.RpcError) as error:
            list(IngestStub(channel).Deliver(requests(), timeout=20))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger" in error.value.details()
    until(lambda: door.metrics()["weighbridge_collector_broken_streams_total"] == before + 1)


@pytest.mark.parametrize("size", [1 << 10, 256 << 20], ids=["small", "bomb"])
def test_a_compressed_message_is_refused_unopened(door: Door, size: int) -> None:
    agent = door.agent()
    process = door.site.collector
    assert process is not None
    refusal = "Compression algorithm 'gzip' is disabled"
    before = door.site.journal("collector").count(refusal)
    with grpc.secure_channel(
        door.address,
        agent.credentials,
        [*CHANNEL_OPTIONS, ("grpc.max_send_message_length", -1)],
        compression=grpc.Compression.Gzip,
    ) as channel:
        call: Any = channel.stream_stream("/weighbridge.v1.Ingest/Deliver")
        hello = Stream(agent.agent_id, 1).hello().SerializeToString()
        with pytest.raises(grpc.RpcError) as error:
            list(call(iter([hello, bytes(size)]), timeout=60))
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert refusal in error.value.details()
    until(lambda: door.site.journal("collector").count(refusal) == before + 1)
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    assert peak_kib < 128 * 1024


def test_a_long_delivery_of_a_tenant_over_its_limit_lets_others_in_between(door: Door) -> None:
    door.site.ask(
        "collector", "plan_set", tenant="globex", plan={"rate": 1, "burst": 62, "park_batches": 1_000}
    )
    with door.open(door.agent()) as long, door.open(door.agent()) as short:
        long.stream.tenant, long.stream.rows = "globex", 50
        assert statuses(long.deliver(100))[-1] == "PARKED"
        long.last = [long.stream.next() for _ in range(MAX_ITEMS_PER_DELIVERY)]
        parts = long.again_in_parts()
        answers = next(parts)
        assert statuses(short.deliver(1)) == ["ACCEPTED"]
        answers += [answer for part in parts for answer in part]
    assert set(statuses(answers)) == {"PARKED"}
    assert [answer.seq for answer in answers] == [item.seq for item in long.last], "each, in order"
    door.site.ask("collector", "plan_clear", tenant="globex")
    held = {r["seq"]: r["offset"] for r in door.log("--parked") if r["agent_id"] == long.stream.agent_id}
    (between,) = (r["offset"] for r in door.log() if r["agent_id"] == short.stream.agent_id)
    assert held[long.last[0].seq] < between < held[long.last[-1].seq]


def test_without_a_certificate_of_this_ca_nobody_comes_in(door: Door, tmp_path: Path) -> None:
    other = CertificateAuthority.init(tmp_path / "ca", "demo.example", ["127.0.0.1"])
    stranger = enrol(other)
    key, chain = stranger.key_pem, stranger.certificate_pem
    ca = door.authority.ca_pem
    for credentials in (
        client_credentials_without_certificate(ca),
        grpc.ssl_channel_credentials(ca, key, chain),
    ):
        with grpc.secure_channel(door.address, credentials, CHANNEL_OPTIONS) as channel:
            with pytest.raises(grpc.RpcError) as error:
                list(IngestStub(channel).Deliver(iter([Stream(stranger.agent_id, 1).hello()]), timeout=10))
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_of_this_ca_for_somebody_who_is_not_enrolled_is_refused_by_code(door: Door) -> None:

    key, csr = key_and_request()
    chain = door.authority.issue_agent(csr, new_agent_id(), timedelta(hours=1))
    credentials = client_credentials(door.authority.ca_pem, chain, key)
    with grpc.secure_channel(door.address, credentials, CHANNEL_OPTIONS) as channel:
        with pytest.raises(grpc.RpcError, match="METER-003") as error:
            list(IngestStub(channel).Deliver(iter([]), timeout=10))
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert door.refusals("METER-003", "not_authenticated") >= 1


def test_revocation_cuts_an_open_stream_within_five_seconds(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)

    def requests() -> Iterator[pb.DeliverRequest]:
        yield stream.hello()
        time.sleep(30)

    with door.channel(agent) as channel:
        responses = IngestStub(channel).Deliver(requests(), timeout=30)
        assert next(responses).WhichOneof("kind") == "welcome"
        door.site.command("collector", "ca", "revoke", agent.agent_id)
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError, match="revoked") as error:
            next(responses)
        assert time.monotonic() - begun <= 5
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_enrolment_door_takes_a_token_once_and_guessing_is_slow(door: Door) -> None:

    address = f"127.0.0.1:{door.site.ports['enrolment']}"
    credentials = client_credentials_without_certificate(door.authority.ca_pem)
    _, csr = key_and_request()
    with grpc.secure_channel(address, credentials, CHANNEL_OPTIONS) as channel:
        stub = EnrolmentStub(channel)
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError, match="not known"):
            stub.Enrol(pb.EnrolRequest(token="guess", csr_der=csr, host="h"), timeout=10)
        assert time.monotonic() - begun >= 0.5
        secret = door.authority.registry.add_token(None, None, 60)
        with pytest.raises(grpc.RpcError, match="PKCS#10"):
            stub.Enrol(pb.EnrolRequest(token=secret, csr_der=b"rubbish", host="h"), timeout=10)
        answer = stub.Enrol(pb.EnrolRequest(token=secret, csr_der=csr, host="h"), timeout=10)
        assert answer.collectors == [f":{door.site.ports['ingest']}"]
        with pytest.raises(grpc.RpcError, match="used already"):
            stub.Enrol(pb.EnrolRequest(token=secret, csr_der=csr, host="h"), timeout=10)


def test_metrics_are_clean_for_promtool_and_bounded(door: Door) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{door.site.ports['local']}/metrics", timeout=10) as page:
        text = page.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"")
    assert len(text.splitlines()) < 300
