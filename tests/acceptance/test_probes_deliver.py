"""An agent without any privilege and the kernel probes, on Debian 12's 6.1 with pure cgroup v2 and every controller.

Cgroups are made by the test, so that it can read their files just before it removes them; containers and services are
made by podman and systemd. Some end under a running agent, some while none runs, and the probes are unloaded and loaded
again under it. What was delivered then has to be what the kernel said.
"""

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
from tests.acceptance.inside.talk import ANSWER_BYTES, DATAGRAM_BYTES, DATAGRAMS, QUESTION_BYTES, QUESTIONS
from tests.acceptance.kernel_figures import Figures, figures
from tests.acceptance.machines.machine import Machine
from tests.acceptance.machines.snapshot import BACKPORTS, STABLE
from tests.acceptance.probes import PINS, Probes
from tests.acceptance.short_lives import DIRECTORY as OURS
from tests.acceptance.short_lives import ShortLives
from tests.acceptance.weighbridge import HOME, Weighbridge
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb

INSIDE = "/opt/inside"
ETHERNET_HEADER, TCP_HEADERS, UDP_HEADERS = 14, 20 + 20, 20 + 8
SEEN = pb.COVERAGE_EXITS | pb.COVERAGE_NETWORK
SETTINGS = {"meter": {"interval": "2s", "memory_sample": "500ms"}, "owners": {"default": "platform"}}

LIVES_WATCHED, LIVES_UNWATCHED, LIVES_AFTER_RELOAD = 60, 30, 10
OOM_MAX, PEAK_MAX, PEAK_MIB = str(16 << 20), str(64 << 20), 24
ENDS = {
    "oom": (OOM_MAX, "sleep 600 & dd if=/dev/zero of=/dev/null bs=64M count=1"),
    "peak": (PEAK_MAX, f"dd if=/dev/zero of=/dev/null bs={PEAK_MIB}M count=1"),
}
LIVING = (
    "for i in 1 2 3; do sleep 2 & done; "
    "dd if=/dev/zero of=/var/tmp/blocks bs=64k count=64 oflag=direct; "
    "dd if=/var/tmp/blocks of=/dev/null bs=64k iflag=direct; "
    "dd if=/dev/zero of=/dev/null bs=64M count=1; "
    "seq 50000 | md5sum; wait; exec sleep 86400"
)
LIVING_LIMITS = "CPUQuota=30% MemoryMax=48M TasksMax=20 OOMPolicy=continue IOAccounting=yes"
CALLER = f"--volume /usr:/usr --volume /lib:/lib --volume /lib64:/lib64 --volume {INSIDE}:{INSIDE} localhost/busybox:1"
# A pair into the caller's namespace, on which nothing speaks but its sockets: no IPv6, no ARP.
CONNECT = """
read -r pid </sys/fs/cgroup/machine.slice/libpod-$CALLER.scope/container/cgroup.procs
inside="nsenter --net --target $pid"
for where in "" "$inside"; do $where sysctl -qw net.ipv6.conf.default.disable_ipv6=1; done
ip link add pair0 address 02:00:00:00:00:01 type veth peer name pair1 address 02:00:00:00:00:02
ip link set pair1 netns $pid
ip address add 198.51.100.1/24 dev pair0
ip link set pair0 up
ip neighbour replace 198.51.100.2 lladdr 02:00:00:00:00:02 dev pair0 nud permanent
$inside ip link set pair1 up
$inside ip neighbour replace 198.51.100.1 lladdr 02:00:00:00:00:01 dev pair1 nud permanent
$inside ip address add 198.51.100.2/24 dev pair1
"""
PAIR = "cd /sys/class/net/pair0/statistics; grep -H '' rx_bytes tx_bytes rx_packets tx_packets"
QUIET_PAIR = f'until a=$({PAIR}); sleep 1; [ "$a" = "$({PAIR})" ]; do :; done; {PAIR}'


@dataclass(slots=True)
class Told:
    """What the kernel and the agent said while the machine ran, and what came of it."""

    short_lives: dict[int, int] = field(default_factory=dict)
    """Cgroup id -> CPU ns of cpu.stat just before the removal."""
    ends: dict[str, dict[str, int]] = field(default_factory=dict)
    pins_before: str = ""
    pins_after: str = ""
    credentials: dict[str, list[str]] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    statuses: list[dict[str, Any]] = field(default_factory=list)
    """With the probes, without them, with them again."""
    metrics: list[str] = field(default_factory=list)
    living: dict[str, Any] = field(default_factory=dict)
    """See inside/rows.py."""
    pair: dict[str, int] = field(default_factory=dict)
    podman_id: str = ""
    figures: dict[str, Figures] = field(default_factory=dict)
    journal: str = ""
    log: Path = Path()
    delivered: Delivered = field(default_factory=lambda: Delivered([]))


