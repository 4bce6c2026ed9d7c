"""Events that the kernel kept from the programs, into `overflow`.

It does so while another tracepoint program, or a look into a map, is under way on the same CPU: on a preemptible kernel a task
that makes a cgroup can come between. Kernels from 6.7 on count that ("bpf: Count missed stats in trace_call_bpf").
"""

from __future__ import annotations

from dataclasses import dataclass

import kernel


@dataclass
class Missed:
    """Descriptors of the programs."""

    on_mkdir: int
    on_rmdir: int
    on_release: int
    count_missed: int
    counted: tuple[int, int] = (0, 0)

    def look(self) -> int:
        """Count what is new. How many events that was."""
        births = kernel.misses_of(self.on_mkdir)
        ends = kernel.misses_of(self.on_rmdir) + kernel.misses_of(self.on_release)
        new = (births - self.counted[0], ends - self.counted[1])
        if any(new):
            self.count(*new)
            self.counted = (births, ends)
        return sum(new)

    def count(self, births: int, ends: int) -> None:
        """In the kernel: the programs count there at the same time."""
        kernel.run_raw_tracepoint(self.count_missed, (births, ends))
