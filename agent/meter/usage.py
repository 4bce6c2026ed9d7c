"""Readings -> usage. Pure: previous baseline + snapshot -> usage rows + next baseline.

Strategy. Each unit's kernel counters are subtracted from its last ones (`rows`). Counters of a cgroup
include the units nested in it, so each raw difference is taken off the enclosing unit's (`nesting`); what is left of
the root is the host's own row. What an inner unit was counted for beyond its enclosing one (counters are
read one after another; a v2 root is counted by the timer tick) is carried as a deficit into the next
interval, so that no row is negative and nothing is forgiven.

Invariants, checked by property tests:
  sum of rows == root's difference + change of the deficits       (per additive measure, to the unit)
  sum of an incarnation's rows + opening == its last reading      (a unit without nested units)
  intervals of a stream do not overlap; end > start

Failure model. The caller commits the next baseline together with the batches made of the rows. If it
cannot, it calls `hold`: the rows are kept in the baseline and merged into the next interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from agent.meter.interval import STAND_STILL_NS, Cadence, Interval, interval_between
from agent.meter.model import End, ProbeMark, Reading, Snapshot
from agent.meter.nesting import hand_over, hand_up_carries, subtract_nested
from agent.meter.network import NETWORK_BITS, NETWORK_KNOWN, Gains, NetworkBase, gains
from agent.meter.rows import (
    FOLDED_ID,
    ROOT_ID,
    Row,
    UnitState,
    Usage,
    add,
    at_end,
    born,
    ended,
    first_state,
    raw,
    says_nothing,
)
from agent.meter.watch import covered, losses
from wire.v1 import usage_pb2 as pb

MAX_KEPT_UNSEEN = 50_000
"""Units remembered while a reading is incomplete; beyond, the longest unseen are taken to have ended."""
MAX_GAPS = 64


class Gap(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of wall time in which something could not be measured."""

    start_unix_ns: int
    end_unix_ns: int
    reason: int
    count: int
    detail: str


class Stretch(msgspec.Struct, array_like=True):
    """Rows of one interval of one boot."""

    boot_id: str
    interval: Interval
    usages: list[Usage]
    host_cpu_usage_ns: int
    cpu_deficit_ns: int
    coverage: int = 0
    """Bits of Coverage that depend on the interval: what the kernel probes saw from its start to its end."""


class Baseline(msgspec.Struct):
    """Where metering stands: everything the next step needs. One msgpack blob in the spool."""

    boot_id: str
    boottime_ns: int
    wall_unix_ns: int
    """Wall clock at the last snapshot, as read."""
    end_unix_ns: int
    """End of the last interval, as written into the batches."""
    sources: str
    """Signature of the plan the counters were read by."""
    root: UnitState
    units: dict[int, UnitState]
    held: list[Stretch] = []
    """Rows that could not be committed. The last is merged with the next interval unless the host rebooted."""
    gaps: list[Gap] = []
    complete: bool = True
    """Whether the snapshot held every unit of its moment, so that an unknown one was born since."""
    seen_boottime_ns: int = 0
    """Cgroups born before this instant have been in a snapshot."""
    closed: list[int] = []
    """Units whose last row has been made and whose end the kernel probes still show: it is billed 0 from now on."""
    network: NetworkBase | None = None
    probes: ProbeMark | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows of one interval, and the baseline that must become durable together with them."""

    stretches: list[Stretch]
    """In time's order. The last ends with the snapshot; others are of earlier boots and could not be committed."""
    gaps: list[Gap]
    baseline: Baseline

    @property
    def interval(self) -> Interval:
        return self.stretches[-1].interval

    @property
    def usages(self) -> list[Usage]:
        """Rows of the last stretch."""
        return self.stretches[-1].usages


TenantOf = Callable[[Reading], str]


