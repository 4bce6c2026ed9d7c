"""`log verify` and `log readmit`: what they say of a log, and what a person may let in after all."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench.fleet import Stream, enrol
from collector.audit import Line
from collector.audit import lines as audit_lines
from collector.config import AdmissionSettings, Settings, Validation
from collector.decide.admission import Admission
from collector.door.ca import CertificateAuthority
from collector.handoff.log import DurableLog, Kind, LogError, Record, frame, scan
from collector.log_commands import verify
from collector.plans import Plans
from collector.readmission import Choice, Outcome, readmit
from collector.server import load
from collector.state.memory import Streams
from collector.state.sqlite import Checkpoint
from tests.collector.logs import FIRST, FREE, SEGMENT
from wire.daemon.settings import Bytes, Seconds
from wire.v1 import ingest_pb2 as pb

DAY_NS = 86_400 * 10**9


class Centre:
    """A collector's log, CA and settings, without the collector."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = CertificateAuthority.init(directory / "ca", "demo.example", ["127.0.0.1"])

    def settings(self, **validation: object) -> Settings:
        settings = Settings(state_dir=self.directory, validation=Validation(**validation))  # type: ignore[arg-type]
        return settings.__replace__(log=settings.log.__replace__(min_free=Bytes(0)))

    def keep(self, *records: tuple[Kind, Stream, pb.Item, str], received_at_unix_ns: int = 0) -> None:
        log = DurableLog(self.directory / "log", SEGMENT, FREE)
        for kind, stream, item, note in records:
            agent = bytes.fromhex(stream.agent_id.replace("-", ""))
            pieces = frame(
                kind,
                received_at_unix_ns or time.time_ns(),
                agent,
                item.epoch,
                item.seq,
                item.digest,
                note.encode(),
                item.batch,
            )
            assert log.append_and_wait(list(pieces)) is not None
        log.close()

    def records(self) -> list[Record]:
        return [r for r in scan(self.directory / "log") if isinstance(r, Record)]

    def accepted(self) -> list[tuple[int, bytes]]:
        return [(r.seq, r.body) for r in self.records() if r.kind is Kind.ACCEPTED]


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    return Centre(tmp_path)


def stream_of(centre: Centre, tenants: frozenset[str] | None = None, tenant: str = "acme") -> Stream:
    return Stream(enrol(centre.authority, tenants).agent_id, 1, tenant=tenant)


UNKNOWN_TENANT = "REASON_UNKNOWN_TENANT tenant acme is not in the collector's `validation.tenants`"


def still(outcomes: list[Outcome]) -> list[str]:
    return [outcome.still.partition(" ")[0] for outcome in outcomes]


def test_usage_of_a_tenant_that_was_unknown_is_let_in_once_however_often_it_is_asked_for(
    centre: Centre,
) -> None:
    stream = stream_of(centre)
    first, second, third = stream.next(), stream.next(), stream.next()
    centre.keep(
        (Kind.ACCEPTED, stream, first, ""),
        (Kind.REJECTED, stream, second, UNKNOWN_TENANT),
        (Kind.ACCEPTED, stream, third, ""),
    )
    settings = centre.settings(tenants=["acme"])
    (outcome,) = readmit(settings, Choice(), dry_run=True)
    assert (outcome.seq, outcome.tenant, outcome.rows, outcome.still) == (2, "acme", 3, "")
    assert [seq for seq, _ in centre.accepted()] == [1, 3], "a dry run writes nothing"
    assert [o.seq for o in readmit(settings, Choice(), dry_run=False)] == [2]
    assert readmit(settings, Choice(), dry_run=False) == []
    assert centre.accepted() == [(1, first.batch), (3, third.batch), (2, second.batch)]
    note = centre.records()[-1].note.decode()
    assert note.startswith("READMITTED REASON_UNKNOWN_TENANT at log offset ")
    verdict = verify(centre.directory / "log")
    assert verdict.sound
    assert (verdict.batches, verdict.rejected, verdict.readmitted) == (3, 0, 1)


