"""`weighbridge-collector log cat | verify | repair | readmit`. The reading ones read a log that is being written, too."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from collector.audit import Audit
from collector.config import SETTING_REASONS, Settings
from collector.errors import CollectorError
from collector.handoff.log import HANDED_ON, Damage, Kind, Record, repair, scan, segments, unfinished_bytes
from collector.handoff.park_notes import read_note
from collector.timestamps import iso
from wire.containers import table_of
from wire.daemon.command_line import act_as_owner
from wire.identity import AgentId
from wire.limits import WINDOW
from wire.measures import MEASURES
from wire.v1 import usage_pb2 as pb

TABLE_COLUMNS = ("cgroup_id", "cgroup_path", "kind", "runtime", "container_id", "pod_uid", "name")

_NAMED_FIELD = re.compile(r"([a-z_]+): ")
_FIELD_OF_REASON = {
    "REASON_UNKNOWN_SCHEMA_VERSION": "schema_version",
    "REASON_FOREIGN_AGENT": "agent_id",
    "REASON_UNKNOWN_TENANT": "tenant",
    "REASON_TENANT_NOT_PERMITTED": "tenant",
    "REASON_CLOCK_SKEW": "interval_end_unix_ns",
    "REASON_CHAIN_BROKEN": "previous_digest",
}

SettingsOf = Callable[[argparse.Namespace], Settings]


class LogVerdict(msgspec.Struct):
    """What `log verify` found. `sound` sums it up."""

    batches: int = 0
    rows: int = 0
    rejected: int = 0
    readmitted: int = 0
    """Of the batches: rejected first, let in later by a person."""
    refused: int = 0
    streams: int = 0
    adopted: int = 0
    """Streams that went on beyond what this log has; what came before was answered elsewhere."""
    parked: int = 0
    """Batches that wait in their tenants' queues at the end of the log."""
    released: int = 0
    duplicates: list[str] = []
    missing: list[str] = []
    chain_breaks: list[str] = []
    wrong_releases: list[str] = []
    """Released without being parked, twice, with other bytes, or out of turn."""
    damaged: list[str] = []
    begins_at: int = 0
    """Offset of its first byte; what was before has been pruned."""
    perhaps_pruned: list[str] = []
    """Of a pruned log: missing, but so close to its beginning that they may have come in before it."""
    unfinished_bytes: int = 0
    """At the end, nobody was told of: being written now, or torn by a crash and cut off by the next start."""

    @property
    def sound(self) -> bool:
        return not (
            self.duplicates or self.missing or self.chain_breaks or self.wrong_releases or self.damaged
        )


def add_commands(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], settings_of: SettingsOf
) -> None:
    """Add the commands; `settings_of` reads the settings that the parsed arguments name."""

    def log_of(args: argparse.Namespace) -> Path:
        return _existing(settings_of(args).log_directory)

    log = subparsers.add_parser("log", help="the durable local log").add_subparsers(required=True)

    cat = log.add_parser("cat", help="every batch that was handed on, oldest first")
    cat.add_argument("--json", action="store_true", help="one object a line")
    cat.add_argument("--rows", action="store_true", help="with --json: the usage rows of each batch too")
    other = cat.add_mutually_exclusive_group()
    other.add_argument(
        "--rejected", action="store_true", help="only what was rejected or refused, with the reason"
    )
    other.add_argument("--parked", action="store_true", help="only what was parked, released since or not")
    cat.add_argument("--tenant", help="only this tenant's")
    cat.set_defaults(handler=lambda args: _cat(args, log_of(args)))

    verify_ = log.add_parser("verify", help="digests, duplicates, holes and chains of all streams")
    verify_.add_argument("--json", action="store_true")
    verify_.set_defaults(handler=lambda args: _verify(args, log_of(args)))

    mend = log.add_parser("repair", help="replace damaged places by fillers (the collector must be stopped)")
    mend.set_defaults(handler=lambda args: _repair(log_of(args), Audit(settings_of(args).audit_file)))

    again = log.add_parser(
        "readmit",
        help="let in what was rejected because of a setting that is right now (the collector must be stopped)",
    )
    again.add_argument(
        "--reason",
        action="append",
        choices=[reason.removeprefix("REASON_").lower() for reason in SETTING_REASONS],
        help="only what was rejected for this; repeatable",
    )
    again.add_argument("--tenant", help="only this tenant's")
    again.add_argument("--agent-id", help="only this agent's")
    again.add_argument(
        "--dry-run", action="store_true", help="only say what would happen; the collector may run"
    )
    again.add_argument("--json", action="store_true", help="one object a line")
    again.set_defaults(handler=lambda args: _readmit(args, settings_of(args)))


