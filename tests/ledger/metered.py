"""A host in miniature, metered by the agent's own code: what the kernel counts is known, and so is what was billed."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from agent.meter import batch, usage
from agent.meter.model import COUNTERS, Reading, Snapshot
from agent.meter.rows import FOLDED_ID, ROOT_ID, Usage
from agent.meter.usage import Baseline
from tests.agent.readings import BOOT_A, CADENCE, SECOND, WALL
from wire.identity import AgentId, BatchId, digest
from wire.v1 import usage_pb2 as pb

AGENT = AgentId("11111111-2222-4333-8444-555555555555")
NESTED = ("cpu_usage_ns", "oom_kills", "io_write_bytes")
OWN = ("cpu_throttled_ns",)
PATHS = {
    "ci": "/ci.service",
    "job": "/ci.service/job.scope",
    "box": "/ci.service/job.scope/box",
    "web": "/web.service",
    "pod": "/web.service/pod",
    "solo": "/solo",
}
CONTAINERS = ("box", "pod", "solo")


@dataclass
class Unit:
    cgroup_id: int
    used: dict[str, int]


@dataclass
class Kernel:
    """Own usage per unit; counters as the kernel gives them."""

    boot_id: str = BOOT_A
    at_seconds: int = 1_000
    clock_offset_seconds: int = 0
    next_id: int = 100
    units: dict[str, Unit] = field(default_factory=dict)
    elsewhere: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each path ("/" is the root), what it used itself without being a unit, and what units below it used that ended."""
    root_lag_ns: int = 0
    _root_cpu_ns: int = 0

    def live(self, wanted: set[str], used: dict[str, int], root_used: int) -> None:
        """Ten seconds: some end, some are born, everybody uses some of everything."""
        self.at_seconds += 10
        alive = {name for name in wanted if all(o in wanted for o in self._around(name))}
        for name in sorted(self.units.keys() - alive, key=lambda n: -len(PATHS[n])):
            self._end(name)
        for name in PATHS:
            if name in alive and name not in self.units:
                self.units[name] = Unit(self.next_id, dict.fromkeys((*NESTED, *OWN), 0))
                self.next_id += 1
        for name in self.units:
            for k, measure in enumerate((*NESTED, *OWN)):
                self.units[name].used[measure] += used.get(name, 0) * (k + 1)
        self._add("/", dict.fromkeys(NESTED, root_used))

    def counter(self, name: str, measure: str) -> int:
        path = PATHS[name]
        if measure in OWN:
            return self.units[name].used[measure]
        inside = [n for n in self.units if n == name or PATHS[n].startswith(path + "/")]
        kept = [p for p in self.elsewhere if p == path or p.startswith(path + "/")]
        return sum(self.units[n].used[measure] for n in inside) + sum(
            self.elsewhere[p][measure] for p in kept
        )

    def root_counter(self, measure: str) -> int:
        return sum(u.used[measure] for u in self.units.values()) + sum(
            e[measure] for e in self.elsewhere.values()
        )

    def snapshot(self, unreadable: frozenset[str] = frozenset(), complete: bool = True) -> Snapshot:
        boottime = self.at_seconds * SECOND
        # The root is counted by the tick: behind its units, but never backwards.
        self._root_cpu_ns = max(self._root_cpu_ns, self.root_counter("cpu_usage_ns") - self.root_lag_ns)
        root = {"cpu_usage_ns": self._root_cpu_ns}
        return Snapshot(
            self.boot_id,
            boottime,
            WALL + boottime + self.clock_offset_seconds * SECOND,
            Reading(
                ROOT_ID,
                "/",
                ROOT_ID,
                tuple(root.get(c) for c in COUNTERS),
                {"8:0": (0, self.root_counter("io_write_bytes"), 0, 0)},
            ),
            [self._reading(name) for name in reversed(self.units) if name not in unreadable],
            complete and not unreadable,
        )

    def reboot(self, boot_id: str, at_seconds: int) -> None:
        self.clock_offset_seconds += self.at_seconds - at_seconds
        self.boot_id, self.at_seconds, self._root_cpu_ns = boot_id, at_seconds, 0
        self.units.clear()
        self.elsewhere.clear()

    def _reading(self, name: str) -> Reading:
        unit = self.units[name]
        told = {m: self.counter(name, m) for m in ("cpu_usage_ns", "oom_kills", "cpu_throttled_ns")}
        around = self._around(name)
        return Reading(
            unit.cgroup_id,
            PATHS[name],
            self.units[around[-1]].cgroup_id if around else ROOT_ID,
            tuple(told.get(c) for c in COUNTERS),
            {"8:0": (0, self.counter(name, "io_write_bytes"), 0, 0)},
        )

    def _end(self, name: str) -> None:
        unit, around = self.units.pop(name), self._around(name)
        kept = self.elsewhere.pop(PATHS[name], dict.fromkeys(NESTED, 0))
        for measure in NESTED:
            kept[measure] += unit.used[measure]
        self._add(PATHS[around[-1]] if around else "/", kept)

    def _add(self, path: str, amounts: dict[str, int]) -> None:
        total = self.elsewhere.setdefault(path, dict.fromkeys(NESTED, 0))
        for measure, amount in amounts.items():
            total[measure] += amount

    @staticmethod
    def _around(name: str) -> list[str]:
        """Outermost first."""
        return [n for n in PATHS if PATHS[name].startswith(PATHS[n] + "/")]


