"""The whole door, as a real process over real mutual TLS: each bad input has its named answer and metric."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.fleet import SimulatedAgent, Stream, enrol
from bench.site import Site, SiteError
from collector.door.ca import CertificateAuthority
from wire.limits import MAX_MESSAGE_BYTES
from wire.statuses import Reason, Status
from wire.tls import CHANNEL_OPTIONS, client_credentials_without_certificate
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import EnrolmentStub, IngestStub


@dataclass
class Door:
    """A running collector and how to come in."""

    site: Site
    authority: CertificateAuthority

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.site.ports['ingest']}"

    def agent(self, tenants: frozenset[str] | None = None) -> SimulatedAgent:
        return enrol(self.authority, tenants)

    def channel(self, agent: SimulatedAgent, **options: Any) -> grpc.Channel:
        extra = [(f"grpc.{name}", value) for name, value in options.items()]
        return grpc.secure_channel(self.address, agent.credentials, [*CHANNEL_OPTIONS, *extra])

    def deliver(
        self, agent: SimulatedAgent, stream: Stream, items: list[pb.Item], **more: Any
    ) -> list[pb.Answer]:
        """One Hello, one Delivery, its answers."""

        def requests() -> Iterator[pb.DeliverRequest]:
            yield stream.hello(more.get("oldest_seq", 1))
            yield pb.DeliverRequest(delivery=pb.Delivery(items=items))

        with self.channel(agent) as channel:
            responses = list(IngestStub(channel).Deliver(requests(), timeout=20))
        assert responses[0].WhichOneof("kind") == "welcome"
        return [a for r in responses[1:] for a in r.answers.answers]

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.site.ports['local']}/metrics", timeout=10
        ) as page:
            lines = page.read().decode().splitlines()
        return {
            k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))
        }

    def refusals(self, code: str, reason: str) -> float:
        key = f'weighbridge_collector_refusals_total{{code="{code}",reason="{reason}"}}'
        return self.metrics().get(key, 0.0)

    def log(self, *options: str) -> list[dict[str, Any]]:
        done = self.site.command("collector", "log", "cat", "--json", *options)
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with Site(tmp_path_factory.mktemp("door")) as site:
        site.prepare(collector={"validation": {"tenants": ["acme", "globex", "unattributed"]}})
        site.start_collector()
        yield Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
        assert site.collector is not None
        assert site.collector.poll() is None, f"the collector died:\n{site.journal('collector')}"
        # Whatever was thrown at it, what it holds is sound.
        assert site.command("collector", "log", "verify").returncode == 0


def statuses(answers: list[pb.Answer]) -> list[str]:
    return [Status.Name(a.status).removeprefix("STATUS_") for a in answers]


def test_batches_are_accepted_once_and_are_duplicates_ever_after(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(60)]
    assert statuses(door.deliver(agent, stream, items)) == ["ACCEPTED"] * 60
    assert statuses(door.deliver(agent, stream, items)) == ["DUPLICATE"] * 60
    mine = [line for line in door.log() if line["agent_id"] == agent.agent_id]
    assert [line["seq"] for line in mine] == list(range(1, 61))
    assert [line["digest"] for line in mine] == [item.digest.hex() for item in items]


def test_the_same_batch_twice_in_one_delivery_is_stored_once(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    item = stream.next()
    assert statuses(door.deliver(agent, stream, [item, item, item])) == ["ACCEPTED", "DUPLICATE", "DUPLICATE"]


def test_a_sequence_gap_is_taken_and_the_late_batch_too(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    first, second, third = (stream.next() for _ in range(3))
    assert statuses(door.deliver(agent, stream, [first, third])) == ["ACCEPTED", "ACCEPTED"]
    assert statuses(door.deliver(agent, stream, [second])) == ["ACCEPTED"]


def test_beyond_the_window_the_answer_is_retry_and_leaves_no_mark(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(300)]
    (answer,) = door.deliver(agent, stream, [items[-1]])
    assert statuses([answer]) == ["RETRY"]
    assert answer.reason == Reason.REASON_OUT_OF_WINDOW
    assert answer.retry_after_ms > 0
    assert statuses(door.deliver(agent, stream, items[:150])) == ["ACCEPTED"] * 150
    assert statuses(door.deliver(agent, stream, items[150:])) == ["ACCEPTED"] * 150


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (lambda b: setattr(b, "agent_id", "00000000-0000-4000-8000-000000000000"), "METER-003", "foreign_agent"),
        (lambda b: setattr(b, "tenant", "initech"), "METER-005", "unknown_tenant"),
        (lambda b: setattr(b, "interval_end_unix_ns", time.time_ns() + 365 * 86_400 * 10**9), "METER-005", "clock_skew"),
        (lambda b: b.cpu_user_ns.__setitem__(0, 2**64 - 1), "METER-005", "out_of_bounds"),
        (lambda b: b.cpu_usage_ns.__setitem__(0, 2**50), "METER-005", "implausible"),
        (lambda b: b.containers.name.__setitem__(0, "\x1b]0;owned\x07"), "METER-005", "out_of_bounds"),
        (lambda b: b.containers.name.__setitem__(0, "n" * 65_536), "METER-005", "out_of_bounds"),
        (lambda b: setattr(b, "previous_digest", b"x" * 32), "METER-005", "chain_broken"),
    ],
    ids=["foreign agent", "unknown tenant", "clock a year off", "negative", "impossible", "escape", "64 KiB", "chain"],
)  # fmt: skip
def test_an_invalid_batch_is_rejected_by_name_kept_and_counted_and_its_neighbours_go_on(
    door: Door, spoil: Any, code: str, reason: str
) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    good = stream.next()
    message = stream.message()
    spoil(message)
    bad = stream.seal(message)
    after = stream.next()
    before = door.refusals(code, reason)
    answers = door.deliver(agent, stream, [good, bad, after])
    assert statuses(answers) == ["ACCEPTED", "REJECTED", "ACCEPTED"]
    assert Reason.Name(answers[1].reason) == f"REASON_{reason.upper()}"
    assert answers[1].detail.isprintable()
    assert door.refusals(code, reason) == before + 1
    (kept,) = [line for line in door.log("--rejected") if line["digest"] == bad.digest.hex()]
    assert kept["reason"] == f"REASON_{reason.upper()}"
    assert kept["agent_id"] == agent.agent_id


def test_a_tenant_the_agent_may_not_report_is_refused(door: Door) -> None:
    agent = door.agent(frozenset({"globex"}))
    stream = Stream(agent.agent_id, 1, tenant="acme")
    (answer,) = door.deliver(agent, stream, [stream.next()])
    assert answer.reason == Reason.REASON_TENANT_NOT_PERMITTED
    assert door.refusals("METER-003", "tenant_not_permitted") >= 1


def test_bytes_that_do_not_fit_their_digest_leave_the_identity_open_for_the_right_ones(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    item = stream.next()
    spoiled = pb.Item(epoch=1, seq=1, digest=item.digest, batch=item.batch[:-1] + b"\x00")
    (answer,) = door.deliver(agent, stream, [spoiled])
    assert (statuses([answer]), answer.reason) == (["REJECTED"], Reason.REASON_DIGEST_MISMATCH)
    assert statuses(door.deliver(agent, stream, [item])) == ["ACCEPTED"]


def test_the_same_identity_with_other_content_is_a_conflict_and_both_are_kept(door: Door) -> None:
    agent = door.agent()
    one, other = Stream(agent.agent_id, 1), Stream(agent.agent_id, 1, rows=4)
    first, second = one.next(), other.next()
    assert statuses(door.deliver(agent, one, [first])) == ["ACCEPTED"]
    (answer,) = door.deliver(agent, other, [second])
    assert (statuses([answer]), answer.reason) == (["REJECTED"], Reason.REASON_IDENTITY_CONFLICT)
    assert door.refusals("METER-006", "identity_conflict") >= 1
    kinds = {line["digest"]: line["kind"] for line in door.log("--rejected")}
    assert kinds[second.digest.hex()] == "refused"
    assert statuses(door.deliver(agent, one, [first])) == ["DUPLICATE"]


def test_a_stream_that_another_collector_answered_so_far_goes_on_here(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    for _ in range(1_000):
        stream.next()
    item = stream.next()
    assert statuses(door.deliver(agent, stream, [item], oldest_seq=1_001)) == ["ACCEPTED"]
    assert door.metrics()["weighbridge_collector_adopted_streams_total"] >= 1


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
    _until(lambda: door.metrics()["weighbridge_collector_broken_streams_total"] == before + 1)


def test_a_batch_larger_than_a_batch_may_be_is_rejected_by_name(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    (answer,) = door.deliver(agent, stream, [pb.Item(epoch=1, seq=1, digest=b"x" * 32, batch=bytes(2 << 20))])
    assert answer.reason == Reason.REASON_TOO_LARGE


def test_a_batch_refused_for_its_size_is_kept_once_however_often_it_comes(door: Door) -> None:
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    huge = pb.Item(epoch=1, seq=1, digest=b"x" * 32, batch=bytes(2 << 20))
    assert statuses(door.deliver(agent, stream, [huge])) == ["REJECTED"]
    assert statuses(door.deliver(agent, stream, [huge])) == ["DUPLICATE"]
    assert len([line for line in door.log("--rejected") if line["agent_id"] == agent.agent_id]) == 1


def test_a_gzip_bomb_is_refused_in_little_memory(door: Door) -> None:
    agent = door.agent()
    bomb = bytes(256 << 20)
    assert len(gzip.compress(bomb[: 1 << 20])) < 2_000
    process = door.site.collector
    assert process is not None
    with grpc.secure_channel(
        door.address,
        agent.credentials,
        [*CHANNEL_OPTIONS, ("grpc.max_send_message_length", -1)],
        compression=grpc.Compression.Gzip,
    ) as channel:
        call: Any = channel.stream_stream("/weighbridge.v1.Ingest/Deliver")
        hello = Stream(agent.agent_id, 1).hello().SerializeToString()
        with pytest.raises(grpc.RpcError) as error:
            list(call(iter([hello, bomb]), timeout=60))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    assert peak_kib < 300 * 1024


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
    from datetime import timedelta

    from bench.fleet import key_and_request
    from wire.identity import new_agent_id
    from wire.tls import client_credentials

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
    from bench.fleet import key_and_request

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


def test_openssl_negotiates_tls_1_3_and_gets_no_cbc(door: Door) -> None:
    def s_client(*options: str) -> str:
        command = ["openssl", "s_client", "-connect", door.address, "-alpn", "h2", *options]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
        ).stdout

    assert "TLSv1.3" in s_client()
    assert "Cipher is (NONE)" in s_client("-tls1_2", "-cipher", "AES128-SHA:ECDHE-ECDSA-AES128-SHA")
    assert "Cipher is (NONE)" in s_client("-tls1_1", "-cipher", "ALL:@SECLEVEL=0")


# The process itself, each test with its own.


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
    _until(lambda: door.metrics()["weighbridge_collector_reload_failed"] == 1)
    assert "reload_failed" in site.ask("collector", "status")["ready"]
    site.collector_file.write_text(good.replace("globex", "acme"))
    site.collector.send_signal(signal.SIGHUP)
    _until(lambda: door.metrics()["weighbridge_collector_reload_failed"] == 0)
    assert statuses(door.deliver(agent, stream, [stream.next()])) == ["ACCEPTED"]


def _until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