def test_what_the_settings_of_today_refuse_stays_out_and_says_why(centre: Centre) -> None:
    stream = stream_of(centre)
    centre.keep((Kind.REJECTED, stream, stream.next(), UNKNOWN_TENANT))
    outcomes = readmit(centre.settings(tenants=["globex"]), Choice(), dry_run=False)
    assert still(outcomes) == ["REASON_UNKNOWN_TENANT"]
    assert centre.accepted() == []


def test_a_clock_bound_is_judged_at_the_time_of_arrival(centre: Centre) -> None:
    stream = stream_of(centre)
    item = stream.next()
    # Arrived when this host's clock was ten days behind the batch's end.
    arrived = stream.start_unix_ns - 10 * DAY_NS
    skew = "REASON_CLOCK_SKEW ends 864000 s in the future; set the host's clock"
    centre.keep((Kind.REJECTED, stream, item, skew), received_at_unix_ns=arrived)
    assert still(readmit(centre.settings(), Choice(), dry_run=False)) == ["REASON_CLOCK_SKEW"]
    wide = centre.settings(clock_ahead=Seconds(50 * 86_400))
    assert still(readmit(wide, Choice(), dry_run=False)) == [""]
    assert centre.accepted() == [(1, item.batch)]


def test_a_tenant_that_the_agents_token_lacked_is_let_in_once_the_agent_may_report_it(centre: Centre) -> None:
    stream = stream_of(centre, frozenset({"globex"}))
    refused = "REASON_TENANT_NOT_PERMITTED tenant acme is not among this agent's"
    centre.keep((Kind.REJECTED, stream, stream.next(), refused))
    assert still(readmit(centre.settings(), Choice(), dry_run=False)) == ["REASON_TENANT_NOT_PERMITTED"]
    centre.authority.registry.add_agent(stream.agent_id, "host", frozenset({"globex", "acme"}))
    assert still(readmit(centre.settings(), Choice(), dry_run=False)) == [""]
    assert [seq for seq, _ in centre.accepted()] == [1]


def test_what_is_invalid_by_itself_or_another_identitys_is_never_let_in(centre: Centre) -> None:
    stream = stream_of(centre)
    impossible, conflict, forked = stream.next(), stream.next(), stream.next()
    stream.last_digest = b"x" * 32
    chained_to_nobody = stream.next()
    centre.keep(
        (Kind.REJECTED, stream, impossible, "REASON_IMPLAUSIBLE cpu_usage_ns: 5 in 1 ns on 1 CPUs"),
        (Kind.REFUSED, stream, conflict, "REASON_IDENTITY_CONFLICT 1/2 is known with another digest"),
        (Kind.ACCEPTED, stream, forked, ""),
        (Kind.REJECTED, stream, chained_to_nobody, UNKNOWN_TENANT),
    )
    assert still(readmit(centre.settings(), Choice(), dry_run=False)) == ["REASON_CHAIN_BROKEN"]
    assert [seq for seq, _ in centre.accepted()] == [3]


def test_only_what_was_chosen_is_let_in(centre: Centre) -> None:
    acme, globex = stream_of(centre), stream_of(centre, tenant="globex")
    skewed = stream_of(centre)
    centre.keep(
        (Kind.REJECTED, acme, acme.next(), UNKNOWN_TENANT),
        (Kind.REJECTED, globex, globex.next(), "REASON_UNKNOWN_TENANT tenant globex"),
        (Kind.REJECTED, skewed, skewed.next(), "REASON_CLOCK_SKEW ends 900 s in the future"),
    )
    settings = centre.settings()

    def chosen(**choice: object) -> list[str]:
        return [o.agent_id for o in readmit(settings, Choice(**choice), dry_run=True)]  # type: ignore[arg-type]

    assert chosen(tenant="globex") == [globex.agent_id]
    assert chosen(agent_id=acme.agent_id) == [acme.agent_id]
    assert chosen(reasons=["REASON_CLOCK_SKEW"]) == [skewed.agent_id]
    assert chosen() == [acme.agent_id, globex.agent_id, skewed.agent_id]