def tenant_of(reading: Reading) -> str:
    if reading.cgroup_id == ROOT_ID:
        return "host"
    return "acme" if reading.path.startswith("/ci") else "globex"


def _describe(row: Usage) -> batch.Described:
    special = batch.kind_of_special(row.cgroup_id)
    if special is not None:
        return batch.Described(special, "" if row.cgroup_id == FOLDED_ID else "/")
    is_container = row.path.rpartition("/")[2] in CONTAINERS
    return batch.Described(int(pb.UNIT_KIND_CONTAINER if is_container else pb.UNIT_KIND_SERVICE), row.path)


class Agent:
    """The agent's meter with a stream of batches; the spool is `baseline` and nothing else."""

    def __init__(self, kernel: Kernel, epoch: int = 1, incomplete_of: frozenset[str] = frozenset()) -> None:
        self.kernel = kernel
        self.epoch = epoch - 1
        self.copies: list[bytes] = []
        """Every baseline that was durable once."""
        self.lose_spool(incomplete_of)

    def lose_spool(self, unreadable: frozenset[str] = frozenset()) -> None:
        self.baseline = usage.begin(self.kernel.snapshot(unreadable), "test", tenant_of, [])
        self._begin_epoch()

    def restore(self, copy: int) -> None:
        """An older copy of the spool: a collector says so, and the agent opens an epoch."""
        baseline = msgspec.msgpack.decode(self.copies[copy % len(self.copies)], type=Baseline)
        self.baseline = usage.reopen(baseline)
        self._begin_epoch()

    def conflict(self) -> None:
        self.baseline = usage.reopen(self.baseline)
        self._begin_epoch()

    def change_sources(self) -> list[pb.UsageBatch]:
        """Another plan reads the same cgroups; both are read at once."""
        outcome = usage.step(self.baseline, self.kernel.snapshot(), tenant_of, CADENCE)
        base = usage.rebase(outcome.baseline, self.kernel.snapshot(), "other", tenant_of)
        out = self._seal(outcome)
        self.baseline = base
        return out

    def tick(
        self, unreadable: frozenset[str] = frozenset(), hold: bool = False, fold: bool = False
    ) -> list[pb.UsageBatch]:
        """One interval; its batches, or none if they could not be committed."""
        snapshot = self.kernel.snapshot(unreadable)
        followed = usage.follow_clock(self.baseline, snapshot)
        if followed is not None:
            self.baseline = followed
            self._begin_epoch()
        outcome = usage.step(self.baseline, snapshot, tenant_of, CADENCE)
        if hold:
            self.baseline = usage.hold(outcome, fold)
            self._persist()
            return []
        return self._seal(outcome, snapshot.complete)

    def _seal(self, outcome: usage.Outcome, complete: bool = True) -> list[pb.UsageBatch]:
        coverage = int(pb.COVERAGE_WHOLE_HOST) if complete else 0
        producer = batch.Producer("host", "1", 4, coverage, "cpu.stat", False, _describe)
        out = []
        for draft in batch.drafts(outcome, producer):
            body = draft.seal(BatchId(AGENT, self.epoch, self.next_seq), self.last_digest)
            self.next_seq, self.last_digest = self.next_seq + 1, digest(body)
            out.append(pb.UsageBatch.FromString(body))
        self.deficit_ns = outcome.stretches[-1].cpu_deficit_ns
        self.baseline = outcome.baseline
        self._persist()
        return out

    def _persist(self) -> None:
        self.copies.append(msgspec.msgpack.encode(self.baseline))
        self.baseline = msgspec.msgpack.decode(self.copies[-1], type=Baseline)

    def _begin_epoch(self) -> None:
        self.epoch, self.next_seq, self.last_digest = self.epoch + 1, 1, b""
        self._persist()
