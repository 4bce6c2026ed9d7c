"""The worked example of docs/completeness.md, computed anew; and the page's words against the code's."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import msgspec

from ledger.periods.bill import bill_lines
from ledger.periods.blockers import Waiver, blockers, open_and_waived
from ledger.periods.calendar import following, parse
from ledger.periods.manifest import Manifest
from ledger.periods.streams import Held, HeldKind, Stream
from ledger.periods.unknown import Kind
from ledger.periods.watermark import watermark
from tests.ledger.closes import Batch, close
from tests.ledger.histories import runs
from tests.test_docs import ROOT, tables

PAGE = ROOT / "docs/completeness.md"
INTERVAL_NS = 600 * 10**9
BATCH_CPU_USAGE_NS = 60 * 10**9
TENANTS = {"web": "acme", "db": "acme", "job": "globex"}
DAY = parse("2026-11-21", "day")


def unix_ns(day_and_time: str) -> int:
    moment = datetime.strptime(f"2026-11-{day_and_time}", "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
    return int(moment.timestamp()) * 10**9


def clock(at_unix_ns: int | None) -> str:
    assert at_unix_ns is not None
    return datetime.fromtimestamp(at_unix_ns // 10**9, UTC).strftime("%d %H:%M")


def batches(agent: str, epoch: int, first: int, last: int, start: int) -> list[Batch]:
    return [
        Batch(
            agent,
            epoch,
            seq,
            TENANTS[agent],
            start + n * INTERVAL_NS,
            start + (n + 1) * INTERVAL_NS,
            BATCH_CPU_USAGE_NS,
        )
        for n, seq in enumerate(range(first, last + 1))
    ]


def streams(booked: list[Batch]) -> list[Stream]:
    names = sorted({(b.agent_id, b.epoch) for b in booked})
    return [
        Stream(*name, tuple(runs((b.seq, *b[4:6]) for b in sorted(booked) if b[:2] == name)))
        for name in names
    ]


def test_the_worked_example_is_what_the_ledger_computes() -> None:
    known, blocking, marks, closed, lines = tables(PAGE, "A worked example")
    booked: list[Batch] = []
    for agent, epoch, seqs, start, end in known[1:]:
        first, last = (int(seq) for seq in seqs.split("–"))
        booked += batches(agent, int(epoch), first, last, unix_ns(start))
        assert booked[-1].end_unix_ns == unix_ns(end)
    rejected = batches("job", 1, 9, 9, unix_ns("21 23:20"))
    held = [
        Held(
            HeldKind.REJECTED,
            b.agent_id,
            b.epoch,
            b.seq,
            b.tenant,
            b.start_unix_ns,
            b.end_unix_ns,
            "REASON_TENANT",
        )
        for b in rejected
    ]
    found = blockers(DAY, streams(booked), held, {})
    assert blocking[1:] == [
        [
            *(b.id, str(b.kind), b.agent_id, str(b.epoch), str(b.first_seq) if b.first_seq else "–"),
            *(clock(b.start_unix_ns), clock(b.end_unix_ns)),
        ]
        for b in found
    ]
    all_marks = watermark(streams(booked), held, {})
    assert marks[1:] == [
        *([agent, clock(at)] for agent, at in all_marks.agents.items()),
        ["the ledger", clock(all_marks.overall)],
    ]

    booked += [*rejected, *batches("db", 2, 5, 9, unix_ns("21 23:20"))]
    assert booked[-1].end_unix_ns == unix_ns("22 00:10")
    (hole,) = [b for b in found if b.kind is Kind.MISSING]
    still, waived = open_and_waived(
        DAY,
        blockers(DAY, streams(booked), [], {}),
        [Waiver(DAY.name, hole.id, "not found on the host", "ops")],
    )
    assert still == []
    first = msgspec.structs.replace(close(DAY, [], [], booked), waived=tuple(waived))
    assert closed[1:] == [
        [first.period, account.tenant, str(account.batches), str(account.sums["cpu_usage_ns"])]
        for account in first.accounts
    ]

    booked += batches("web", 1, 7, 7, unix_ns("21 23:00"))
    second = close(following(DAY), [DAY], [first.canonical()], booked)
    assert lines[1:] == [[line["line_id"], line["value"]] for line in bill_lines(second)]
    assert f"`{first.digest().hex()}`" in PAGE.read_text()
    assert second.previous_digest == first.digest()


def test_every_kind_of_blocker_and_every_field_of_a_manifest_is_on_the_page() -> None:
    (kinds,) = tables(PAGE, "Blockers")
    assert sorted(row[0] for row in kinds[1:]) == sorted(Kind)
    (fields,) = tables(PAGE, "Manifests")
    documented = {name for row in fields[1:] for name in re.findall(r"\w+", row[0])}
    assert documented == {field.name for field in msgspec.structs.fields(Manifest)}
