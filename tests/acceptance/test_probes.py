"""The prebuilt probes on a kernel they were not built on."""

from __future__ import annotations

from tests.acceptance.machines.machine import Machine
from tests.acceptance.probes import Probes

CGROUPS = 20
SHORT_LIVES = f"""
for i in $(seq {CGROUPS}); do
    mkdir /sys/fs/cgroup/short-$i
    sh -c "echo \\$\\$ >/sys/fs/cgroup/short-$i/cgroup.procs; exec true"
    rmdir /sys/fs/cgroup/short-$i
done
"""


def test_the_probes_load_record_every_short_life_and_leave_nothing(machine: Machine) -> None:
    with Probes(machine) as probes:
        assert probes.programs() == []
        probes.command("load")
        loaded = probes.status()
        assert (loaded["lifecycle"], loaded["network"]) == (True, True)
        assert loaded["walk"] in {"css", "iterator", "table"}
        machine.run(SHORT_LIVES)
        after = probes.status()
        ended = after["maps"]["tombstones"]["elements"] - loaded["maps"]["tombstones"]["elements"]
        # What the rig itself starts for a command ends too.
        assert ended >= CGROUPS
        assert not any(after["overflow"].values())
