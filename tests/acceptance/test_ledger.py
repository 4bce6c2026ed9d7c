"""The ledger's .deb in a machine: installed beside a collector by the guide's commands, used, asked, killed, upgraded and
downgraded while usage comes in, removed and purged. Its books say then what the kernel said, and have what the collector has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.books import LEDGER_PORT, booked_cpu_ns, wait_booked
from tests.acceptance.conftest import NewMachine
from tests.acceptance.delivered import Delivered
from tests.acceptance.kernel_figures import Figures, figures
from tests.acceptance.machines.machine import Machine
from tests.acceptance.packages import IN_MACHINE, NEW, OLD, manage, put_ledger, with_compiled
from tests.acceptance.test_installed import EXPOSURE
from tests.acceptance.weighbridge import Weighbridge
from tests.packaging.test_install import first_use

AGENT = {"meter": {"interval": "5s", "memory_sample": "1s"}, "owners": {"default": "globex"}}
LEDGER = {"rollup": {"settle": "0s", "every": "5s"}}
BURNER = "--unit=burner --property=CPUQuota=20% sh -c 'while :; do :; done'"
STATE = "/var/lib/weighbridge-ledger"
LOG = "/var/lib/weighbridge-collector/log"


@dataclass(slots=True)
class Told:
    """What was seen while the machine lived."""

    exposure: dict[str, float] = field(default_factory=dict)
    capabilities: set[int] = field(default_factory=set)
    groups: str = ""
    status: str = ""
    reload: tuple[bool, float, str] = (False, 0.0, "")
    restarts: str = ""
    versions: list[str] = field(default_factory=list)
    timer: str = ""
    burner: Figures = field(default_factory=lambda: Figures(0))
    booked_ns: int = 0
    reconciled: dict[str, Any] = field(default_factory=dict)
    verified: dict[str, Any] = field(default_factory=dict)
    comparison: str = ""
    delivered: Delivered = field(default_factory=lambda: Delivered([]))
    removed: str = ""
    purged: str = ""


class Life:
    """The steps."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.site, self.told = machine, Weighbridge(machine), Told()

    def meter(self) -> None:
        self.site.configure("agent", AGENT)
        self.site.install()
        self.site.start()
        self.machine.run(f"systemd-run --quiet {BURNER}")

    def install(self) -> None:
        """By the guide's own commands; only what compiles is replaced."""
        self.site.configure("ledger", LEDGER)
        put_ledger(self.machine)
        install, start = first_use("The ledger")
        self.machine.run(f"cp {IN_MACHINE}/ledger/{OLD}/*.deb {IN_MACHINE}/")
        self.machine.run(with_compiled(install), seconds=600)
        self.machine.run(start, seconds=600)
        self.site.wait_page(LEDGER_PORT, 300)

    def look(self) -> None:
        for unit in ("ledger", "reconcile"):
            said = self.machine.run(f"systemd-analyze security --no-pager weighbridge-{unit}.service").output
            self.told.exposure[unit] = float(re.findall(r"exposure level for \S+: ([0-9.]+)", said)[0])
        state = self.site.unit("ledger", "MainPID", "StatusText")
        lines = self.machine.read(f"/proc/{state['MainPID']}/status")
        self.told.capabilities.update(
            int(number, 16) for number in re.findall(r"^Cap\w+:\t([0-9a-f]+)$", lines, re.MULTILINE)
        )
        self.told.groups = self.machine.run("id --name --groups weighbridge-ledger").output.strip()
        self.told.status = state["StatusText"]
        self.told.timer = self.machine.run("systemctl is-active weighbridge-reconcile.timer").output.strip()

    def reload(self) -> None:
        self.machine.run("echo 'nonsense: 1' >/etc/weighbridge/ledger.d/zz.yaml")
        done = self.machine.run("systemctl reload weighbridge-ledger", check=False)
        metric = self.site.metric(LEDGER_PORT, "weighbridge_ledger_reload_failed")
        self.told.reload = (done.code != 0, metric, self.site.unit("ledger", "ActiveState")["ActiveState"])
        self.machine.run("rm /etc/weighbridge/ledger.d/zz.yaml; systemctl reload weighbridge-ledger")

    def kill(self) -> None:
        self.machine.run("kill -KILL $(systemctl show -P MainPID weighbridge-ledger)")
        self.site.wait("[ $(systemctl show -P NRestarts weighbridge-ledger) = 1 ]", 300)
        self.site.wait_page(LEDGER_PORT, 300)
        self.told.restarts = self.site.unit("ledger", "NRestarts")["NRestarts"]

    def change_versions(self) -> None:
        """N-1 -> N -> N-1, while usage comes in."""
        for revision in (NEW, OLD):
            manage(self.machine, f"dpkg --install ledger/{revision}/*.deb", 600)
            self.told.versions.append(self.machine.run("dpkg-query --show weighbridge-ledger").output)
            self.site.wait_page(LEDGER_PORT, 300)

    def compare(self, directory: Path) -> None:
        """Books, kernel and the collector's log, when no more usage comes."""
        self.machine.run("systemctl kill --signal=STOP burner; sleep 1")
        self.told.burner = figures(self.machine, {"burner": "/system.slice/burner.service"})["burner"]
        self.site.wait_intervals(2)
        self.machine.run("systemctl stop weighbridge-agent")
        wait_booked(self.site)
        self.told.booked_ns = booked_cpu_ns(self.site, self.told.burner.cgroup_id)
        self.told.reconciled = json.loads(self.site.command("ledger", "reconcile --json"))
        self.told.verified = json.loads(self.site.command("ledger", "verify --json"))
        self.machine.run("systemctl start weighbridge-reconcile.service", seconds=300)
        self.told.comparison = self.site.unit("reconcile.service", "Result")["Result"]
        self.told.delivered = Delivered.of(self.machine.get(LOG, directory))

    def remove_and_purge(self) -> None:
        kept = f"ls -d {STATE}/* /etc/weighbridge/ledger* /usr/lib/weighbridge/ledger 2>/dev/null || :"
        units = "systemctl list-units --all --no-legend 'weighbridge-ledger*' 'weighbridge-reconcile*'"
        manage(self.machine, "dpkg --remove weighbridge-ledger")
        self.told.removed = self.machine.run(f"{kept}\n{units}").output
        manage(self.machine, "dpkg --purge weighbridge-ledger")
        self.told.purged = self.machine.run(kept).output