def verify(directory: Path) -> LogVerdict:
    """Read the whole log and say what is wrong with it."""
    verdict = LogVerdict()
    verdict.unfinished_bytes = unfinished_bytes(directory)
    streams: dict[tuple[str, int], _StreamCheck] = {}
    first_offset: int | None = None
    queues = _QueueCheck()
    for record in scan(directory):
        if first_offset is None:
            first_offset = record.offset
        if isinstance(record, Damage):
            verdict.damaged.append(record.place)
            continue
        if record.kind is Kind.REFUSED:
            verdict.refused += 1
            continue
        if record.kind is Kind.RELEASED:
            verdict.released += 1
            if not queues.released(record, first_offset):
                verdict.wrong_releases.append(f"{record.agent_id}/{record.epoch}/{record.seq}")
            continue
        if record.kind is Kind.PARKED:
            queues.parked(record)
        key = (record.agent_id, record.epoch)
        stream = streams.setdefault(key, _StreamCheck(record.seq))
        name = f"{record.agent_id}/{record.epoch}/{record.seq}"
        if record.kind is Kind.ADOPTED:
            verdict.adopted += 1
            stream.adopted(record.seq)
            continue
        if record.kind is Kind.ELSEWHERE:
            stream.digests.setdefault(record.seq, (record.note, None))
            continue
        if record.kind is Kind.ACCEPTED and stream.rejected.get(record.seq) == record.digest:
            del stream.rejected[record.seq]
            verdict.rejected -= 1
            verdict.readmitted += 1
        elif record.seq in stream.digests:
            verdict.duplicates.append(name)
            continue
        previous = None
        if record.kind in (Kind.ACCEPTED, Kind.PARKED):
            batch = pb.UsageBatch.FromString(record.body)
            previous = batch.previous_digest
            verdict.batches += 1
            verdict.rows += len(batch.known)
        else:
            verdict.rejected += 1
            stream.rejected[record.seq] = record.digest
        stream.digests[record.seq] = (record.digest, previous)
    verdict.begins_at = next(iter(segments(directory)), 0)
    for (agent_id, epoch), stream in streams.items():
        verdict.streams += 1
        for seq in stream.missing():
            # What came in before the first one that is still there, came in within the window.
            if not verdict.begins_at or seq >= stream.first_seq + WINDOW:
                verdict.missing.append(f"{agent_id}/{epoch}/{seq}")
            elif seq > stream.first_seq:
                verdict.perhaps_pruned.append(f"{agent_id}/{epoch}/{seq}")
        verdict.chain_breaks.extend(f"{agent_id}/{epoch}/{seq}" for seq in stream.chain_breaks())
    verdict.parked = queues.waiting()
    return verdict


class _QueueCheck:
    """The tenants' queues as the log tells them: (offset, identity, digest) in order."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[tuple[int, AgentId, int, int, bytes]]] = {}

    def parked(self, record: Record) -> None:
        entry = (record.offset, record.agent_id, record.epoch, record.seq, record.digest)
        self._queues.setdefault(read_note(record.note).tenant, deque()).append(entry)

    def released(self, record: Record, first_offset: int) -> bool:
        """Whether this is the batch whose turn it was, byte for byte, as far as the log goes back."""
        note = read_note(record.note)
        if note.parked_at < first_offset:
            return True
        wanted = (note.parked_at, record.agent_id, record.epoch, record.seq, record.digest)
        queue = self._queues.get(note.tenant, deque())
        if wanted not in queue:
            return False
        in_turn = queue[0] == wanted
        while queue.popleft() != wanted:
            pass  # What was passed over is out of turn once, not for ever.
        return in_turn

    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))


class _StreamCheck:
    """One stream's numbers and digests."""

    def __init__(self, first_seq: int) -> None:
        self.first_seq = first_seq
        """Of the first record."""
        self.digests: dict[int, tuple[bytes, bytes | None]] = {}
        self.rejected: dict[int, bytes] = {}
        """Digests of what was rejected and not let in since."""
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
            f" {verdict.rejected} rejected, {verdict.readmitted} readmitted, {verdict.refused} refused,"
            f" {verdict.adopted} taken up midway,"
            f" {verdict.released} released, {verdict.parked} still parked"
        )
        if verdict.begins_at:
            near = verdict.perhaps_pruned
            print(
                f"  pruned: begins at offset {verdict.begins_at}"
                + (f"; perhaps before it: {len(near)}: {', '.join(near[:10])}" if near else "")
            )
        if verdict.unfinished_bytes:
            print(
                f"  {verdict.unfinished_bytes} bytes of an unfinished group at the end; nobody was told of it"
            )
        for title, found in (
            ("delivered twice", verdict.duplicates),
            ("missing", verdict.missing),
            ("chain broken", verdict.chain_breaks),
            ("released wrongly", verdict.wrong_releases),
            ("damaged", verdict.damaged),
        ):
            print(f"  {title:16} {len(found) or 'none'}{': ' + ', '.join(found[:10]) if found else ''}")
    return 0 if verdict.sound else 1


