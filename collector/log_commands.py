"""`weighbridge-collector log cat | verify | repair`. They read a log that is being written, too."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from collector.errors import CollectorError
from collector.handoff.log import Damage, Kind, Record, repair, scan
from wire.measures import MEASURES
from wire.v1 import usage_pb2 as pb

TABLE_COLUMNS = ("cgroup_id", "cgroup_path", "kind", "runtime", "container_id", "pod_uid", "name")

LogOf = Callable[[argparse.Namespace], Path]


class LogVerdict(msgspec.Struct):
    """What `log verify` found. `sound` sums it up."""

    batches: int = 0
    rows: int = 0
    rejected: int = 0
    refused: int = 0
    streams: int = 0
    adopted: int = 0
    """Streams that went on beyond what this log has; what came before was answered elsewhere."""
    duplicates: list[str] = []
    missing: list[str] = []
    chain_breaks: list[str] = []
    damaged: list[str] = []

    @property
    def sound(self) -> bool:
        return not (self.duplicates or self.missing or self.chain_breaks or self.damaged)


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], log_of: LogOf) -> None:
    """Add the commands; `log_of` finds the log's directory of the parsed arguments."""
    log = subparsers.add_parser("log", help="the durable local log").add_subparsers(required=True)

    cat = log.add_parser("cat", help="every batch, oldest first")
    cat.add_argument("--json", action="store_true", help="one object a line")
    cat.add_argument("--rows", action="store_true", help="with --json: the usage rows of each batch too")
    cat.add_argument(
        "--rejected", action="store_true", help="only what was rejected or refused, with the reason"
    )
    cat.add_argument("--tenant", help="only this tenant's")
    cat.set_defaults(handler=lambda args: _cat(args, log_of(args)))

    verify_ = log.add_parser("verify", help="digests, duplicates, holes and chains of all streams")
    verify_.add_argument("--json", action="store_true")
    verify_.set_defaults(handler=lambda args: _verify(args, log_of(args)))

    mend = log.add_parser("repair", help="replace damaged places by fillers (the collector must be stopped)")
    mend.set_defaults(handler=lambda args: _repair(log_of(args)))


def verify(directory: Path) -> LogVerdict:
    """Read the whole log and say what is wrong with it."""
    verdict = LogVerdict()
    streams: dict[tuple[str, int], _StreamCheck] = {}
    for record in scan(_existing(directory)):
        if isinstance(record, Damage):
            verdict.damaged.append(f"{record.segment} at byte {record.offset}")
            continue
        if record.kind is Kind.REFUSED:
            verdict.refused += 1
            continue
        key = (record.agent_id, record.epoch)
        stream = streams.setdefault(key, _StreamCheck())
        name = f"{record.agent_id}/{record.epoch}/{record.seq}"
        if record.kind is Kind.ADOPTED:
            verdict.adopted += 1
            stream.adopted(record.seq)
            continue
        if record.seq in stream.digests:
            verdict.duplicates.append(name)
            continue
        previous = None
        if record.kind is Kind.ACCEPTED:
            batch = pb.UsageBatch.FromString(record.body)
            previous = batch.previous_digest
            verdict.batches += 1
            verdict.rows += len(batch.containers.cgroup_id)
        else:
            verdict.rejected += 1
        stream.digests[record.seq] = (record.digest, previous)
    for (agent_id, epoch), stream in streams.items():
        verdict.streams += 1
        verdict.missing.extend(f"{agent_id}/{epoch}/{seq}" for seq in stream.missing())
        verdict.chain_breaks.extend(f"{agent_id}/{epoch}/{seq}" for seq in stream.chain_breaks())
    return verdict


class _StreamCheck:
    """One stream's numbers and digests."""

    def __init__(self) -> None:
        self.digests: dict[int, tuple[bytes, bytes | None]] = {}
        self._first = 1
        self._known_up_to: set[int] = set()

    def adopted(self, seq: int) -> None:
        self._known_up_to.update(s for s in range(self._first, seq) if s not in self.digests)
        self._first = max(self._first, seq)

    def missing(self) -> list[int]:
        top = max(self.digests, default=0)
        return [s for s in range(1, top) if s not in self.digests and s not in self._known_up_to]

    def chain_breaks(self) -> list[int]:
        return [
            seq
            for seq, (_, previous) in sorted(self.digests.items())
            if previous and seq - 1 in self.digests and self.digests[seq - 1][0] != previous
        ]


