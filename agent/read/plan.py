"""Host facts -> which source feeds which field. Pure.

One hierarchy gives the tree of units and their CPU time, so that no nanosecond can be counted by two. The
others only lend fields to the same relative path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.read.host import HostError, HostFacts, Mode
from wire.v1 import usage_pb2 as pb


@dataclass(frozen=True, slots=True)
class Plan:
    """Directories by rôle; None = nothing on this host feeds it."""

    mode: Mode
    tree: Path
    tree_is_v2: bool
    pressure: Path | None
    memory_v1: Path | None
    memory_v2: bool
    io_v1: Path | None
    io_v2: bool
    pids_v1: Path | None
    pids_v2: bool
    throttling_v1: Path | None
    root_cpuacct: Path | None
    """Exact root CPU counter, where v1's cpuacct is mounted."""
    memory_root: Path | None
    proc_root: Path

    @property
    def signature(self) -> str:
        """Stable text of the sources; baselines are re-based when it changes."""
        return ";".join(
            (
                f"tree={'v2' if self.tree_is_v2 else 'v1'}",
                f"root={'cpuacct' if self.root_cpuacct else 'tick'}",
                f"memory={'v2' if self.memory_v2 else 'v1' if self.memory_v1 else '-'}",
                f"io={'v2' if self.io_v2 else 'v1' if self.io_v1 else '-'}",
                f"pressure={'v2' if self.pressure else '-'}",
            )
        )

    @property
    def cpu_source(self) -> str:
        """Where the host's own CPU total is read, as the batch says it."""
        return "cpuacct.usage" if self.root_cpuacct else "cpu.stat"

    @property
    def coverage(self) -> int:
        """Bits of Coverage that the sources can give. Completeness of each reading is added per batch."""
        bits = int(pb.COVERAGE_CPU)
        for there, bit in (
            (self.memory_v2 or self.memory_v1, pb.COVERAGE_MEMORY),
            (self.io_v2 or self.io_v1, pb.COVERAGE_IO),
            (self.pids_v2 or self.pids_v1, pb.COVERAGE_PIDS),
            (self.pressure, pb.COVERAGE_PRESSURE),
        ):
            if there:
                bits |= bit
        return bits


def make(facts: HostFacts, hierarchy: str = "auto") -> Plan:
    """The plan for a host. `hierarchy`: auto, v1 or v2. HostError if the wanted one is not mounted."""
    has_v1 = "cpuacct" in facts.v1
    if hierarchy == "v2" or (
        hierarchy == "auto" and facts.v2 and not (has_v1 and facts.populated_v1_cpuacct)
    ):
        if facts.v2 is None:
            raise HostError("`read.hierarchy: v2` is set but no v2 hierarchy is mounted; set it to auto")
        tree, tree_is_v2 = facts.v2, True
    else:
        if not has_v1:
            raise HostError("no cpuacct hierarchy: mount it, or set `read.hierarchy` to auto")
        tree, tree_is_v2 = facts.v1["cpuacct"], False
    return Plan(
        mode=facts.mode,
        tree=tree,
        tree_is_v2=tree_is_v2,
        pressure=facts.v2 if facts.pressure else None,
        memory_v1=facts.v1.get("memory"),
        memory_v2=tree_is_v2 and "memory" not in facts.v1,
        io_v1=facts.v1.get("blkio"),
        io_v2=tree_is_v2 and "blkio" not in facts.v1,
        pids_v1=facts.v1.get("pids"),
        pids_v2=tree_is_v2 and "pids" not in facts.v1,
        throttling_v1=facts.v1.get("cpu"),
        root_cpuacct=facts.v1.get("cpuacct"),
        memory_root=facts.v1.get("memory"),
        proc_root=facts.proc_root,
    )


def unseen(facts: HostFacts, plan: Plan, without_probes: str) -> tuple[str, ...]:
    """What cannot be seen on this host and why, as sentences for `doctor`, `status` and the demo. `without_probes`:
    why there are no kernel probes, or empty.
    """
    out = []
    if not (plan.memory_v1 or (plan.memory_v2 and "memory" in facts.v2_controllers)):
        out.append("memory: the memory controller is not available in the cgroup hierarchy")
    if not (plan.io_v1 or (plan.io_v2 and "io" in facts.v2_controllers)):
        out.append("block I/O: the io controller is not available in the cgroup hierarchy")
    if not plan.pressure:
        out.append("pressure: the kernel was built or booted without PSI (boot with psi=1)")
    if not plan.root_cpuacct:
        out.append("host total: the root is counted by the timer tick only; units are exact")
    if without_probes:
        out.append(f"network: needs the kernel probes: {without_probes}")
        out.append("ends of containers: without probes a container's last moments are in the row around it")
    if not facts.privileged:
        out.append("other users' container labels: not root, so runtime sockets may be closed to this user")
    return tuple(out)
