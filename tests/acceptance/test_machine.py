"""The rig itself: what a test may rely on, and that nothing of a machine outlives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.acceptance.conftest import NewMachine
from tests.acceptance.machines.cache import Cache
from tests.acceptance.machines.machine import CommandFailed, Machine

ROOT = Path(__file__).parent.parent.parent
HOLD_A_MACHINE = """
import time
from tests.acceptance.machines.snapshot import machine_from, snapshot
with snapshot() as source, machine_from(source) as machine:
    print(machine._qemu.process.pid, flush=True)
    time.sleep(600)
"""


def emulators() -> dict[int, Path]:
    """Processes whose disk lies among the runs of our cache, and the directory of each; those of other test runs, too."""
    runs = Cache().directory / "runs"
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if at := re.search(rf"{re.escape(str(runs))}/(\w+)", words):
            found[int(process.name)] = runs / at[1]
    return found


def test_the_machine_is_what_this_development_host_may_not_be(machine: Machine) -> None:
    """Its own 6.1, systemd as pid 1, one v2 hierarchy with every controller, BTF and room for BPF pins."""
    said = machine.run(
        "uname -r; cat /proc/1/comm; stat -f -c %T /sys/fs/cgroup; cat /sys/fs/cgroup/cgroup.controllers; "
        "head -c 2 /sys/kernel/btf/vmlinux | od -An -tx1; stat -f -c %T /sys/fs/bpf; systemctl is-system-running; "
        "podman image exists localhost/busybox:1; ls /sys/fs/cgroup/cpu.pressure; id -u"
    ).output.split("\n")
    assert said[0].startswith("6.1.")
    assert said[1:3] == ["systemd", "cgroup2fs"]
    assert {"cpu", "io", "memory", "pids"} <= set(said[3].split())
    assert said[4:9] == [" 9f eb", "bpf_fs", "running", "/sys/fs/cgroup/cpu.pressure", "0"]


def test_a_command_gives_its_output_its_errors_and_its_exit_status(machine: Machine) -> None:
    done = machine.run('echo "$WORD"; echo wrong >&2; exit 3', check=False, environment={"WORD": "a b"})
    assert (done.code, done.output, done.errors) == (3, "a b\n", "wrong\n")
    with pytest.raises(CommandFailed, match="exit status 1 of: false"):
        machine.run("false; true")
    assert machine.run("sleep 600", seconds=1, check=False).code == 124
    assert machine.run("seq 1 200000 | tail -n 1").output == "200000\n"


def test_what_a_command_starts_ends_with_it_unless_systemd_started_it(machine: Machine) -> None:
    machine.run(
        "sleep 601 & systemd-run --quiet --unit=sleeper sleep 602; podman run -d --network none localhost/busybox:1 sleep 603"
    )
    running = machine.run("ps -eo args | grep -E '(^|/)sleep 60[0-9]$' || :").output
    assert sorted(line.split("/")[-1] for line in running.splitlines()) == ["sleep 602", "sleep 603"]


def test_files_and_directories_go_in_and_come_out_as_they_are(machine: Machine, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below/bytes").write_bytes(os.urandom(300_000))
    (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "run.sh").chmod(0o755)
    machine.put(tree, "/opt/a/copy")
    assert machine.run("/opt/a/copy/run.sh").output == "ran\n"
    back = machine.get("/opt/a/copy", tmp_path / "back")
    assert (back / "below/bytes").read_bytes() == (tree / "below/bytes").read_bytes()
    machine.run(
        "head -c 4M /dev/zero >/opt/grows\n"
        "systemd-run --quiet sh -c 'while :; do echo more; done >>/opt/grows'\n"
        "until [ $(stat -c %s /opt/grows) -gt 4194304 ]; do sleep 0.1; done"
    )
    grown = machine.get("/opt/grows", tmp_path / "back").read_bytes()
    assert grown[: 4 << 20].count(0) == 4 << 20
    assert grown[4 << 20 :].startswith(b"more\n")
    with pytest.raises(CommandFailed, match="/nowhere"):
        machine.get("/nowhere", tmp_path)
    assert machine.run("echo still there").output == "still there\n"


def test_machines_share_nothing_and_are_gone_also_after_a_failure(new_machine: NewMachine) -> None:
    with pytest.raises(ZeroDivisionError), new_machine() as one, new_machine() as other:
        one.run("echo one >/root/mine; sync")
        assert other.run("cat /root/mine", check=False).code == 1
        assert abs(float(one.run("date +%s.%N").output) - time.time()) < 60, "a restored clock is set"
        ours = {each._qemu.process.pid for each in (one, other)}
        assert len(ours & emulators().keys()) == 2
        raise ZeroDivisionError
    assert not ours & emulators().keys()


def test_a_machine_dies_with_a_test_run_that_is_killed(new_machine: NewMachine) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD_A_MACHINE], cwd=ROOT, stdout=subprocess.PIPE) as run:
        assert run.stdout
        qemu = int(run.stdout.readline())
        directory = emulators()[qemu]
        run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while qemu in emulators():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with new_machine():
        assert not directory.exists(), "what a killed run left on the disk goes with the next one"


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_without_what_it_takes_tests_are_skipped_by_name_but_never_in_ci(
    ci: str, outcome: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::{PROBE}", "-rs"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "CI": ci},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome in done.stdout.splitlines()[-1]
    assert "virtual machines need e2fsprogs, mmdebstrap" in done.stdout


PROBE = test_the_machine_is_what_this_development_host_may_not_be.__name__