def test_a_readmitted_batch_changes_nothing_of_what_the_collector_remembers_of_its_stream(
    centre: Centre,
) -> None:
    stream = stream_of(centre)
    first, second, fourth = stream.next(), stream.next(), (stream.next(), stream.next())[1]
    centre.keep(
        (Kind.REJECTED, stream, first, UNKNOWN_TENANT),
        (Kind.ACCEPTED, stream, second, ""),
        (Kind.REJECTED, stream, fourth, UNKNOWN_TENANT),
    )

    def remembered() -> tuple[int, bytes, bytes, dict[int, bytes]]:
        streams, checkpoint = Streams(), Checkpoint(centre.directory / "other.db")
        nobody = Admission(Plans(AdmissionSettings(), {}).of)
        load(streams, nobody, checkpoint, centre.directory / "log", 0, 1 << 62)
        checkpoint.close()
        state = streams.get(stream.agent_id, 1)
        assert state is not None
        return state.watermark, state.last_digest, state.ring, state.ahead

    before = remembered()
    assert len(readmit(centre.settings(), Choice(), dry_run=False)) == 2
    assert remembered() == before
    assert before[0] == 2


def test_readmit_refuses_while_a_collector_holds_the_log_and_a_dry_run_does_not(centre: Centre) -> None:
    stream = stream_of(centre)
    centre.keep((Kind.REJECTED, stream, stream.next(), UNKNOWN_TENANT))
    running = DurableLog(centre.directory / "log", SEGMENT, FREE)
    with pytest.raises(LogError, match="stop it first"):
        readmit(centre.settings(), Choice(), dry_run=False)
    assert still(readmit(centre.settings(), Choice(), dry_run=True)) == [""]
    running.close()


def test_verify_names_what_is_missing_twice_or_unfinished(centre: Centre) -> None:
    stream = stream_of(centre)
    first, _, third, fourth = (stream.next() for _ in range(4))
    centre.keep(*((Kind.ACCEPTED, stream, item, "") for item in (first, third, third)))
    log = centre.directory / "log"
    whole = (log / FIRST).stat().st_size
    centre.keep((Kind.ACCEPTED, stream, fourth, ""))
    data = (log / FIRST).read_bytes()
    (log / FIRST).write_bytes(data[: whole + 400])
    verdict = verify(log)
    name = f"{stream.agent_id}/1"
    assert (verdict.missing, verdict.duplicates) == ([f"{name}/2"], [f"{name}/3"])
    assert 0 < verdict.unfinished_bytes < 400
    assert verdict.damaged == []


def test_the_commands_as_a_person_types_them(centre: Centre, capsys: pytest.CaptureFixture[str]) -> None:
    import collector.cli

    stream = stream_of(centre)
    centre.keep((Kind.REJECTED, stream, stream.next(), UNKNOWN_TENANT))
    file = centre.directory / "collector.yaml"
    file.write_text(json.dumps({"state_dir": str(centre.directory), "log": {"min_free": "1KiB"}}))

    def run(*words: str) -> tuple[int, str]:
        args = collector.cli._parser().parse_args(["--config", str(file), "log", *words])
        return args.handler(args), capsys.readouterr().out

    assert run("readmit", "--reason", "clock_skew") == (0, "nothing to readmit\n")
    code, out = run("readmit", "--dry-run")
    assert (code, "would be let in" in out) == (0, True)
    code, out = run("readmit", "--json", "--tenant", "acme")
    assert (code, json.loads(out)["seq"]) == (0, 1)
    code, out = run("verify")
    assert code == 0
    assert "1 readmitted" in out
    code, out = run("cat")
    assert "READMITTED" in out
    (act,) = [line for line in audit_lines(centre.directory / "audit.log") if isinstance(line, Line)]
    assert (act.entry["act"], act.entry["batches"], act.entry["tenants"]) == ("usage_readmitted", 1, ["acme"])
    segment = centre.directory / "log" / FIRST
    spoiled = bytearray(segment.read_bytes())
    spoiled[200] ^= 0xFF
    segment.write_bytes(spoiled)
    assert run("repair")[0] == 0
    assert [line.entry["act"] for line in audit_lines(centre.directory / "audit.log")][1:] == ["log_repaired"]