def begin(snapshot: Snapshot, sources: str, tenant_of: TenantOf, gaps: list[Gap]) -> Baseline:
    """The first baseline of an epoch whose past is unknown: usage counts from this snapshot on."""
    return Baseline(
        boot_id=snapshot.boot_id,
        boottime_ns=snapshot.boottime_ns,
        wall_unix_ns=snapshot.wall_unix_ns,
        end_unix_ns=snapshot.wall_unix_ns,
        sources=sources,
        root=first_state(snapshot.root, tenant_of(snapshot.root), snapshot.boottime_ns),
        units={
            reading.cgroup_id: first_state(reading, tenant_of(reading), snapshot.boottime_ns)
            for reading in (*snapshot.units, *(end.reading for end in snapshot.ends if end.removal_seen))
        },
        gaps=gaps,
        complete=snapshot.complete,
        seen_boottime_ns=snapshot.seen_boottime_ns,
        network=gains(None, snapshot.networks, snapshot.wall_unix_ns).after,
        probes=snapshot.probes,
    )


def reopen(baseline: Baseline) -> Baseline:
    """The baseline for a new epoch whose past is known: every unit writes an opening again. The given one
    stays as it is, for when the new epoch cannot be stored.
    """
    replaced = msgspec.structs.replace
    return replaced(
        baseline,
        root=replaced(baseline.root, opened=False),
        units={cgroup_id: replaced(state, opened=False) for cgroup_id, state in baseline.units.items()},
        held=[
            replaced(stretch, usages=[replaced(u, opens=u.cgroup_id != FOLDED_ID) for u in stretch.usages])
            for stretch in baseline.held
        ],
    )


def follow_clock(baseline: Baseline, snapshot: Snapshot) -> Baseline | None:
    """The baseline for a new epoch, which begins where the wall clock says the last interval ended, if the clock is too
    far behind what was written to be waited for. None if it is not, or while rows wait for a commit: those go first.
    """
    if baseline.held or snapshot.wall_unix_ns >= baseline.end_unix_ns - STAND_STILL_NS:
        return None
    counted_from = baseline.boottime_ns if snapshot.boot_id == baseline.boot_id else 0
    end = max(1, snapshot.wall_unix_ns - (snapshot.boottime_ns - counted_from))
    return msgspec.structs.replace(reopen(baseline), end_unix_ns=end)


def rebase(baseline: Baseline, snapshot: Snapshot, sources: str, tenant_of: TenantOf) -> Baseline:
    """Go on with counters from other sources: `snapshot` was read by the new plan right after a `step` by
    the old one. Carries and memory remainders stay; each unit opens anew, at the new source's counters.
    """
    fresh = begin(snapshot, sources, tenant_of, [])
    for old in (baseline.root, *baseline.units.values()):
        new = fresh.root if old is baseline.root else fresh.units.get(old.reading.cgroup_id)
        hand_over(old, new or fresh.root)
        if new is not None:
            new.memory = old.memory
            new.carry_memory(old.memory_carried_byte_ns())
    return msgspec.structs.replace(
        baseline, sources=sources, root=fresh.root, units=fresh.units, complete=fresh.complete
    )


def observe(
    baseline: Baseline, boottime_ns: int, samples: Mapping[int, tuple[int | None, ...]], cadence: Cadence
) -> None:
    """Extend the memory integrals by samples taken between snapshots.

    `samples`: cgroup id -> (memory_current_bytes, memory_inactive_file_bytes, pids_current). In memory
    only: after a crash the stretch since the last commit is one trapezoid, marked as estimated.
    """
    for cgroup_id, (current, inactive, pids) in samples.items():
        state = baseline.root if cgroup_id == ROOT_ID else baseline.units.get(cgroup_id)
        if state is not None:
            state.memory.add(boottime_ns, current, inactive, pids, cadence.longest_sample_gap_ns)


