"""What a collector has accepted, as its log says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from collector.handoff.log import Kind, Record, scan
from wire.containers import table_of
from wire.measures import BIT
from wire.v1 import usage_pb2 as pb


@dataclass(frozen=True, slots=True)
class Delivered:
    """Batches of one agent, in the order in which they were accepted."""

    batches: list[pb.UsageBatch]

    @classmethod
    def of(cls, log: Path) -> Self:
        """Of a log in which everything was accepted in the end: what was rejected was let in later, byte for byte."""
        records = [record for record in scan(log) if isinstance(record, Record)]
        accepted = [record for record in records if record.kind is Kind.ACCEPTED]
        rejected = [record for record in records if record.kind is Kind.REJECTED]
        assert len(accepted) + len(rejected) == len(records)
        assert {record.digest for record in rejected} <= {record.digest for record in accepted}
        return cls([pb.UsageBatch.FromString(record.body) for record in accepted])

    def rows(self, cgroup_id: int) -> list[tuple[pb.UsageBatch, int]]:
        """The rows of one cgroup: batches and places in them."""
        return [
            (batch, row)
            for batch in self.batches
            for row, found in enumerate(table_of(batch).cgroup_id)
            if found == cgroup_id
        ]

    def flags(self, cgroup_id: int) -> list[int]:
        """The flags of its rows."""
        return [batch.row_flags[row] if batch.row_flags else 0 for batch, row in self.rows(cgroup_id)]

    def ends(self, cgroup_id: int) -> int:
        """How many of its rows say that they are the last."""
        return sum(bool(flags & pb.ROW_FLAG_FINAL) for flags in self.flags(cgroup_id))

    def counter_resets(self) -> int:
        """How many rows began to count anew."""
        return sum(
            bool(flag & pb.ROW_FLAG_COUNTER_RESET) for batch in self.batches for flag in batch.row_flags
        )

    def known(self, cgroup_id: int, measure: str) -> list[int]:
        """The values of one measure in every row of a cgroup in which it is known."""
        return [
            getattr(batch, measure)[row] if getattr(batch, measure) else 0
            for batch, row in self.rows(cgroup_id)
            if batch.known[row] >> BIT[measure] & 1
        ]

    def measured(self, cgroup_id: int, measure: str) -> int:
        """A peak's maximum, a counter's sum."""
        values = self.known(cgroup_id, measure)
        assert values, f"{measure} of {cgroup_id} was never known"
        return max(values) if measure.endswith(("_peak", "_peak_bytes")) else sum(values)

    def cpu_usage_ns(self) -> int:
        """Of all rows."""
        return sum(sum(batch.cpu_usage_ns) for batch in self.batches)

    def host_cpu_usage_ns(self) -> int:
        """What the host's own counter accounts for: equal to that of all rows."""
        totals = [batch.host_totals for batch in self.batches if batch.HasField("host_totals")]
        return sum(total.cpu_usage_ns for total in totals) + totals[-1].cpu_deficit_ns
