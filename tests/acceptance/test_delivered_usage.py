"""Delivered usage against the kernel's own figures, on Debian 12's 6.1 with pure cgroup v2 and every controller.

Limited containers and services work until they are quiet, and stay. The kernel's files are read by this test before
and after the agent's last reading. What stood still in between has to be delivered exactly: CPU time, throttling,
block I/O, OOM kills, the peaks of memory and pids. What went on has to lie between the two.

Memory's byte-seconds are an integral over samples; they are compared where memory stood still from sample to sample,
to the one byte-second whose remainder the next row carries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from collector.log_commands import verify
from tests.acceptance.conftest import NewMachine
from tests.acceptance.delivered import Delivered
from tests.acceptance.kernel_figures import Figures, figures
from tests.acceptance.machines.machine import Machine
from tests.acceptance.weighbridge import Weighbridge
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb

SECOND_NS = 1_000_000_000
MEBIBYTE = 1 << 20
PIECES, PIECE_BYTES = 64, 65_536
PEAK_MIB, HELD_MIB = 48, 32
OOM_KILLS, SLEEPERS = 3, 6
QUIET = "exec sleep 86400"

CONTAINERS = {
    "busy": f"--cpus 0.3 localhost/busybox:1 sh -c 'seq 100000 | md5sum; {QUIET}'",
    "peak": f"--memory 128m localhost/busybox:1 sh -c 'dd if=/dev/zero of=/dev/null bs={PEAK_MIB}M count=1; {QUIET}'",
    "oom": "--memory 32m localhost/busybox:1 "
    f"sh -c 'for i in $(seq {OOM_KILLS}); do dd if=/dev/zero of=/dev/null bs=64M count=1; done; {QUIET}'",
    "pids": "--pids-limit 16 localhost/busybox:1 "
    f"sh -c 'for i in $(seq {SLEEPERS}); do sleep 3 & done; wait; {QUIET}'",
}
BLOCKS = (
    f"dd if=/dev/zero of=/var/tmp/blocks bs={PIECE_BYTES} count={PIECES} oflag=direct; "
    f"dd if=/var/tmp/blocks of=/dev/null bs={PIECE_BYTES} count={PIECES} iflag=direct; "
)
HOLDER = f'import time; held = bytearray(b"x") * ({HELD_MIB} << 20); time.sleep(86400)'
SERVICES = {
    "blocks": f"sh -c '{BLOCKS} {QUIET}'",
    "holder": f"--property=MemoryMax=128M python3 -Sc '{HOLDER}'",
    "burner": "--property=CPUQuota=20% sh -c 'while :; do :; done'",
}
ENDLESS = frozenset(("burner",))
SETTINGS = {
    "meter": {"interval": "2s", "memory_sample": "500ms"},
    "owners": {
        "host": "platform",
        "default": "platform",
        "rules": [
            {"path": "/system.slice/acme-*.service", "tenant": "acme"},
            {"path": "/machine.slice/**", "tenant": "globex"},
        ],
    },
}


@dataclass(frozen=True, slots=True)
class Delivery:
    """One run: what the collector has, and what the kernel said around the agent's last reading."""

    delivered: Delivered
    log: Path
    cgroups: dict[str, str]
    before: dict[str, Figures]
    after: dict[str, Figures]
    container_ids: dict[str, str]

    def rows(self, name: str) -> list[tuple[pb.UsageBatch, int]]:
        """The rows of one workload: batches and places in them, oldest first."""
        return self.delivered.rows(self.before[name].cgroup_id)


def start_workloads(machine: Machine) -> dict[str, str]:
    """Starts all; returns the containers' ids."""
    podman = [f"podman run -d --network none --name {name} {words}" for name, words in CONTAINERS.items()]
    units = "systemd-run --quiet --collect --property=IOAccounting=yes"
    services = [f"{units} --unit=acme-{name} {words}" for name, words in SERVICES.items()]
    said = machine.run("\n".join((*podman, *services)), seconds=300).output.split()
    return dict(zip(CONTAINERS, said, strict=True))


def wait_quiet(machine: Machine, cgroups: dict[str, str]) -> None:
    """Until each workload that ends its work has one process left, which sleeps."""
    paths = " ".join(path for name, path in cgroups.items() if name not in {"holder", *ENDLESS})
    machine.run(
        f'for g in {paths}; do until [ "$(find /sys/fs/cgroup$g -name cgroup.procs -exec cat {{}} + | '
        'while read -r pid; do cat /proc/$pid/comm || :; done)" = sleep ]; do sleep 0.3; done; done',
        seconds=300,
    )


@pytest.fixture(scope="module")
def delivery(new_machine: NewMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Delivery]:
    """Install, enrol, meter, and take the collector's log out of the machine."""
    with new_machine() as machine:
        installed = Weighbridge(machine)
        installed.install()
        installed.configure("agent", SETTINGS)
        installed.start()
        ids = start_workloads(machine)
        cgroups = {name: f"/machine.slice/libpod-{number}.scope" for name, number in ids.items()}
        cgroups |= {name: f"/system.slice/acme-{name}.service" for name in SERVICES}
        # crun keeps what it limits one level below the scope that podman makes.
        limited = {f"{name}/limits": f"{cgroups[name]}/container" for name in ids}
        wait_quiet(machine, cgroups)
        installed.wait_intervals(3)
        before = figures(machine, cgroups | limited)
        machine.run("systemctl stop weighbridge-agent")
        after = figures(machine, cgroups | limited)
        log = machine.get("/var/lib/weighbridge-collector/log", tmp_path_factory.mktemp("collector"))
        yield Delivery(Delivered.of(log), log, cgroups, before, after, ids)


