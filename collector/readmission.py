"""Usage that was rejected because of how this collector was set up, let in once the set-up is right.

A rejected batch is in the log with its bytes, and its identity is used up: the agent never sends it again. Where
the reason was a setting (`config.SETTING_REASONS`), the batch is judged again as it would have been on arrival, by the
settings of today. What passes is appended as accepted, with a note that says how it came in; the rejected
record stays. Doing it twice changes nothing: a batch that has an accepted record is not looked at again.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Collection, Iterator
from typing import NamedTuple

import msgspec

from collector.audit import Witness, unseen
from collector.config import SETTING_REASONS, Settings
from collector.decide.validate import Validator
from collector.door.ca import CertificateAuthority
from collector.handoff.log import (
    Damage,
    DamagedLog,
    DurableLog,
    Kind,
    LogError,
    Record,
    damage_text,
    frame,
    scan,
)
from collector.state.sqlite import CHECKPOINT_FILE, Checkpoint
from wire.daemon.journal import Journal
from wire.identity import AgentId
from wire.statuses import Reason
from wire.v1 import usage_pb2 as pb

NOTE = "READMITTED"
_GROUP_BYTES = 4 << 20

log = Journal("collector.readmission")

_Identity = tuple[AgentId, int, int]
"""(agent_id, epoch, seq)"""


class Choice(NamedTuple):
    """Which rejected batches are meant; None is any."""

    reasons: Collection[str] = SETTING_REASONS
    tenant: str | None = None
    agent_id: str | None = None


class Outcome(msgspec.Struct):
    """What became of one rejected batch."""

    agent_id: AgentId
    epoch: int
    seq: int
    tenant: str
    rows: int
    cpu_usage_ns: int
    reason: str
    """It was rejected for."""
    offset: int
    """Of the rejected record."""
    still: str = ""
    """Why it cannot be let in now; empty if it can."""

    @property
    def identity(self) -> _Identity:
        return self.agent_id, self.epoch, self.seq


def readmit(settings: Settings, choice: Choice, dry_run: bool, witness: Witness = unseen) -> list[Outcome]:
    """Let in what passes now, durably; with `dry_run` only say what would. LogError while a collector runs, but
    not for a dry run.
    """
    if dry_run:
        return _judged(settings, choice)
    with contextlib.ExitStack() as closing:
        # Opened first: it holds the log, so what is judged cannot change before it is written.
        durable_log = _open_log(settings)
        closing.callback(durable_log.close)
        outcomes = _judged(settings, choice)
        admitted = {o.offset: o for o in outcomes if not o.still}
        if admitted:
            told = {
                "batches": len(admitted),
                "rows": sum(o.rows for o in admitted.values()),
                "cpu_usage_ns": sum(o.cpu_usage_ns for o in admitted.values()),
                "tenants": sorted({o.tenant for o in admitted.values()})[:64],
            }
            witness("usage_readmitted", **told)
            _append(settings, durable_log, admitted)
            log.info("usage_readmitted", **told, uid=os.getuid())
    return outcomes


def _judged(settings: Settings, choice: Choice) -> list[Outcome]:
    """What the choice means, in the order of the log; `still` says what today's settings say."""
    judge = _Judge(settings)
    found: dict[_Identity, tuple[Outcome, bytes]] = {}
    for record in _records(settings):
        identity = (record.agent_id, record.epoch, record.seq)
        if record.kind is Kind.ACCEPTED:
            found.pop(identity, None)
        elif record.kind is Kind.REJECTED and _meant(record, choice):
            outcome, previous_digest = judge.outcome(record)
            if choice.tenant in (None, outcome.tenant):
                found[identity] = outcome, previous_digest
    if found:
        # A batch that was rejected for its header was never held against the one before it.
        for record in _records(settings):
            following = found.get((record.agent_id, record.epoch, record.seq + 1))
            if following is None or record.kind not in (Kind.ACCEPTED, Kind.REJECTED, Kind.PARKED):
                continue
            outcome, previous_digest = following
            if record.digest != previous_digest and not outcome.still:
                outcome.still = "REASON_CHAIN_BROKEN previous_digest is another batch's"
    return [outcome for outcome, _ in found.values()]


def _meant(record: Record, choice: Choice) -> bool:
    reason = record.note.partition(b" ")[0].decode(errors="replace")
    return reason in choice.reasons and choice.agent_id in (None, record.agent_id)


class _Judge:
    """Judges rejected records by the settings of today, at the time of their arrival."""

    def __init__(self, settings: Settings) -> None:
        self._validator = Validator(settings.validation.bounds())
        self._registry = None if settings.external_ca else CertificateAuthority(settings.ca_dir).registry

    def outcome(self, record: Record) -> tuple[Outcome, bytes]:
        """Also the digest that the batch names as the one before it."""
        batch = pb.UsageBatch.FromString(record.body)
        outcome = Outcome(
            record.agent_id,
            record.epoch,
            record.seq,
            batch.tenant,
            len(batch.known),
            sum(batch.cpu_usage_ns),
            record.note.partition(b" ")[0].decode(),
            record.offset,
        )
        permitted = None
        if self._registry is not None:
            agent = self._registry.agent(record.agent_id)
            permitted = agent.tenants if agent else frozenset()
        checked = self._validator.check(
            record.body, record.agent_id, record.epoch, record.seq, permitted, record.received_at_unix_ns
        )
        if checked.refusal is not None:
            outcome.still = f"{Reason.Name(checked.refusal.reason)} {checked.refusal.detail}"
        return outcome, batch.previous_digest


def _append(settings: Settings, durable_log: DurableLog, admitted: dict[int, Outcome]) -> None:
    """Copy the records at these offsets to the end of the log as accepted ones."""
    frames: list[bytes] = []
    for record in _records(settings, min(admitted), durable_log.end):
        outcome = admitted.get(record.offset)
        if outcome is None:
            continue
        note = f"{NOTE} {outcome.reason} at log offset {record.offset}, by uid {os.getuid()}"
        frames.extend(
            frame(
                Kind.ACCEPTED,
                time.time_ns(),
                uuid.UUID(record.agent_id).bytes,
                record.epoch,
                record.seq,
                record.digest,
                note.encode(),
                record.body,
            )
        )
        if sum(map(len, frames)) >= _GROUP_BYTES:
            _make_durable(durable_log, frames)
            frames = []
    _make_durable(durable_log, frames)


def _make_durable(durable_log: DurableLog, frames: list[bytes]) -> None:
    if durable_log.append_and_wait(frames) is None:
        raise LogError(f"{durable_log.trouble}; free the disk and do it again: what is in already stays once")


def _records(settings: Settings, start: int = 0, end: int | None = None) -> Iterator[Record]:
    for record in scan(settings.log_directory, start, end):
        if isinstance(record, Damage):
            raise DamagedLog(damage_text(settings.log_directory / record.segment, record.offset))
        yield record


def _open_log(settings: Settings) -> DurableLog:
    checkpoint = Checkpoint(settings.state_dir / CHECKPOINT_FILE)
    try:
        synced_end = checkpoint.log_end()
    finally:
        checkpoint.close()
    return DurableLog(settings.log_directory, settings.log.segment_size, settings.log.min_free, synced_end)
