"""Batches to make, a collector's log to put them into, a ledger that reads it, and a store that fails at will."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from collector.handoff.log import DurableLog
from collector.handoff.log import Kind as Written
from ledger.book.rows import COLUMNS, encode, read
from ledger.config import Periods, Rollup, Settings, Source
from ledger.config import Store as StoreSettings
from ledger.consume.arrival import Arrival, Kind
from ledger.ledger import Ledger
from ledger.store.client import Store, StoreTrouble
from wire.daemon.settings import Seconds
from wire.identity import AgentId, digest
from wire.log import frame
from wire.measures import BIT
from wire.v1 import usage_pb2 as pb

SECOND = 10**9
HOUR = 3_600 * SECOND
DAY = 24 * HOUR
T0 = 20_000 * DAY
"""A midnight in October 2024."""
BOOT = "0b6fb5f0-7a3f-4b54-9c15-2f6f6f5a4c11"


def agent(number: int) -> AgentId:
    return AgentId(str(uuid.UUID(int=(0xA << 124) + number)))


def batch(
    agent_id: str,
    seq: int,
    start: int,
    end: int,
    values: Sequence[dict[str, int]] = ({"cpu_usage_ns": 7},),
    *,
    tenant: str = "acme",
    epoch: int = 1,
    previous: bytes = b"",
    totals: tuple[int, int] | None = None,
) -> pb.UsageBatch:
    """One row for each of `values` (measure -> value; those are known), of cgroup 1, 2, … `totals`: usage, deficit."""
    out = pb.UsageBatch(
        schema_version=1,
        agent_id=agent_id,
        epoch=epoch,
        seq=seq,
        previous_digest=previous or (bytes(32) if seq > 1 else b""),
        tenant=tenant,
        interval_start_unix_ns=start,
        interval_end_unix_ns=end,
        interval_duration_ns=end - start,
        boot_id=BOOT,
        host="host",
        cpus=4,
    )
    for number, row in enumerate(values, 1):
        out.containers.cgroup_id.append(number)
        out.containers.cgroup_path.append(f"/c{number}")
        out.containers.kind.append(1)
        out.known.append(sum(1 << BIT[name] for name in row))
    for name in sorted({name for row in values for name in row}):
        getattr(out, name).extend(row.get(name, 0) for row in values)
    if totals is not None:
        out.host_totals.cpu_usage_ns, out.host_totals.cpu_deficit_ns = totals
    return out


def arrival(what: pb.UsageBatch, kind: Kind = Kind.BOOKABLE, reason: str = "") -> Arrival:
    body = what.SerializeToString()
    return Arrival(kind, 5, AgentId(what.agent_id), what.epoch, what.seq, digest(body), reason, body)


def insert(store: Store, *batches: pb.UsageBatch) -> None:
    """Into the table, past the ledger."""
    store.insert_binary("batches", COLUMNS, b"".join(encode(a, read(a)) for a in map(arrival, batches)))


class Chain:
    """One stream: batches in order, each with the digest of the one before it."""

    def __init__(self, agent_id: str, epoch: int = 1) -> None:
        self.agent_id, self.epoch = agent_id, epoch
        self.seq, self.previous = 0, b""

    def next(self, start: int, end: int, *args: Any, **more: Any) -> pb.UsageBatch:
        self.seq += 1
        made = batch(
            self.agent_id, self.seq, start, end, *args, epoch=self.epoch, previous=self.previous, **more
        )
        self.previous = digest(made.SerializeToString())
        return made


class Place:
    """A log and a ledger. `open` and `reopen` give a ledger that knows nothing but the tables."""

    def __init__(self, state: Path, database: str, log: Path) -> None:
        self._log = DurableLog(log, 1 << 20, 0)
        self._sealed = False
        self.settings = Settings(
            state_dir=state,
            source=Source(log_directory=log),
            store=StoreSettings(database=database),
            rollup=Rollup(settle=Seconds(0)),
            periods=Periods(length="day"),
        )
        self._ledger: Ledger | None = None

    def write(self, *batches: pb.UsageBatch, kind: Written = Written.ACCEPTED, note: bytes = b"") -> None:
        """As a collector does, and made durable and provable."""
        frames: list[bytes] = []
        for one in batches:
            body = one.SerializeToString()
            who = uuid.UUID(one.agent_id).bytes
            frames += frame(kind, 5, who, one.epoch, one.seq, digest(body), note, body)
        assert self._log.append_and_wait(frames) is not None

    def seal(self) -> None:
        """Nothing more is written: what is there is proven by the log's last mark."""
        if not self._sealed:
            self._sealed = True
            self._log.close()

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(self.settings)
        return self._ledger

    @property
    def store(self) -> Store:
        return self.ledger._store

    def forget(self) -> Ledger:
        """A ledger anew, as after a kill: what was in hand is gone."""
        if self._ledger is not None:
            self._ledger._source.close()
            self._ledger._store.close()
            self._ledger = None
        return self.ledger

    def book(self) -> None:
        """All that is in the log."""
        while self.ledger.consume(0):
            pass
        while self.ledger._source.lag():
            self.ledger.consume(0.05)
        self.ledger._intake.finish()
        assert not self.ledger.trouble

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger._source.close()
            self._ledger._store.close()
        self.seal()


@contextlib.contextmanager
def failing(store: Store, at: int, *, done: bool = False) -> Iterator[list[int]]:
    """The store's `at`-th statement and all behind it fail; with `done`, that one is done all the same, as when the answer
    gets lost. Gives the number of statements so far."""
    count = [0]
    real = {name: getattr(store, name) for name in ("query", "command", "insert", "insert_binary")}

    def guarded(name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if name == "insert" and not args[2]:
                return None
            count[0] += 1
            if count[0] >= at:
                if done and count[0] == at:
                    real[name](*args, **more)
                raise StoreTrouble(f"statement {at} fails")
            return real[name](*args, **more)

        return call

    try:
        for name in real:
            setattr(store, name, guarded(name))
        yield count
    finally:
        for name in real:
            delattr(store, name)