class Run:
    """The steps, in one machine."""

    def __init__(self, machine: Machine, probes: Probes, installed: Weighbridge, lives: ShortLives) -> None:
        self.machine, self.probes, self.installed = machine, probes, installed
        self.told = Told()
        self.lives = lives

    def prepare(self) -> None:
        self.machine.put(Path(__file__).parent / "inside", INSIDE)
        self.machine.run(
            f"echo '+memory +pids' >{OURS}/cgroup.subtree_control\n"
            # Whoever reads a program first is charged for its pages, and is not released while they are there.
            "dd if=/dev/zero of=/dev/null count=1; sleep 0"
        )

    def end(self, suffix: str) -> None:
        """One of each of ENDS."""
        for number, (name, (limit, command)) in enumerate(ENDS.items()):
            cgroup = f"{OURS}/docker-{suffix:e<60}{number:04d}.scope"
            said = self.machine.run(f"python3 -S {INSIDE}/life.py {cgroup} {limit} '{command}'").output
            self.told.ends[f"{name} {suffix}"] = json.loads(said)

    def look_at_the_agent(self) -> None:
        self.told.pins_after = self.pins()
        pid = self.machine.run("systemctl show -P MainPID weighbridge-agent").output.strip()
        lines = self.machine.read(f"/proc/{pid}/status").splitlines()
        self.told.credentials = {
            name: words.split() for name, words in (line.split(":", 1) for line in lines)
        }
        self.told.loader = self.probes.status()
        page = "http://127.0.0.1:9465/metrics"
        fetch = f'import urllib.request as u; print(u.urlopen("{page}", timeout=30).read().decode())'
        self.told.metrics = self.machine.run(f"python3 -Sc '{fetch}'").output.splitlines()
        self.ask_status()

    def ask_status(self) -> None:
        self.told.statuses.append(json.loads(self.installed.command("agent", "status --json")))

    def pins(self) -> str:
        """Who may do what with each pin."""
        return self.machine.run(f"find {PINS} -printf '%M %u %g %P\\n' | sort").output

    def start_the_living(self) -> None:
        limits = " ".join(f"--property={limit}" for limit in LIVING_LIMITS.split())
        self.machine.run(
            f"systemd-run --quiet --unit=talk-server python3 -S {INSIDE}/talk.py serve /run/talked\n"
            f"systemd-run --quiet --unit=living {limits} bash -c '{LIVING}'"
        )
        words = f"/usr/bin/python3 -S {INSIDE}/talk.py call"
        said = self.machine.run(f"podman run -d --network none --name caller {CALLER} {words}").output
        self.told.podman_id = said.strip()
        self.machine.run(CONNECT, environment={"CALLER": self.told.podman_id})

    def compare_the_living(self) -> None:
        procs = "/sys/fs/cgroup/system.slice/living.service/cgroup.procs"
        self.installed.wait("[ -e /run/talked ]")
        self.installed.wait(f'[ "$(xargs -I% cat /proc/%/comm <{procs})" = sleep ]')
        command = f"env PYTHONPATH={HOME}/agent python3 {INSIDE}/rows.py /system.slice/living.service"
        self.told.living = json.loads(self.machine.run(f"cd /; runuser -u weighbridge -- {command}").output)
        lines = self.machine.run(QUIET_PAIR).output.splitlines()
        self.told.pair = {name: int(value) for name, value in (line.split(":") for line in lines)}

    def unload_and_load(self) -> None:
        self.probes.command("unload")
        self.installed.wait_intervals(2)
        self.ask_status()
        self.probes.command("load")
        self.installed.wait_intervals(2)
        self.ask_status()

    def finish(self, directory: Path) -> None:
        # What the short lives left in the page cache keeps them from being released.
        self.machine.run("echo 3 >/proc/sys/vm/drop_caches")
        self.told.short_lives = self.lives.used_ns
        self.installed.wait_intervals(2)
        paths = {
            "living": "/system.slice/living.service",
            "server": "/system.slice/talk-server.service",
            "caller": f"/machine.slice/libpod-{self.told.podman_id}.scope",
        }
        self.told.figures = figures(self.machine, paths)
        self.machine.run("systemctl stop weighbridge-agent")
        self.told.journal = self.machine.run("journalctl -q -b -o cat -u weighbridge-agent").output
        self.told.log = self.machine.get("/var/lib/weighbridge-collector/log", directory)
        self.told.delivered = Delivered.of(self.told.log)