@pytest.mark.parametrize("name", sorted({*CONTAINERS, *SERVICES} - ENDLESS - {"holder"}))
def test_what_stood_still_is_delivered_as_the_kernel_counted_it(delivery: Delivery, name: str) -> None:
    expected = delivery.before[name].measures()
    if name in CONTAINERS:
        inner = delivery.before[f"{name}/limits"].measures()
        expected |= {
            measure: inner[measure] for measure in expected if measure.startswith(("cpu_p", "cpu_t"))
        }
        assert delivery.after[f"{name}/limits"] == delivery.before[f"{name}/limits"], "not quiet"
    assert delivery.after[name].measures() == delivery.before[name].measures(), "not quiet"
    assert {
        measure: delivery.delivered.measured(delivery.before[name].cgroup_id, measure) for measure in expected
    } == expected


def test_each_workload_did_what_it_was_made_for(delivery: Delivery) -> None:
    """Without this the comparison could be one of zeroes."""
    kernel = {name: found.measures() for name, found in delivery.before.items()}
    assert kernel["busy"]["cpu_usage_ns"] > SECOND_NS // 10
    assert kernel["busy/limits"]["cpu_throttled_periods"] > 0
    assert kernel["peak"]["memory_peak_bytes"] > PEAK_MIB * MEBIBYTE
    assert delivery.before["peak"].number("memory.current") < PEAK_MIB * MEBIBYTE
    assert kernel["oom"]["oom_kills"] == OOM_KILLS
    assert kernel["pids"]["pids_peak"] > SLEEPERS
    for measure in ("io_read_bytes", "io_write_bytes"):
        assert kernel["blocks"][measure] >= PIECES * PIECE_BYTES
    for measure in ("io_read_ops", "io_write_ops"):
        assert kernel["blocks"][measure] >= PIECES
    assert kernel["burner"]["cpu_throttled_ns"] > 0


def test_what_never_stops_lies_between_two_looks_at_the_kernel(delivery: Delivery) -> None:
    for name in ENDLESS:
        low, high = delivery.before[name].measures(), delivery.after[name].measures()
        assert low["cpu_usage_ns"] < high["cpu_usage_ns"]
        for measure in ("cpu_usage_ns", "cpu_periods", "cpu_throttled_periods", "cpu_throttled_ns"):
            assert (
                low[measure]
                <= delivery.delivered.measured(delivery.before[name].cgroup_id, measure)
                <= high[measure]
            ), measure


def test_memory_that_stands_still_is_billed_as_its_size_times_the_time(delivery: Delivery) -> None:
    size = delivery.before["holder"].number("memory.current")
    assert size == delivery.after["holder"].number("memory.current")
    assert size > HELD_MIB * MEBIBYTE
    still = [
        (batch, row)
        for batch, row in delivery.rows("holder")[1:]
        if not any(column[row] for column in (batch.row_flags, batch.memory_error_byte_seconds) if column)
    ]
    assert len(still) >= 2, "memory never stood still for an interval"
    billed = sum(batch.memory_byte_seconds[row] for batch, row in still)
    expected = sum(size * batch.interval_duration_ns for batch, _ in still) / SECOND_NS
    assert abs(billed - expected) <= len(still)


def test_a_container_is_known_by_its_runtime_and_billed_to_its_tenant(delivery: Delivery) -> None:
    for name in (*CONTAINERS, *SERVICES):
        rows = delivery.rows(name)
        is_container = name in CONTAINERS
        assert {batch.tenant for batch, _ in rows} == {"globex" if is_container else "acme"}
        assert {table_of(batch).cgroup_path[row] for batch, row in rows} == {delivery.cgroups[name]}
        kind = pb.UNIT_KIND_CONTAINER if is_container else pb.UNIT_KIND_SERVICE
        assert {table_of(batch).kind[row] for batch, row in rows} == {kind}
        named = {(table_of(batch).runtime[row], table_of(batch).container_id[row]) for batch, row in rows}
        assert named == {("podman", delivery.container_ids[name]) if is_container else ("", "")}


def test_all_rows_together_are_the_hosts_own_cpu_time(delivery: Delivery) -> None:
    assert delivery.delivered.cpu_usage_ns() == delivery.delivered.host_cpu_usage_ns() > 0


def test_the_stream_is_whole_and_every_controller_was_seen(delivery: Delivery) -> None:
    verdict = verify(delivery.log)
    assert verdict.sound
    assert not verdict.missing
    assert not verdict.duplicates
    everything = (
        pb.COVERAGE_CPU | pb.COVERAGE_MEMORY | pb.COVERAGE_IO | pb.COVERAGE_PIDS | pb.COVERAGE_PRESSURE
    )
    assert {batch.coverage & everything for batch in delivery.delivered.batches} == {everything}
