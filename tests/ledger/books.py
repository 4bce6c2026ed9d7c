"""What is booked, by hand: batches in a list, and the facts that the ledger's queries would make of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ledger.recover.facts import RECOVERABLE, Beginning, Booked, Opening
from wire.containers import table_of
from wire.measures import BIT
from wire.v1 import usage_pb2 as pb


class Facts(NamedTuple):
    openings: list[Opening]
    booked: list[Booked]
    beginnings: list[Beginning]


def facts(batches: Iterable[pb.UsageBatch]) -> Facts:
    """In the order of the queries."""
    booked = sorted(batches, key=lambda b: (b.agent_id, b.epoch, b.seq))
    changes = _changes(booked)
    return Facts(
        [opening for batch in booked for opening in _openings(batch, changes)],
        _sums(booked, changes),
        _beginnings(booked, changes),
    )


def amount(batch: pb.UsageBatch, name: str, row: int) -> int:
    column = getattr(batch, name)
    return column[row] if column else 0


def _changes(batches: list[pb.UsageBatch]) -> dict[tuple[str, int], set[int]]:
    """(agent, epoch) -> starts of the intervals in which an incarnation opened that had rows before, and the host with it."""
    first: dict[tuple[str, int, str, int], int] = {}
    out: dict[tuple[str, int], set[int]] = defaultdict(set)
    for batch in batches:
        start, cgroup_ids = batch.interval_start_unix_ns, table_of(batch).cgroup_id
        for cgroup_id in cgroup_ids:
            first.setdefault((batch.agent_id, batch.epoch, batch.boot_id, cgroup_id), start)
        for opening in batch.openings:
            cgroup_id = cgroup_ids[opening.row]
            if first[batch.agent_id, batch.epoch, batch.boot_id, cgroup_id] < start:
                out[batch.agent_id, batch.epoch].add(start)
    for batch in batches:
        cgroup_ids = table_of(batch).cgroup_id
        opening = {cgroup_ids[o.row] for o in batch.openings}
        if 1 in cgroup_ids and 1 not in opening:
            out[batch.agent_id, batch.epoch].discard(batch.interval_start_unix_ns)
    return out


def _span(batch: pb.UsageBatch, changes: dict[tuple[str, int], set[int]]) -> int:
    starts = changes.get((batch.agent_id, batch.epoch), ())
    return max((start for start in starts if start <= batch.interval_start_unix_ns), default=0)


def _openings(batch: pb.UsageBatch, changes: dict[tuple[str, int], set[int]]) -> Iterator[Opening]:
    table = table_of(batch)
    for opening in batch.openings:
        yield Opening(
            batch.agent_id,
            batch.epoch,
            _span(batch, changes),
            batch.interval_start_unix_ns,
            batch.tenant,
            batch.boot_id,
            table.cgroup_id[opening.row],
            table.cgroup_path[opening.row],
            table.kind[opening.row],
            opening.known,
            tuple(getattr(opening, name) for name in RECOVERABLE),
        )


def _sums(batches: list[pb.UsageBatch], changes: dict[tuple[str, int], set[int]]) -> list[Booked]:
    out: dict[tuple[object, ...], Booked] = {}
    for batch in batches:
        table = table_of(batch)
        for row, cgroup_id in enumerate(table.cgroup_id):
            key = (batch.agent_id, batch.epoch, _span(batch, changes), batch.boot_id, cgroup_id)
            values = tuple(amount(batch, name, row) for name in RECOVERABLE)
            found = out.get(key)
            out[key] = Booked(
                *key,  # type: ignore[arg-type]
                table.cgroup_path[row],
                table.kind[row],
                found.first_start_ns if found else batch.interval_start_unix_ns,
                batch.interval_end_unix_ns,
                bool(batch.row_flags[row] & pb.ROW_FLAG_COUNTER_RESET) or bool(found and found.was_reset),
                tuple(a + b for a, b in zip(found.sums, values, strict=True)) if found else values,
            )
    return [out[key] for key in sorted(out, key=str)]


def _beginnings(batches: list[pb.UsageBatch], changes: dict[tuple[str, int], set[int]]) -> list[Beginning]:
    intervals: dict[tuple[str, int, int], list[pb.UsageBatch]] = defaultdict(list)
    have = {(b.agent_id, b.epoch, b.seq): b.interval_start_unix_ns for b in batches}
    for batch in batches:
        intervals[batch.agent_id, batch.epoch, batch.interval_start_unix_ns].append(batch)
    out = []
    for (agent_id, epoch, _), of in intervals.items():
        if not any(table_of(b).cgroup_id[o.row] == 1 for b in of for o in b.openings):
            continue
        first, last = of[0].seq, of[-1].seq
        all_booked = (
            last - first + 1 == len(of)
            and (first == 1 or (agent_id, epoch, first - 1) in have)
            and (agent_id, epoch, last + 1) in have
        )
        (host,) = [b.host_totals for b in of if b.HasField("host_totals")]
        owed = host.cpu_deficit_ns + host.cpu_usage_ns - sum(sum(b.cpu_usage_ns) for b in of)
        out.append(
            Beginning(
                agent_id,
                epoch,
                _span(of[0], changes),
                of[0].boot_id,
                all_booked and all(b.coverage & pb.COVERAGE_WHOLE_HOST for b in of),
                owed if all_booked else None,
                host.cpu_source,
            )
        )
    return out


def total(batches: Iterable[pb.UsageBatch], name: str, cgroup_ids: frozenset[int] | None = None) -> int:
    """Σ of a measure over the rows of some incarnations of one boot, or of all."""
    assert name in BIT
    return sum(
        amount(batch, name, row)
        for batch in batches
        for row, cgroup_id in enumerate(table_of(batch).cgroup_id)
        if cgroup_ids is None or cgroup_id in cgroup_ids
    )