def _verify(args: argparse.Namespace, directory: Path) -> int:
    verdict = verify(directory)
    if args.json:
        print(json.dumps({**msgspec.to_builtins(verdict), "sound": verdict.sound}))
    else:
        print(
            f"{verdict.batches} batches, {verdict.rows} rows of {verdict.streams} streams;"
            f" {verdict.rejected} rejected, {verdict.refused} refused, {verdict.adopted} taken up midway"
        )
        for title, found in (
            ("delivered twice", verdict.duplicates),
            ("missing", verdict.missing),
            ("chain broken", verdict.chain_breaks),
            ("damaged", verdict.damaged),
        ):
            print(f"  {title:16} {len(found) or 'none'}{': ' + ', '.join(found[:10]) if found else ''}")
    return 0 if verdict.sound else 1


def _cat(args: argparse.Namespace, directory: Path) -> int:
    damaged = False
    for record in scan(_existing(directory)):
        if isinstance(record, Damage):
            damaged = True
            print(f"{record.segment} is damaged at byte {record.offset}; see `log verify`", file=sys.stderr)
            continue
        if record.kind is Kind.ADOPTED or args.rejected != (record.kind is not Kind.ACCEPTED):
            continue
        line = describe(record, args.rows)
        if args.tenant and line.get("tenant") != args.tenant:
            continue
        if args.json:
            print(json.dumps(line))
        else:
            print(
                f"{line['received_at']}  {line['kind']:8} {record.agent_id} {record.epoch}/{record.seq}"
                f"  {line.get('tenant', '-')}  {line.get('rows', 0)} rows  {line.get('reason', '')}"
            )
    return 1 if damaged else 0


def describe(record: Record, with_rows: bool) -> dict[str, Any]:
    """One record as plain values for JSON."""
    out: dict[str, Any] = {
        "offset": record.offset,
        "kind": record.kind.name.lower(),
        "received_at": _iso(record.received_at_unix_ns),
        "agent_id": record.agent_id,
        "epoch": record.epoch,
        "seq": record.seq,
        "digest": record.digest.hex(),
        "bytes": len(record.body),
    }
    if record.note:
        reason, _, detail = record.note.decode(errors="replace").partition(" ")
        out |= {"reason": reason, "detail": detail}
    try:
        batch = pb.UsageBatch.FromString(record.body)
    except DecodeError:
        return out
    out |= {
        "tenant": batch.tenant,
        "host": batch.host,
        "boot_id": batch.boot_id,
        "interval_start": _iso(batch.interval_start_unix_ns),
        "interval_end": _iso(batch.interval_end_unix_ns),
        "interval_duration_ns": batch.interval_duration_ns,
        "flags": batch.flags,
        "coverage": batch.coverage,
        "rows": len(batch.containers.cgroup_id),
        "cpu_usage_ns": sum(batch.cpu_usage_ns),
        "gaps": [
            {
                "start": _iso(gap.start_unix_ns),
                "end": _iso(gap.end_unix_ns),
                "reason": gap.reason,
                "count": gap.count,
                "detail": gap.detail,
            }
            for gap in batch.gaps
        ],
    }
    if with_rows and record.kind is Kind.ACCEPTED:
        out["usage"] = [_row(batch, row) for row in range(len(batch.containers.cgroup_id))]
    return out


def _row(batch: pb.UsageBatch, row: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        name: column[row] for name in TABLE_COLUMNS if (column := getattr(batch.containers, name))
    }
    out["row_flags"] = batch.row_flags[row] if batch.row_flags else 0
    known = batch.known[row]
    for bit, name in enumerate(MEASURES):
        column = getattr(batch, name)
        out[name] = (column[row] if column else 0) if known >> bit & 1 else None
    return out


def _repair(directory: Path) -> int:
    done = repair(_existing(directory))
    for line in done or ["nothing to repair"]:
        print(line)
    return 0


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        raise CollectorError(f"no log at {directory}: name the collector's settings with --config")
    return directory


def _iso(unix_ns: int) -> str:
    """ISO 8601 with milliseconds; the number itself where no calendar has it."""
    try:
        return (
            datetime.fromtimestamp(unix_ns / 1e9, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
    except (ValueError, OverflowError, OSError):
        return str(unix_ns)
