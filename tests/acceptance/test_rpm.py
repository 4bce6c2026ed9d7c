"""The .rpms in a machine with another kernel, by rpm alone: installed, used, upgraded and downgraded under load, erased.

Debian's rpm has no record of what dpkg installed, so nobody is asked for dependencies; everything else is as in a
distribution of rpm's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from collector.log_commands import verify
from tests.acceptance.books import booked_cpu_ns, wait_booked
from tests.acceptance.conftest import NewMachine
from tests.acceptance.delivered import Delivered
from tests.acceptance.kernel_figures import Figures, figures
from tests.acceptance.machines.snapshot import BACKPORTS
from tests.acceptance.packages import NEW, OLD, manage, put_ledger
from tests.acceptance.short_lives import ShortLives
from tests.acceptance.weighbridge import Weighbridge

LIVES_A_CHANGE = 40
NAMES = "weighbridge-agent weighbridge-collector"
LEDGER = "weighbridge-ledger"
SETTINGS = {"meter": {"interval": "2s", "memory_sample": "500ms"}, "owners": {"default": "globex"}}
BURNER = "--unit=burner --property=CPUQuota=20% sh -c 'while :; do :; done'"


@dataclass(slots=True)
class Told:
    """What was seen while the machine lived."""

    verified: str = ""
    versions: list[str] = field(default_factory=list)
    booked_ns: int = 0
    reconciled: dict[str, Any] = field(default_factory=dict)
    engine: str = ""
    short_lives: dict[int, int] = field(default_factory=dict)
    burner: Figures = field(default_factory=lambda: Figures(0))
    left: str = ""
    log: Path = Path()
    delivered: Delivered = field(default_factory=lambda: Delivered([]))


def change(site: Weighbridge, lives: ShortLives, words: str) -> str:
    """Another revision, while cgroups come and go; the version that is there then."""
    with lives.meanwhile(LIVES_A_CHANGE):
        manage(site.machine, f"rpm --nodeps --upgrade {words}", 600)
    site.wait_ready()
    return site.machine.run("rpm --query weighbridge-agent").output.strip()


@pytest.fixture(scope="module")
def told(
    new_machine: NewMachine, short_lives_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Told]:
    told = Told()
    with new_machine(BACKPORTS) as machine:
        site, lives = Weighbridge(machine), ShortLives(machine, short_lives_program)
        site.configure("agent", SETTINGS)
        site.install("rpm", probes=True)
        told.verified = machine.run(f"rpm --verify --nodeps {NAMES}", check=False).output
        site.start()
        machine.run(f"systemd-run --quiet {BURNER}")
        told.engine = site.command("agent", "status --json")
        told.versions.append(change(site, lives, f"{NEW}/*.rpm"))
        told.versions.append(change(site, lives, f"--oldpackage {OLD}/*.rpm"))
        machine.run("systemctl kill --signal=STOP burner; sleep 1; echo 3 >/proc/sys/vm/drop_caches")
        site.wait_intervals(2)
        told.burner = figures(machine, {"burner": "/system.slice/burner.service"})["burner"]
        told.short_lives = lives.used_ns
        machine.run("systemctl stop weighbridge-agent")
        put_ledger(machine, "rpm")
        manage(machine, f"rpm --nodeps --install ledger/{OLD}/*.rpm", 600)
        told.verified += machine.run(f"rpm --verify --nodeps {LEDGER}", check=False, seconds=300).output
        machine.run(f"systemctl start {LEDGER}", seconds=600)
        wait_booked(site)
        told.booked_ns = booked_cpu_ns(site, told.burner.cgroup_id)
        told.reconciled = json.loads(site.command("ledger", "reconcile --json"))
        manage(machine, f"rpm --nodeps --erase {NAMES} {LEDGER}")
        state = "/var/lib/weighbridge/* /var/lib/weighbridge-ledger/lock"
        told.left = machine.run(
            f"ls -d /usr/lib/weighbridge /run/weighbridge/bpf/* {state} 2>/dev/null || :\n"
            "systemctl list-units --all --no-legend 'weighbridge-[aclp]*' 'weighbridge-reconcile*'\n"
            "bpftool prog show | grep weighbridge || :"
        ).output
        told.log = machine.get("/var/lib/weighbridge-collector/log", tmp_path_factory.mktemp("collector"))
        told.delivered = Delivered.of(told.log)
        yield told


def test_what_is_installed_is_what_was_packed(told: Told) -> None:
    assert told.verified == ""


def test_upgrade_and_downgrade_take_place(told: Told) -> None:
    new, old = told.versions
    assert f"-{NEW}." in new
    assert f"-{OLD}." in old


def test_the_probes_are_loaded_with_the_best_that_a_newer_kernel_has(told: Told) -> None:
    assert '"probes": "attached"' in told.engine
    assert '"probes_walk": "css"' in told.engine


def test_each_short_life_is_delivered_once_while_versions_change(told: Told) -> None:
    assert len(told.short_lives) == 2 * LIVES_A_CHANGE
    for cgroup_id, usage_ns in told.short_lives.items():
        assert told.delivered.ends(cgroup_id) == 1
        assert abs(told.delivered.measured(cgroup_id, "cpu_usage_ns") - usage_ns) <= 1_000


def test_a_workload_is_delivered_as_the_kernel_counted_it(told: Told) -> None:
    cpu_ns = told.burner.keyed("cpu.stat", "usage_usec") * 1_000
    assert told.delivered.measured(told.burner.cgroup_id, "cpu_usage_ns") == cpu_ns > 0


def test_the_ledger_books_all_of_it_once(told: Told) -> None:
    cpu_ns = told.burner.keyed("cpu.stat", "usage_usec") * 1_000
    assert told.booked_ns == cpu_ns
    assert told.reconciled["ok"], told.reconciled
    assert sum(hop["booked"] for hop in told.reconciled["hops"]) == len(told.delivered.batches)


def test_nothing_is_lost_or_twice(told: Told) -> None:
    verdict = verify(told.log)
    assert verdict.sound, verdict
    assert not verdict.missing
    assert not verdict.duplicates
    assert told.delivered.counter_resets() == 0


def test_an_erasure_keeps_the_state_and_nothing_else(told: Told) -> None:
    left = told.left.split()
    ledger = "/var/lib/weighbridge-ledger/lock"
    assert {"/var/lib/weighbridge/spool.db", "/var/lib/weighbridge/identity.json", ledger} <= set(left)
    assert all(word == ledger or word.startswith("/var/lib/weighbridge/") for word in left)