def _cat(args: argparse.Namespace, directory: Path) -> int:
    damaged = False
    shown = HANDED_ON
    if args.rejected or args.parked:
        shown = frozenset((Kind.PARKED,) if args.parked else (Kind.REJECTED, Kind.REFUSED))
    for record in scan(directory):
        if isinstance(record, Damage):
            damaged = True
            print(f"damaged: {record.place}; see `log verify`", file=sys.stderr)
            continue
        if record.kind not in shown:
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
        "received_at": iso(record.received_at_unix_ns),
        "agent_id": record.agent_id,
        "epoch": record.epoch,
        "seq": record.seq,
        "digest": record.digest.hex(),
        "bytes": len(record.body),
    }
    if record.note and record.kind not in (Kind.PARKED, Kind.RELEASED):
        reason, _, detail = record.note.decode(errors="replace").partition(" ")
        out |= {"reason": reason, "field": field_of(reason, detail), "detail": detail}
    try:
        batch = pb.UsageBatch.FromString(record.body)
    except DecodeError:
        return out
    out |= {
        "tenant": batch.tenant,
        "host": batch.host,
        "boot_id": batch.boot_id,
        "interval_start": iso(batch.interval_start_unix_ns),
        "interval_end": iso(batch.interval_end_unix_ns),
        "interval_duration_ns": batch.interval_duration_ns,
        "flags": batch.flags,
        "coverage": batch.coverage,
        "rows": len(batch.known),
        "cpu_usage_ns": sum(batch.cpu_usage_ns),
        "gaps": [
            {
                "start": iso(gap.start_unix_ns),
                "end": iso(gap.end_unix_ns),
                "reason": gap.reason,
                "count": gap.count,
                "detail": gap.detail,
            }
            for gap in batch.gaps
        ],
    }
    if with_rows and record.kind not in (Kind.REJECTED, Kind.REFUSED):
        table = table_of(batch)
        out["usage"] = [_row(batch, table, row) for row in range(len(batch.known))]
    return out


def field_of(reason: str, detail: str) -> str:
    """The field of the batch that was found wrong; empty where it is no single one."""
    named = _NAMED_FIELD.match(detail)
    return named[1] if named else _FIELD_OF_REASON.get(reason, "")


def _row(batch: pb.UsageBatch, table: pb.ContainerTable, row: int) -> dict[str, Any]:
    out: dict[str, Any] = {name: column[row] for name in TABLE_COLUMNS if (column := getattr(table, name))}
    out["row_flags"] = batch.row_flags[row] if batch.row_flags else 0
    known = batch.known[row]
    for bit, name in enumerate(MEASURES):
        column = getattr(batch, name)
        out[name] = (column[row] if column else 0) if known >> bit & 1 else None
    return out


def _repair(directory: Path, audit: Audit) -> int:
    _as_owner(directory)
    done = repair(directory)
    if done:
        audit("log_repaired", done=done[:16], segments=len(done))
    for line in done or ["nothing to repair"]:
        print(line)
    return 0


def _readmit(args: argparse.Namespace, settings: Settings) -> int:
    from collector import readmission

    directory = _existing(settings.log_directory)
    if not args.dry_run:
        _as_owner(directory)
    reasons = [f"REASON_{name.upper()}" for name in args.reason or ()] or SETTING_REASONS
    choice = readmission.Choice(reasons, args.tenant, args.agent_id)
    outcomes = readmission.readmit(settings, choice, args.dry_run, Audit(settings.audit_file))
    for outcome in outcomes:
        if args.json:
            print(json.dumps(msgspec.to_builtins(outcome)))
        else:
            done = "would be let in" if args.dry_run else "let in"
            print(
                f"{outcome.agent_id} {outcome.epoch}/{outcome.seq}  {outcome.tenant}  {outcome.rows} rows"
                f"  {outcome.cpu_usage_ns / 1e9:.3f} CPU seconds  {outcome.reason}:"
                f" {f'still {outcome.still}' if outcome.still else done}"
            )
    if not outcomes and not args.json:
        print("nothing to readmit")
    return 1 if any(outcome.still for outcome in outcomes) else 0


def _as_owner(directory: Path) -> None:
    """Files that another user makes here could not be opened by the collector afterwards."""
    act_as_owner(directory)
    owner = directory.stat().st_uid
    if os.geteuid() != owner:
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f"#{owner}"
        raise CollectorError(
            f"{directory} belongs to {name}: run this as that user (runuser -u {name} -- ...)"
        )


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        raise CollectorError(f"no log at {directory}: name the collector's settings with --config")
    return directory