WALKS = {STABLE: ("iterator", "cgroup_iterator"), BACKPORTS: ("css", "css")}
"""What a kernel's probes walk the cgroups with, in the loader's word and in the agent's."""


@pytest.fixture(scope="module", params=WALKS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def told(
    kernel: str, new_machine: NewMachine, short_lives_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Told]:
    with new_machine(kernel) as machine:
        installed = Weighbridge(machine)
        installed.install()
        installed.configure("agent", SETTINGS)
        with Probes(machine) as probes:
            run = Run(machine, probes, installed, ShortLives(machine, short_lives_program))
            run.prepare()
            probes.command("load")
            run.told.pins_before = run.pins()
            installed.start()
            run.look_at_the_agent()
            run.start_the_living()
            run.lives.live(LIVES_WATCHED)
            run.end("watched")
            machine.run("systemctl stop weighbridge-agent")
            run.lives.live(LIVES_UNWATCHED)
            run.end("unwatched")
            machine.run("systemctl start weighbridge-agent")
            run.compare_the_living()
            installed.wait_intervals(2)
            run.unload_and_load()
            run.lives.live(LIVES_AFTER_RELOAD)
            run.finish(tmp_path_factory.mktemp("collector"))
        yield run.told


def test_the_agent_reads_the_probes_without_any_privilege(told: Told) -> None:
    assert told.credentials["Uid"] != ["0"] * 4
    assert {int(told.credentials[f"Cap{kind}"][0], 16) for kind in ("Inh", "Prm", "Eff", "Amb")} == {0}
    assert told.statuses[0]["probes"] == "attached"


def test_the_pins_are_still_roots_when_the_agent_has_started(told: Told) -> None:
    """Its unit's RuntimeDirectory lies around them."""
    assert told.pins_after == told.pins_before
    assert {line.split()[1] for line in told.pins_after.splitlines()} == {"root"}


def test_the_best_that_this_kernel_has_is_in_use_and_named(kernel: str, told: Told) -> None:
    walk, name = WALKS[kernel]
    assert told.loader["walk"] == walk
    assert (told.loader["lifecycle"], told.loader["network"]) == (True, True)
    assert told.statuses[0]["probes_walk"] == name
    (shown,) = (line for line in told.metrics if line.startswith("weighbridge_agent_probes{"))
    assert 'state="attached"' in shown
    assert f'walk="{name}"' in shown
    assert shown.endswith(" 1.0")


def test_every_short_life_is_delivered_once_and_exactly(told: Told) -> None:
    assert len(told.short_lives) == LIVES_WATCHED + LIVES_UNWATCHED + LIVES_AFTER_RELOAD
    for cgroup_id, usage_ns in told.short_lives.items():
        flags = told.delivered.flags(cgroup_id)
        assert [bool(flag & pb.ROW_FLAG_FINAL) for flag in flags] == [False] * (len(flags) - 1) + [True]
        assert not any(flag & pb.ROW_FLAG_TAIL_UNSEEN for flag in flags)
        assert abs(told.delivered.measured(cgroup_id, "cpu_usage_ns") - usage_ns) <= 1_000


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("suffix", ["watched", "unwatched"])
def test_the_last_row_has_the_peak_and_the_kills_as_the_files_said_them(
    told: Told, name: str, suffix: str
) -> None:
    said = told.ends[f"{name} {suffix}"]
    cgroup_id = said["cgroup_id"]
    flags = told.delivered.flags(cgroup_id)
    assert flags[-1] & pb.ROW_FLAG_FINAL
    assert not any(flag & pb.ROW_FLAG_TAIL_UNSEEN for flag in flags)
    for measure in ("memory_peak_bytes", "oom_kills"):
        assert told.delivered.measured(cgroup_id, measure) == said[measure], measure
    assert abs(told.delivered.measured(cgroup_id, "cpu_usage_ns") - said["cpu_usage_ns"]) <= 1_000
    if name == "oom":
        assert said["oom_kills"] >= 2, "killed as a whole"
    else:
        assert (said["oom_kills"], said["memory_peak_bytes"] > PEAK_MIB << 20) == (0, True)
    if suffix == "unwatched":
        assert len(told.delivered.rows(cgroup_id)) == 1


def test_a_row_of_the_snapshot_is_what_the_files_say_field_by_field(kernel: str, told: Told) -> None:
    living = told.living
    assert living["uid"] != 0
    assert living["walk"] == WALKS[kernel][1]
    assert len(living["knows"]) == len(set(living["knows"])) == 8
    files = living["files"]
    stat = [
        files[f"cpu.stat:{key}"] for key in ("usage_usec", "nr_periods", "nr_throttled", "throttled_usec")
    ]
    usage, user, system, *others = living["counters"]
    assert [usage // 1_000, *others[:2], others[2] // 1_000] == stat
    assert abs(usage - user - system) <= 1_000
    assert others[3] == files["memory.events:oom_kill"]
    assert [value // 1_000 for value in others[4:]] == [
        files[f"{resource}.pressure:{kind}"]
        for resource in ("cpu", "memory", "io")
        for kind in ("some", "full")
    ]
    assert living["memory"] == [files[f"memory.{name}"] for name in ("current", "peak", "max")]
    assert living["pids"] == [files["pids.current"], files["pids.peak"]]
    moved = {name for name, value in files.items() if value}
    wanted = {"cpu.stat:nr_throttled", "memory.events:oom_kill", "memory.current", "pids.peak"}
    assert moved >= wanted | {f"{resource}.pressure:some" for resource in ("cpu", "memory", "io")}
    assert files["memory.peak"] > files["memory.current"]
    assert files["pids.peak"] > files["pids.current"]


def test_a_living_cgroup_is_delivered_as_its_files_say_across_a_reload(told: Told) -> None:
    figures_now = told.figures["living"]
    expected = figures_now.measures()
    measured = {measure: told.delivered.measured(figures_now.cgroup_id, measure) for measure in expected}
    assert measured == expected
    assert min(expected["io_read_bytes"], expected["io_write_bytes"]) >= 64 * 65_536


def test_network_of_a_container_is_its_interfaces_to_the_byte(told: Told) -> None:
    caller, server = (
        {
            f"{direction}_{unit}": told.delivered.measured(
                told.figures[name].cgroup_id, f"net_{direction}_external_{unit}"
            )
            for direction in ("rx", "tx")
            for unit in ("bytes", "packets")
        }
        for name in ("caller", "server")
    )
    # The host's end of the pair receives what the container sends.
    for ours, pairs in (("tx", "rx"), ("rx", "tx")):
        packets = caller[f"{ours}_packets"]
        assert told.pair[f"{pairs}_packets"] == packets == server[f"{pairs}_packets"]
        assert told.pair[f"{pairs}_bytes"] == caller[f"{ours}_bytes"] + ETHERNET_HEADER * packets
        assert server[f"{pairs}_bytes"] == caller[f"{ours}_bytes"]
    assert caller["tx_bytes"] > QUESTIONS * (QUESTION_BYTES + TCP_HEADERS) + DATAGRAMS * (
        DATAGRAM_BYTES + UDP_HEADERS
    )
    assert caller["rx_bytes"] > QUESTIONS * (ANSWER_BYTES + TCP_HEADERS)


def test_an_unload_under_the_agent_clears_the_coverage_and_a_load_brings_it_back(told: Told) -> None:
    assert [status["probes"] for status in told.statuses] == ["attached", "absent", "attached"]
    covered = [batch.coverage & SEEN for batch in told.delivered.batches]
    changes = [now for before, now in zip([None, *covered], covered, strict=False) if now != before]
    assert changes == [SEEN, 0, SEEN]


def test_nothing_is_twice_or_negative_and_the_agent_complained_of_nothing_else(told: Told) -> None:
    verdict = verify(told.log)
    assert verdict.sound
    assert not verdict.missing
    assert not verdict.duplicates
    batches = told.delivered.batches
    assert told.delivered.counter_resets() == 0
    assert told.delivered.cpu_usage_ns() == told.delivered.host_cpu_usage_ns() > 0
    ended = [
        cgroup_id
        for batch in batches
        for cgroup_id, flag in zip(table_of(batch).cgroup_id, batch.row_flags, strict=True)
        if flag & pb.ROW_FLAG_FINAL
    ]
    assert len(ended) == len(set(ended))
    events = [json.loads(line) for line in told.journal.splitlines() if line.startswith("{")]
    loud = {event["event"] for event in events if event["level"] in ("warning", "error")}
    assert loud == {"probes_unavailable"}