@pytest.fixture(scope="module")
def told(new_machine: NewMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    with new_machine() as machine:
        life = Life(machine)
        life.meter()
        life.install()
        life.look()
        life.reload()
        life.kill()
        life.change_versions()
        life.compare(tmp_path_factory.mktemp("collector"))
        life.remove_and_purge()
        yield life.told


def test_the_units_are_sandboxed_and_the_daemon_has_no_capability(told: Told) -> None:
    assert set(told.exposure) == {"ledger", "reconcile"}
    assert max(told.exposure.values()) <= EXPOSURE, told.exposure
    assert told.capabilities == {0}
    assert told.groups.split() == ["weighbridge-ledger", "weighbridge-collector"]


def test_systemctl_status_says_in_a_line_what_it_does(told: Told) -> None:
    assert re.match(r"booked up to \S+, 1 agents|nothing booked yet, \d agents", told.status), told.status


def test_a_bad_file_fails_the_reload_and_leaves_the_ledger_as_it_was(told: Told) -> None:
    assert told.reload == (True, 1.0, "active")


def test_it_is_restarted_when_it_is_killed_and_goes_on_over_upgrade_and_downgrade(told: Told) -> None:
    assert told.restarts == "1"
    new, old = told.versions
    assert f"-{NEW}+" in new
    assert f"-{OLD}+" in old


def test_what_is_booked_of_a_workload_is_what_the_kernel_counted(told: Told) -> None:
    assert told.booked_ns == told.burner.keyed("cpu.stat", "usage_usec") * 1_000 > 0


def test_every_batch_that_the_collector_took_in_is_booked_once(told: Told) -> None:
    hops = told.reconciled["hops"]
    batches = told.delivered.batches
    assert sum(hop["booked"] for hop in hops) == len(batches) == len({(b.epoch, b.seq) for b in batches}) > 20
    assert told.reconciled["ok"], told.reconciled
    assert told.reconciled["intervals_compared"] > 5
    assert told.verified["ok"], told.verified


def test_the_timers_command_compares_within_its_sandbox(told: Told) -> None:
    assert told.timer == "active"
    assert told.comparison == "success"


def test_a_removal_keeps_the_books_and_a_purge_takes_them(told: Told) -> None:
    removed = told.removed.split()
    assert {f"{STATE}/db", "/etc/weighbridge/ledger.yaml"} <= set(removed)
    assert "/usr/lib/weighbridge/ledger" not in removed
    assert not any(word.endswith((".service", ".timer")) for word in removed)
    assert told.purged == ""