def step(previous: Baseline, snapshot: Snapshot, tenant_of: TenantOf, cadence: Cadence) -> Outcome:
    """Usage between the previous baseline and this snapshot.

    Units not in the baseline were born since, if its snapshot was complete, and are counted from zero. If it was
    not, they may be old: they are counted from now on, and what they used before stays in the row around
    them, where it was billed. A row's tenant is the one at the start of the interval: a change of owner takes
    effect where the interval is cut, which is here.
    """
    if snapshot.boot_id != previous.boot_id:
        previous = _after_reboot(previous, snapshot)
    interval = interval_between(
        previous.boottime_ns,
        previous.wall_unix_ns,
        previous.end_unix_ns,
        snapshot.boottime_ns,
        snapshot.wall_unix_ns,
        cadence,
    )
    rows, states = _living(previous, snapshot, tenant_of, cadence)
    closed = _add_ends(previous, snapshot, tenant_of, cadence, rows, states)
    _add_unseen(previous, snapshot, rows, states, frozenset(closed))
    traffic = gains(previous.network, snapshot.networks, interval.end_unix_ns)
    if snapshot.networks:
        _add_traffic(traffic, rows)

    subtract_nested(rows, snapshot.nested_oom_kills)
    usages = [row.finish() for row in rows.values()]
    hand_up_carries(rows, states)
    if snapshot.ends:
        removed = {end.reading.cgroup_id for end in snapshot.ends}
        usages = [usage for usage in usages if usage.cgroup_id not in removed or not says_nothing(usage)]

    for cgroup_id, state in states.items():
        if cgroup_id in previous.units or cgroup_id == ROOT_ID:
            state.tenant = tenant_of(state.reading)
    root = states.pop(ROOT_ID)
    baseline = Baseline(
        boot_id=snapshot.boot_id,
        boottime_ns=snapshot.boottime_ns,
        wall_unix_ns=snapshot.wall_unix_ns,
        end_unix_ns=interval.end_unix_ns,
        sources=previous.sources,
        root=root,
        units=states,
        complete=snapshot.complete,
        seen_boottime_ns=snapshot.seen_boottime_ns,
        closed=closed,
        network=traffic.after,
        probes=snapshot.probes,
    )
    lost = losses(previous.probes, [*snapshot.unloaded, *([snapshot.probes] if snapshot.probes else [])])
    stretch = Stretch(
        boot_id=snapshot.boot_id,
        interval=interval,
        usages=usages,
        host_cpu_usage_ns=rows[ROOT_ID].host_cpu_ns,
        cpu_deficit_ns=-sum(s.carry[0] for s in (root, *states.values())),
        coverage=covered(previous.probes, snapshot.probes, lost),
    )
    gaps = [*previous.gaps, *_probe_gaps(lost, traffic.lost, interval)]
    stretches = [*previous.held, stretch]
    if previous.held and previous.held[-1].boot_id == snapshot.boot_id:
        stretches[-2:] = [_merge(previous.held[-1], stretch, cadence)]
    return Outcome(stretches, _few(gaps), baseline)


def _living(
    previous: Baseline, snapshot: Snapshot, tenant_of: TenantOf, cadence: Cadence
) -> tuple[dict[int, Row], dict[int, UnitState]]:
    """Rows and next states of the root and of the units that live."""
    rows: dict[int, Row] = {}
    states: dict[int, UnitState] = {}
    for reading in (*snapshot.units, snapshot.root):
        known_as = previous.root if reading.cgroup_id == ROOT_ID else previous.units.get(reading.cgroup_id)
        if known_as is not None:
            state = known_as
        elif previous.complete:
            state = born(reading, tenant_of(reading), previous.boottime_ns)
        else:
            state = first_state(reading, tenant_of(reading), snapshot.boottime_ns)
        row = raw(state, reading, snapshot.boottime_ns, cadence.longest_sample_gap_ns)
        if known_as is None:
            row.flags |= pb.ROW_FLAG_PARTIAL
        rows[reading.cgroup_id] = row
        states[reading.cgroup_id] = row.next_state
    return rows, states


