"""What engine bcc needs of the host, and what it says where that is missing."""

from __future__ import annotations

import platform
import subprocess

import pytest

from agent import doctor
from agent.read.probes.reader import Probes
from bench import bcc
from bench.cgroups import Cgroup
from bench.probe_set import ProbeSet
from tests.probes.conftest import needs_bcc
from tests.probes.holding import births

pytestmark = [pytest.mark.root, pytest.mark.timeout(300), needs_bcc]


def test_a_second_helper_is_refused(pins: ProbeSet) -> None:
    with bcc.helper(pins):
        second = subprocess.run(bcc.command(pins), capture_output=True, text=True)
        assert second.returncode == 1
        assert "its helper is running: end it first" in second.stderr
        assert pins.status()["engine"] == "bcc"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ([f"mount -t tmpfs tmpfs {bcc.MODULES}"], f"apt-get install linux-headers-{platform.release()}"),
        (
            bcc.headers_in_place("6.1.0-other"),
            f"holds headers of 6.1.0-other, but {platform.release()} is running",
        ),
        (["mount -t tmpfs tmpfs /usr/lib/python3/dist-packages/bcc"], "apt-get install python3-bpfcc"),
    ],
    ids=["no headers", "headers of another kernel", "no python3-bpfcc"],
)
def test_what_the_host_lacks_is_named_with_its_fix_and_nothing_is_left(
    pins: ProbeSet, before: list[str], said: str
) -> None:
    refused = subprocess.run(bcc.command(pins, before=before), capture_output=True, text=True)
    assert refused.returncode == 1
    assert said in refused.stderr
    assert not pins.pins.exists()


def test_a_lacking_capability_is_named(pins: ProbeSet) -> None:
    lacking = ["setpriv", "--bounding-set=-all,+bpf,+perfmon", "--inh-caps=-all"]
    refused = subprocess.run(bcc.command(pins, prefix=lacking), capture_output=True, text=True)
    assert refused.returncode == 1
    assert "CAP_NET_ADMIN is missing" in refused.stderr
    assert not pins.pins.exists()


def without_tracefs() -> list[str]:
    """Commands that hide it, and the capabilities that do not suffice to mount it."""
    hide = [f"! mountpoint -q {d} || umount -l {d}" for d in ("/sys/kernel/debug", "/sys/kernel/tracing")]
    kept = "-all,+bpf,+perfmon,+net_admin"
    bounded = ["setpriv", f"--bounding-set={kept}", f"--inh-caps={kept}"]
    return ["sh", "-c", "; ".join([*hide, 'exec "$@"']), "sh", *bounded]


def test_without_tracefs_and_the_right_to_mount_it_the_network_is_counted_all_the_same(
    pins: ProbeSet,
) -> None:
    with bcc.helper(pins, prefix=without_tracefs()) as helper:
        assert "mount -t tracefs tracefs /sys/kernel/tracing" in helper.said
        status = pins.status()
        assert (status["lifecycle"], status["network"]) == (False, True)
        probes = Probes(pins.directory)
        try:
            probes.look()
            found = doctor._probes(probes)
            assert found.level == "warning"
            assert "ends of containers not seen: the journal of the unit" in found.text
        finally:
            probes.close()


def test_programs_that_cannot_be_replaced_stay(pins: ProbeSet, ours: Cgroup) -> None:
    with bcc.helper(pins) as first:
        assert first.end() == 0
    with bcc.helper(pins, prefix=without_tracefs()) as second:
        assert "lifecycle.bcc.c: refused, so the earlier programs stay" in second.said
        assert ours.child("wb-unit.scope").cgroup_id in births(pins)
        assert pins.status()["lifecycle"]


def test_three_capabilities_are_enough_where_tracefs_is_mounted(pins: ProbeSet) -> None:
    kept = "-all,+bpf,+perfmon,+net_admin"
    there = "mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing"
    mount = f'{{ {there}; }} && exec "$@"'
    bounded = ["sh", "-c", mount, "sh", "setpriv", f"--bounding-set={kept}", f"--inh-caps={kept}"]
    with bcc.helper(pins, prefix=bounded):
        assert (pins.status()["lifecycle"], pins.status()["network"]) == (True, True)


def test_a_helper_that_is_not_there_is_named(pins: ProbeSet) -> None:
    done = subprocess.run(
        bcc.command(pins, "--bcc-helper", "/nonexistent/helper"), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "/nonexistent/helper: No such file or directory" in done.stderr
    assert not pins.pins.exists()


def test_a_wrong_engine_is_wrong_usage() -> None:
    done = subprocess.run([str(bcc.LOADER), "load", "--engine", "steam"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--engine is core or bcc, not steam" in done.stderr


def test_the_engine_alone_stands_for_loading_it(pins: ProbeSet) -> None:
    words = bcc.command(pins, before=[f"mount -t tmpfs tmpfs {bcc.MODULES}"])
    words.remove("load")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "engine bcc:" in done.stderr
