"""Edges: nested cgroups, a source that changes, a tenant that changes."""

from __future__ import annotations

from pathlib import Path

from tests.agent.fakehost import CONTAINER, FakeHost
from tests.agent.metering import Metering, cpu_of
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb

OTHER = "/system.slice/nginx.service"


def test_edge_nested_cgroups_are_billed_at_exactly_one_level(fake: FakeHost, tmp_path: Path) -> None:
    inner = f"{OTHER}/inner.service"
    for path in (OTHER, inner):
        fake.cpu(path, 0)
    metering = Metering(fake, tmp_path / "state")
    fake.cpu("/", 20_000)
    fake.cpu(CONTAINER, 2_000)
    fake.cpu(OTHER, 5_000)
    fake.cpu(inner, 3_000)
    fake.cpu(f"{CONTAINER}/system.slice/nested.service", 900)
    batches = metering.tick()
    found = {path: cpu_of(batches, path) for path in ("/", CONTAINER, OTHER, inner)}
    assert found == {"/": 4_000_000, CONTAINER: 1_000_000, OTHER: 2_000_000, inner: 3_000_000}
    assert sum(found.values()) == 10_000_000
    metering.stop()


def test_edge_nested_a_change_of_source_reads_both_once_and_bills_nothing_twice(tmp_path: Path) -> None:
    host = FakeHost(tmp_path / "host", v1=True)
    host.write("/", "cgroup.controllers", "", "unified")
    host.write("/", "cgroup.procs", "", "unified")

    def both(path: str, v1_ns: int, v2_us: int) -> None:
        host.write(path, "cpuacct.usage", f"{v1_ns}\n", "cpuacct")
        host.write(path, "cpu.stat", f"usage_usec {v2_us}\n", "unified")

    both("/", 10_000_000, 99)
    both(OTHER, 4_000_000, 70)
    read = {"cgroup_root": str(host.cgroup_root), "proc_root": str(host.proc_root)}
    metering = Metering(host, tmp_path / "state", read={**read, "hierarchy": "v1"})
    both("/", 11_000_000, 199)
    both(OTHER, 4_500_000, 170)
    metering.stop()
    metering = Metering(host, tmp_path / "state", read={**read, "hierarchy": "v2"})
    old = metering.batches()
    assert cpu_of(old, OTHER) == 500_000
    both(OTHER, 4_700_000, 180)
    both("/", 11_500_000, 250)
    assert cpu_of(metering.tick(), OTHER) == 10_000
    metering.stop()


def test_edge_tenant_change_cuts_the_interval_and_each_row_has_one_tenant(
    fake: FakeHost, tmp_path: Path
) -> None:
    metering = Metering(fake, tmp_path / "state")
    fake.cpu(CONTAINER, 2_000)
    metering.tick()
    metering.stop()
    rules = {"host": "host", "default": "acme", "rules": [{"path": "**", "tenant": "globex"}]}
    changed = Metering(
        fake,
        tmp_path / "state",
        owners=rules,
        read={"cgroup_root": str(fake.cgroup_root), "proc_root": str(fake.proc_root)},
    )
    fake.cpu(CONTAINER, 5_000)
    first = changed.tick()
    fake.cpu(CONTAINER, 9_000)
    second = changed.tick()

    def tenants(batches: list[pb.UsageBatch]) -> dict[str, int]:
        return {b.tenant: cpu_of([b], CONTAINER) for b in batches if CONTAINER in table_of(b).cgroup_path}

    assert tenants(first) == {"acme": 3_000_000}, (
        "the interval in which the owner changed is still the old one's"
    )
    assert tenants(second) == {"globex": 4_000_000}
    changed.stop()