def _add_ends(
    previous: Baseline,
    snapshot: Snapshot,
    tenant_of: TenantOf,
    cadence: Cadence,
    rows: dict[int, Row],
    states: dict[int, UnitState],
) -> list[int]:
    """Rows of the units that were removed. One that is released leaves the baseline; until whoever recorded the
    end has been told to forget it, its id is among the closed ones, which are returned.
    """
    closed = []
    already = frozenset(previous.closed)
    for end in snapshot.ends:
        reading = end.reading
        cgroup_id = reading.cgroup_id
        state = previous.units.get(cgroup_id)
        if cgroup_id in already or (state is None and not _is_new(previous, end)):
            # Billed as far as it ever will be: its last row was made here, or nobody saw its end come and the
            # rest is in the row around it.
            if end.released:
                closed.append(cgroup_id)
            continue
        if state is None:
            since = max(previous.boottime_ns, end.born_boottime_ns)
            state = born(reading, tenant_of(reading), since)
            state.memory.estimated = True
        row = at_end(state, end, cadence.longest_sample_gap_ns)
        rows[cgroup_id] = row
        if end.released:
            closed.append(cgroup_id)
        else:
            states[cgroup_id] = row.next_state
    return closed


def _is_new(previous: Baseline, end: End) -> bool:
    """Whether a unit the baseline does not know was born after it, so that it counts from zero. If it was not, its
    last row has been made already.
    """
    if not end.removal_seen:
        return False
    if end.born_boottime_ns:
        return end.born_boottime_ns >= (previous.seen_boottime_ns or previous.boottime_ns)
    # Born before the probes were loaded, which was after the last reading.
    return previous.complete and end.load_id > previous.boottime_ns


def _add_unseen(
    previous: Baseline,
    snapshot: Snapshot,
    rows: dict[int, Row],
    states: dict[int, UnitState],
    closed: frozenset[int],
) -> None:
    """Last rows of the units that are in no part of the snapshot."""
    unseen = [
        state
        for cgroup_id, state in previous.units.items()
        if cgroup_id not in states and cgroup_id not in closed
    ]
    if not snapshot.complete:
        # Not seen is not ended when something could not be looked at: what comes back must go on from its
        # last counters, never from zero.
        unseen.sort(key=lambda state: state.memory.boottime_ns)
        kept = unseen[-MAX_KEPT_UNSEEN:]
        states |= {state.reading.cgroup_id: state for state in kept}
        unseen = unseen[:-MAX_KEPT_UNSEEN]
    for state in unseen:
        rows[state.reading.cgroup_id] = ended(state)


def _add_traffic(traffic: Gains, rows: dict[int, Row]) -> None:
    """What lies in no unit is the host's. Own traffic only, so nothing is taken off for nested units."""
    for row in rows.values():
        row.usage.known |= NETWORK_KNOWN
    for unit_id, total in traffic.by_unit.items():
        values = (rows.get(unit_id) or rows[ROOT_ID]).usage.values
        for bit, amount in zip(NETWORK_BITS, total, strict=True):
            values[bit] += amount


def _probe_gaps(lost: dict[str, int], network: NetworkBase | None, interval: Interval) -> list[Gap]:
    start, end = interval.start_unix_ns, interval.end_unix_ns
    gaps = [
        Gap(
            start,
            end,
            pb.GAP_REASON_KERNEL_OVERFLOW,
            count,
            f"{kind}: the kernel side had no room for {count}",
        )
        for kind, count in sorted(lost.items())
    ]
    if network is not None:
        since = min(network.read_unix_ns, end)
        detail = (
            "probes were loaded anew while no agent read the old ones: traffic and ends since are not known"
        )
        gaps.append(Gap(since, end, pb.GAP_REASON_SOURCE_CHANGED, len(network.entries), detail))
    return gaps


