"""The packages, installed and run as an operator would, through everything a machine may do to them.

One life of one machine: installed by the five commands of the operator guide, loaded with containers, reloaded, its certificates
renewed, daemons stopped dead and killed, the disk filled and mounted read-only, the clock set, upgraded, downgraded, booted anew,
removed and purged. Something works all the time. What was delivered then has to be what the kernel said, each once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from collector.log_commands import verify
from tests.acceptance.conftest import NewMachine
from tests.acceptance.delivered import Delivered
from tests.acceptance.kernel_figures import Figures, figures
from tests.acceptance.machines.machine import Machine
from tests.acceptance.packages import IN_MACHINE, NEW, OLD, manage, put_packages, with_compiled
from tests.acceptance.short_lives import ShortLives
from tests.acceptance.weighbridge import AGENT_PORT, COLLECTOR_PORT, FETCH, WAIT_INTERVALS, Weighbridge
from tests.packaging.test_install import first_use

SHORT_LIVES = 200
LOG = "/var/lib/weighbridge-collector/log"
MEBIBYTE = 1 << 20
HOUR_NS = 3_600 * 10**9
AGENT_MIB, COLLECTOR_MIB = 64, 256
EXPOSURE = 1.5
QUIET = "exec sleep 86400"
TALK = "httpd -p 127.0.0.1:7000 -h /bin; wget -q -O /dev/null http://127.0.0.1:7000/busybox"
CONTAINERS = {
    "busy": f"--network none --cpus 0.5 localhost/busybox:1 sh -c 'seq 50000 | md5sum; {QUIET}'",
    "oom": "--network none --memory 32m localhost/busybox:1 "
    f"sh -c 'dd if=/dev/zero of=/dev/null bs=64M count=1; {QUIET}'",
    "talker": f"--network host localhost/busybox:1 sh -c '{TALK}; {QUIET}'",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "agent": {
        "owners": {"default": "platform", "rules": [{"path": "/machine.slice/**", "tenant": "globex"}]}
    },
    # Agents renew at half of it; an emulated machine may need two minutes from the enrolment to the first renewal's chance.
    "collector": {"tls": {"certificate_life": "6m"}},
}
OWN_MEMORY = """
import pathlib, sys
group = pathlib.Path("/sys/fs/cgroup/system.slice", sys.argv[1])
cache = next(int(line.split()[1]) for line in (group / "memory.stat").read_text().splitlines() if line.startswith("file "))
print(int(sys.argv[2]) - cache)
"""


@dataclass(slots=True)
class Told:
    """What was seen while the machine lived."""

    commands: int = 0
    first_rows: str = ""
    exposure: dict[str, float] = field(default_factory=dict)
    capabilities: set[int] = field(default_factory=set)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    reload: dict[str, object] = field(default_factory=dict)
    trouble: dict[str, dict[str, str]] = field(default_factory=dict)
    restarts: dict[str, str] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    boot_order: list[str] = field(default_factory=list)
    short_lives: dict[int, int] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)
    podman_ns: dict[str, int] = field(default_factory=dict)
    renewals: int = 0
    left: dict[str, str] = field(default_factory=dict)
    log: Path = Path()
    metered: Delivered = field(default_factory=lambda: Delivered([]))
    """What was delivered when `figures` were taken."""
    delivered: Delivered = field(default_factory=lambda: Delivered([]))


class Life:
    """The steps."""

    def __init__(self, machine: Machine, lives: ShortLives) -> None:
        self.machine, self.site, self.told = machine, Weighbridge(machine), Told()
        self.lives = lives
        self.cgroups: dict[str, str] = {}

    def install(self) -> None:
        """By the guide's own commands; only what compiles is replaced."""
        put_packages(self.machine)
        for part, settings in SETTINGS.items():
            self.site.configure(part, settings)
        five = first_use()
        self.told.commands = len(five)
        self.machine.run(f"cp {IN_MACHINE}/{OLD}/*.deb {IN_MACHINE}/")
        self.machine.run(with_compiled(five[0]), seconds=300)
        for command in five[1:]:
            self.machine.run(command, seconds=300)

    def run_containers(self) -> None:
        # Pid 1 of a container hears no SIGTERM: at the reboot systemd would wait for 90 s before it sends another one.
        drop_in = "/etc/systemd/system/libpod-.scope.d"
        self.machine.run(f"mkdir {drop_in}; printf '[Scope]\\nTimeoutStopSec=5s\\n' >{drop_in}/stop.conf")
        numbers = {
            name: self.machine.run(f"podman run --detach --name {name} {words}", seconds=300).output.strip()
            for name, words in CONTAINERS.items()
        }
        self.cgroups = {name: f"/machine.slice/libpod-{number}.scope" for name, number in numbers.items()}
        self.cgroups["burner"] = "/system.slice/burner.service"
        burner = "--unit=burner --property=CPUQuota=10% sh -c 'while :; do :; done'"
        self.machine.run(f"systemd-run --quiet {burner}")

    def first_usage(self) -> None:
        """Until the collector has what a container used, under its tenant."""
        rows = "weighbridge-collector log cat --json --rows --tenant globex"
        self.site.wait(f"{rows} >/run/first-rows && grep -q cpu_usage_ns /run/first-rows", 300)
        self.told.first_rows = self.machine.read("/run/first-rows")

    def look(self) -> None:
        """At what the daemons are allowed, and what they hold."""
        for part in ("probes", "agent", "collector"):
            said = self.machine.run(f"systemd-analyze security --no-pager weighbridge-{part}.service").output
            self.told.exposure[part] = float(re.findall(r"exposure level for \S+: ([0-9.]+)", said)[0])
        for part in ("agent", "collector"):
            state = self.site.unit(part, "MainPID", "MemoryCurrent", "StatusText")
            lines = self.machine.read(f"/proc/{state['MainPID']}/status")
            sets = re.findall(r"^Cap\w+:\t([0-9a-f]+)$", lines, re.MULTILINE)
            self.told.capabilities.update(int(number, 16) for number in sets)
            self.told.status[part] = state["StatusText"]
            words = f"weighbridge-{part}.service {state['MemoryCurrent']}"
            own = self.machine.run(f"python3 -Sc '{OWN_MEMORY}' {words}").output
            self.told.memory_bytes[part] = int(own)

    def reload(self) -> None:
        """A good file, bad ones, and good again."""
        fast = {"meter": {"interval": "2s", "memory_sample": "500ms"}}
        self.site.configure("agent", SETTINGS["agent"] | fast)
        self.machine.run("systemctl reload weighbridge-agent")
        for part, port in (("agent", AGENT_PORT), ("collector", COLLECTOR_PORT)):
            self.machine.run(f"echo 'nonsense: 1' >/etc/weighbridge/{part}.d/zz.yaml")
            done = self.machine.run(f"systemctl reload weighbridge-{part}", check=False)
            metric = self.site.metric(port, f"weighbridge_{part}_reload_failed")
            status = self.site.unit(part, "StatusText", "ActiveState")
            self.told.reload[part] = (
                done.code != 0,
                metric,
                status["ActiveState"],
                "nonsense" in status["StatusText"],
            )
            self.machine.run(f"rm /etc/weighbridge/{part}.d/zz.yaml; systemctl reload weighbridge-{part}")
            self.told.reload[f"{part} again"] = self.site.metric(port, f"weighbridge_{part}_reload_failed")

    def stop_dead_and_kill(self) -> None:
        """Both stand still until the watchdog ends them; then both are killed."""
        drop_in = "/run/systemd/system/weighbridge-$p.service.d"
        self.machine.run(
            f"for p in agent collector; do mkdir -p {drop_in}; printf '[Service]\\nWatchdogSec=15s\\n' >{drop_in}/w.conf; done\n"
            "systemctl daemon-reload; systemctl restart weighbridge-collector weighbridge-agent",
            seconds=300,
        )
        pids = "$(systemctl show -P MainPID weighbridge-agent) $(systemctl show -P MainPID weighbridge-collector)"
        for number, how in enumerate(("STOP", "KILL"), start=1):
            self.machine.run(f"kill -{how} {pids}")
            self.wait_restarts(number)
        self.machine.run("rm -r /run/systemd/system/weighbridge-*.service.d; systemctl daemon-reload")

    def wait_restarts(self, count: int) -> None:
        for part in ("agent", "collector"):
            now = f"systemctl show -P NRestarts -P ActiveState weighbridge-{part} | tr '\\n' ' '"
            self.site.wait(f'[ "$({now})" = "{count} active " ] || [ "$({now})" = "active {count} " ]', 300)
            self.told.restarts[f"{part} {count}"] = self.site.unit(part, "NRestarts")["NRestarts"]

    def fill_disk(self) -> None:
        # Most at once; and then to the last block, which others are after, too.
        self.machine.run(
            "mkdir /full; fallocate -l $(($(df --output=avail -B1M / | tail -1) - 16))M /full/most\n"
            "cat /dev/zero 2>/dev/null >/full/rest || :"
        )
        self.wait_reason(COLLECTOR_PORT, "log_unavailable")
        self.told.trouble["full"] = self.site.reasons(COLLECTOR_PORT)
        # No restart: systemd 252 makes a directory in /tmp for PrivateDevices, and starts nothing without room for it.
        self.machine.run("rm -r /full")
        self.site.wait_ready()

    def mount_read_only(self) -> None:
        """Under everybody's feet, as after an error; and writes go on succeeding."""
        self.machine.run(
            "sync; echo u >/proc/sysrq-trigger; until ! touch /var/x 2>/dev/null; do sleep 0.2; done"
        )
        self.wait_reason(AGENT_PORT, "spool_unavailable")
        self.told.trouble["read-only"] = self.site.reasons(AGENT_PORT)
        self.machine.run("mount -o remount,rw /")
        self.site.wait_ready()

    def set_clock(self) -> None:
        """Three hours forward and, with the next command, back. What was rejected as lying in the future is let in."""
        self.machine.run(f"date -s '+3 hours' >/dev/null; python3 -Sc '{WAIT_INTERVALS}' 2", seconds=300)
        self.site.wait("journalctl -q -b -o cat -u weighbridge-agent | grep -q clock_set_back")
        self.site.wait_ready()
        self.site.configure("collector", SETTINGS["collector"] | {"validation": {"clock_ahead": "4h"}})
        self.machine.run(
            "systemctl stop weighbridge-collector\n"
            "weighbridge-collector log readmit --reason clock_skew\n"
            "systemctl start weighbridge-collector",
            seconds=300,
        )
        self.site.configure("collector", SETTINGS["collector"])

    def change_versions(self) -> None:
        """N-1 -> N -> N-1, while cgroups come and go."""
        for revision in (NEW, OLD):
            with self.lives.meanwhile(SHORT_LIVES // 2):
                manage(self.machine, f"dpkg --install {revision}/*.deb", 600)
        self.told.short_lives = self.lives.used_ns
        self.site.wait_ready()

    def take_figures(self, directory: Path) -> None:
        """Of what stands still by now, and what was delivered of it: at the shutdown some of it runs once more."""
        # What the short lives left in the page cache keeps them from being released.
        self.machine.run("systemctl kill --signal=STOP burner; sleep 1; echo 3 >/proc/sys/vm/drop_caches")
        self.told.figures = figures(self.machine, self.cgroups)
        names = " ".join(CONTAINERS)
        stats = self.machine.run(
            f"podman stats --no-stream --format '{{{{.Name}}}} {{{{.CPUNano}}}}' {names}"
        ).output
        self.told.podman_ns = {name: int(ns) for name, ns in map(str.split, stats.splitlines())}
        self.site.wait_intervals(2)
        self.site.wait("journalctl -q -b -o cat -u weighbridge-agent | grep -q certificate_renewed", 400)
        events = self.machine.run("journalctl -q -b -o cat -u weighbridge-agent").output
        self.told.renewals = events.count('"certificate_renewed"')
        self.told.metered = Delivered.of(self.machine.get(LOG, directory))

    def boot_anew(self) -> None:
        self.machine.reboot(seconds=600)
        self.site.wait_ready()
        entered = {
            unit: int(self.machine.run(f"systemctl show -P {when}TimestampMonotonic {unit}").output)
            for unit, when in (
                ("run-weighbridge-bpf.mount", "ActiveEnter"),
                ("weighbridge-probes.service", "ActiveEnter"),
                ("weighbridge-agent.service", "ExecMainStart"),
            )
        }
        self.told.boot_order = sorted(entered, key=entered.__getitem__)
        self.told.status["booted"] = self.site.fetch(AGENT_PORT, "/metrics")

    def remove_and_purge(self, directory: Path) -> None:
        names = "weighbridge-agent weighbridge-collector"
        places = (
            "/var/lib/weighbridge/* /var/lib/weighbridge-collector/* /etc/weighbridge/* /usr/lib/weighbridge"
        )
        kept = f"ls -d {places} 2>/dev/null || :"
        manage(self.machine, f"dpkg --remove {names}")
        self.told.left["removed"] = self.machine.run(kept).output
        self.told.log = self.machine.get(LOG, directory)
        self.told.left["programs"] = self.machine.run(
            "bpftool prog show | grep -c weighbridge || :"
        ).output.strip()
        manage(self.machine, f"dpkg --purge {names}")
        self.told.left["purged"] = self.machine.run(kept).output
        self.told.left["units"] = self.machine.run(
            "systemctl list-units --all --no-legend 'weighbridge-[acp]*'"
        ).output
        self.told.delivered = Delivered.of(self.told.log)

    def wait_reason(self, port: int, reason: str) -> None:
        self.site.wait(f"python3 -Sc '{FETCH}' http://127.0.0.1:{port}/readyz | grep -q {reason}", 300)


@pytest.fixture(scope="module")
def told(
    new_machine: NewMachine, short_lives_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Told]:
    with new_machine() as machine:
        life = Life(machine, ShortLives(machine, short_lives_program))
        life.install()
        life.run_containers()
        life.first_usage()
        life.look()
        life.reload()
        life.stop_dead_and_kill()
        life.fill_disk()
        life.mount_read_only()
        life.set_clock()
        life.change_versions()
        life.take_figures(tmp_path_factory.mktemp("figures"))
        life.boot_anew()
        life.remove_and_purge(tmp_path_factory.mktemp("collector"))
        yield life.told


def test_a_fresh_machine_delivers_attributed_usage_after_five_commands(told: Told) -> None:
    assert told.commands == 5
    assert '"globex"' in told.first_rows


def test_the_units_are_sandboxed_and_no_daemon_has_a_capability(told: Told) -> None:
    assert set(told.exposure) == {"probes", "agent", "collector"}
    assert max(told.exposure.values()) <= EXPOSURE, told.exposure
    assert told.capabilities == {0}


def test_the_daemons_are_as_small_as_promised_by_systemds_own_account(told: Told) -> None:
    """MemoryCurrent without the page cache, which goes when somebody needs the memory."""
    assert 0 < told.memory_bytes["agent"] <= AGENT_MIB * MEBIBYTE, told.memory_bytes
    assert 0 < told.memory_bytes["collector"] <= COLLECTOR_MIB * MEBIBYTE, told.memory_bytes


def test_systemctl_status_says_in_a_line_what_a_daemon_does(told: Told) -> None:
    assert re.fullmatch(r"metering \d+ units, delivering to 127\.0\.0\.1:9460", told.status["agent"])
    assert told.status["collector"] == "1 agents connected, 1 streams known"


@pytest.mark.parametrize("part", ["agent", "collector"])
def test_a_bad_file_fails_the_reload_shows_and_leaves_the_daemon_as_it_was(told: Told, part: str) -> None:
    assert told.reload[part] == (True, 1.0, "active", True)
    assert told.reload[f"{part} again"] == 0.0


@pytest.mark.parametrize("part", ["agent", "collector"])
def test_a_daemon_that_stands_still_is_restarted_as_one_that_was_killed(told: Told, part: str) -> None:
    assert (told.restarts[f"{part} 1"], told.restarts[f"{part} 2"]) == ("1", "2")


def test_a_disk_that_is_full_or_read_only_is_said_and_mended_by_nothing_but_the_disk(told: Told) -> None:
    assert "METER-001" in told.trouble["full"]["log_unavailable"]
    assert "METER-002" in told.trouble["read-only"]["spool_unavailable"]


def test_certificates_are_renewed_under_way(told: Told) -> None:
    assert told.renewals >= 1


def test_at_boot_the_probes_come_before_the_agent_and_nobody_waits_for_a_network(told: Told) -> None:
    units = ["run-weighbridge-bpf.mount", "weighbridge-probes.service", "weighbridge-agent.service"]
    assert told.boot_order == units
    assert re.search(r'^weighbridge_agent_probes\{.*state="attached"', told.status["booted"], re.MULTILINE)


@pytest.mark.parametrize("name", [*CONTAINERS, "burner"])
def test_a_workload_is_delivered_as_kernel_and_podman_counted_it(told: Told, name: str) -> None:
    figure = told.figures[name]
    cpu_ns = figure.keyed("cpu.stat", "usage_usec") * 1_000
    assert told.metered.measured(figure.cgroup_id, "cpu_usage_ns") == cpu_ns > 0
    if name in CONTAINERS:
        # podman's is the kernel's, of the container's cgroup within the scope.
        assert 0 <= cpu_ns - told.podman_ns[name] <= cpu_ns * 0.05 + 50_000_000
    if name == "oom":
        assert (
            told.metered.measured(figure.cgroup_id, "oom_kills")
            == figure.keyed("memory.events", "oom_kill")
            > 0
        )
    if name == "talker":
        sent = told.metered.measured(figure.cgroup_id, "net_tx_loopback_bytes")
        assert sent >= MEBIBYTE // 2


def test_each_short_life_is_delivered_once_while_versions_change(told: Told) -> None:
    assert len(told.short_lives) == SHORT_LIVES
    for cgroup_id, usage_ns in told.short_lives.items():
        assert told.delivered.ends(cgroup_id) == 1
        assert abs(told.delivered.measured(cgroup_id, "cpu_usage_ns") - usage_ns) <= 1_000


def test_a_clock_set_back_is_followed_in_an_epoch_of_its_own(told: Told) -> None:
    """Ahead by three hours for some intervals, in the epoch that was; at the right time in the next one."""
    first, second = sorted({batch.epoch for batch in told.delivered.batches})
    ends = {batch.interval_end_unix_ns for batch in told.delivered.batches if batch.epoch == first}
    begins = {batch.interval_start_unix_ns for batch in told.delivered.batches if batch.epoch == second}
    assert max(ends) - min(begins) > 2 * HOUR_NS


def test_nothing_is_lost_or_twice_in_the_whole_life(told: Told) -> None:
    verdict = verify(told.log)
    assert verdict.sound, verdict
    assert not verdict.missing
    assert not verdict.duplicates
    assert told.delivered.counter_resets() == 0


def test_a_removal_keeps_the_state_and_a_purge_takes_it(told: Told) -> None:
    removed = told.left["removed"]
    for kept in (
        "/var/lib/weighbridge/spool.db",
        "/var/lib/weighbridge/identity.json",
        "/var/lib/weighbridge-collector/ca",
    ):
        assert kept in removed
    assert "/usr/lib/weighbridge" not in removed.split()
    assert told.left["purged"] == ""
    assert told.left["units"] == ""
    assert told.left["programs"] == "0"
