"""Engine bcc as its unit runs it, on the kernel that its headers belong to, whose types nobody describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from collector.log_commands import verify
from tests.acceptance.conftest import NewMachine
from tests.acceptance.delivered import Delivered
from tests.acceptance.kernel_figures import Figures, figures
from tests.acceptance.short_lives import ShortLives
from tests.acceptance.weighbridge import Weighbridge
from wire.measures import BIT

UNIT = "weighbridge-probes-bcc"
CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF = 12, 38, 39
LIVES = 20
SETTINGS = {"meter": {"interval": "2s", "memory_sample": "500ms"}, "owners": {"default": "platform"}}
DATAGRAMS, PAYLOAD_BYTES, HEADER_BYTES = 10, 72, 8 + 20
TALK = f"""
import socket, time
a, b = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in "ab")
b.bind(("127.0.0.1", 0))
for _ in range({DATAGRAMS}): a.sendto(bytes({PAYLOAD_BYTES}), b.getsockname())
open("/run/talked", "w").close()
time.sleep(86_400)
"""


@dataclass(slots=True)
class Told:
    """What was seen while the machine lived."""

    loader: list[dict[str, Any]] = field(default_factory=list)
    """As the helper began, and after it was killed."""
    advice: str = ""
    restarts: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    capabilities: int = 0
    short_lives: dict[int, int] = field(default_factory=dict)
    talker: Figures = field(default_factory=lambda: Figures(0))
    log: Path = Path()
    delivered: Delivered = field(default_factory=lambda: Delivered([]))


@pytest.fixture(scope="module")
def told(
    new_machine: NewMachine, short_lives_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Told]:
    told = Told()
    with new_machine() as machine:
        site, lives = Weighbridge(machine), ShortLives(machine, short_lives_program)
        site.configure("agent", SETTINGS)
        site.install()
        # A compiler takes a second, and half a minute where machines are emulated.
        machine.run(
            f"mkdir /run/systemd/system/{UNIT}.service.d\n"
            f"printf '[Service]\\nTimeoutStartSec=300s\\n' >/run/systemd/system/{UNIT}.service.d/slow.conf\n"
            f"systemctl daemon-reload; mount -t tmpfs none /sys/kernel/btf; systemctl start {UNIT}",
            seconds=300,
        )
        told.advice = machine.run(f"journalctl -q -b -o cat -u {UNIT}").output
        machine.run(f"sysctl -q kernel.perf_event_paranoid=2; systemctl restart {UNIT}", seconds=300)
        told.loader.append(json.loads(machine.run("weighbridge-probes status --json").output))
        site.start()
        told.status = json.loads(site.command("agent", "status --json"))
        pid = machine.run(f"systemctl show -P MainPID {UNIT}").output.strip()
        effective = machine.run(f"sed -n 's/^CapEff:\t//p' /proc/{pid}/status").output
        told.capabilities = int(effective, 16)
        lives.live(LIVES)
        machine.run(f"kill -KILL {pid}")
        machine.run(f"systemd-run --quiet --unit=talker python3 -Sc '{TALK}'")
        lives.live(LIVES)
        site.wait("[ -e /run/talked ]")
        site.wait(f"[ $(systemctl show -P NRestarts {UNIT}) = 1 ] && systemctl is-active {UNIT}", 300)
        told.restarts = machine.run(f"systemctl show -P NRestarts {UNIT}").output.strip()
        told.loader.append(json.loads(machine.run("weighbridge-probes status --json").output))
        machine.run("echo 3 >/proc/sys/vm/drop_caches")
        site.wait_intervals(2)
        told.talker = figures(machine, {"talker": "/system.slice/talker.service"})["talker"]
        told.short_lives = lives.used_ns
        machine.run("systemctl stop weighbridge-agent")
        told.log = machine.get("/var/lib/weighbridge-collector/log", tmp_path_factory.mktemp("collector"))
        told.delivered = Delivered.of(told.log)
        yield told


def test_debians_own_restriction_of_tracepoints_is_named_with_its_fix(told: Told) -> None:
    assert "lifecycle.bcc.c: refused" in told.advice
    assert "sysctl kernel.perf_event_paranoid=2" in told.advice


def test_it_starts_under_its_unit_and_comes_back_when_it_is_killed(told: Told) -> None:
    for status in told.loader:
        assert (status["engine"], status["lifecycle"], status["network"]) == ("bcc", True, True)
        assert not any(status["overflow"].values())
    assert told.restarts == "1"
    assert told.capabilities == 1 << CAP_NET_ADMIN | 1 << CAP_PERFMON | 1 << CAP_BPF


def test_the_agent_reads_it_and_the_files_where_it_says_nothing(told: Told) -> None:
    assert (told.status["probes"], told.status["probes_walk"]) == ("attached", "none")


def test_every_end_is_seen_also_while_the_helper_is_down_and_its_unknown_usage_is_no_nought(
    told: Told,
) -> None:
    assert len(told.short_lives) == 2 * LIVES
    for cgroup_id in told.short_lives:
        assert told.delivered.ends(cgroup_id) == 1
        batch, row = told.delivered.rows(cgroup_id)[-1]
        assert not batch.known[row] >> BIT["cpu_usage_ns"] & 1


def test_traffic_is_counted_to_the_byte_while_the_helper_is_down(told: Told) -> None:
    cgroup_id = told.talker.cgroup_id
    for direction in ("tx", "rx"):
        assert told.delivered.measured(cgroup_id, f"net_{direction}_loopback_bytes") == DATAGRAMS * (
            PAYLOAD_BYTES + HEADER_BYTES
        )
    assert told.delivered.measured(cgroup_id, "cpu_usage_ns") == (
        told.talker.keyed("cpu.stat", "usage_usec") * 1_000
    )


def test_nothing_is_lost_or_twice(told: Told) -> None:
    verdict = verify(told.log)
    assert verdict.sound, verdict
    assert not verdict.missing
    assert not verdict.duplicates
    assert told.delivered.cpu_usage_ns() == told.delivered.host_cpu_usage_ns() > 0