def hold(outcome: Outcome, fold_ended: bool) -> Baseline:
    """The baseline to go on with when the rows could not be committed: they wait in it.

    With `fold_ended`, units that ended are added up per tenant (cgroup id 0), so that what waits is
    bounded by the living units and the tenants.
    """
    usages = outcome.usages
    if fold_ended:
        living = [u for u in usages if not u.flags & pb.ROW_FLAG_FINAL and u.cgroup_id != FOLDED_ID]
        folded: dict[str, Usage] = {}
        for usage in usages:
            if usage.cgroup_id == FOLDED_ID or usage.flags & pb.ROW_FLAG_FINAL:
                lump = folded.get(usage.tenant)
                if lump is None:
                    folded[usage.tenant] = msgspec.structs.replace(
                        usage,
                        cgroup_id=FOLDED_ID,
                        path="",
                        devices={},
                        opens=False,
                        counters_before=(),
                        io_before=None,
                        values=list(usage.values),
                    )
                else:
                    add(lump, usage)
                    lump.devices = {}
        usages = [*living, *folded.values()]
    baseline = outcome.baseline
    baseline.held = [*outcome.stretches[:-1], msgspec.structs.replace(outcome.stretches[-1], usages=usages)]
    baseline.gaps = outcome.gaps
    return baseline


def _after_reboot(previous: Baseline, snapshot: Snapshot) -> Baseline:
    """The baseline of the new boot: everything counts from zero at the boot; what came before is a gap."""
    booted = max(snapshot.wall_unix_ns - snapshot.boottime_ns, previous.end_unix_ns)
    lost = Gap(
        previous.end_unix_ns,
        booted,
        pb.GAP_REASON_REBOOT,
        len(previous.units),
        f"boot {snapshot.boot_id} follows {previous.boot_id}",
    )
    root = born(snapshot.root, previous.root.tenant, 0)
    for state in (previous.root, *previous.units.values()):
        # What was billed ahead of the host's counter is still owed, and the host's own row pays it.
        hand_over(state, root)
    return Baseline(
        boot_id=snapshot.boot_id,
        boottime_ns=0,
        wall_unix_ns=snapshot.wall_unix_ns - snapshot.boottime_ns,
        end_unix_ns=booted,
        sources=previous.sources,
        root=root,
        units={},
        held=previous.held,
        gaps=[*previous.gaps, lost],
    )


def _few(gaps: list[Gap]) -> list[Gap]:
    """At most MAX_GAPS: the rest become one that spans them."""
    if len(gaps) <= MAX_GAPS:
        return gaps
    rest = gaps[MAX_GAPS - 1 :]
    lump = Gap(
        min(gap.start_unix_ns for gap in rest),
        max(gap.end_unix_ns for gap in rest),
        rest[-1].reason,
        sum(max(1, gap.count) for gap in rest),
        f"{len(rest)} gaps in one, the last: {rest[-1].detail}",
    )
    return [*gaps[: MAX_GAPS - 1], lump]


def _merge(earlier: Stretch, later: Stretch, cadence: Cadence) -> Stretch:
    """One interval out of two that follow one another; rows of the same unit and tenant are added."""
    first, second = earlier.interval, later.interval
    duration = first.duration_ns + second.duration_ns
    long = pb.BATCH_FLAG_LONG_INTERVAL if duration > cadence.interval_ns * 3 // 2 else 0
    merged = {(u.cgroup_id, u.tenant): u for u in earlier.usages}
    for usage in later.usages:
        known = merged.get((usage.cgroup_id, usage.tenant))
        if known is None:
            merged[usage.cgroup_id, usage.tenant] = usage
        else:
            add(known, usage)
    return Stretch(
        boot_id=later.boot_id,
        interval=Interval(
            first.start_unix_ns, second.end_unix_ns, duration, first.flags | second.flags | long
        ),
        usages=list(merged.values()),
        host_cpu_usage_ns=earlier.host_cpu_usage_ns + later.host_cpu_usage_ns,
        cpu_deficit_ns=later.cpu_deficit_ns,
        coverage=earlier.coverage & later.coverage,
    )
