"""From packages to a restored machine in three steps, the first two of which are done once.

Debian image  --boot, prepare.sh-->  snapshot (overlay disk + memory and devices)  --restore-->  machine
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.machines.cache import Cache, Unavailable, build_step, key_of
from tests.acceptance.machines.initrd import guest_files, initrd
from tests.acceptance.machines.machine import Machine
from tests.acceptance.machines.qemu import HERE, Emulator, MachineError, Qemu, emulator

BOOT_SECONDS = 300
STABLE, BACKPORTS = "stable", "backports"
"""The image's kernels: Debian 12's own, and the one that its backports have."""
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "zstd": "zstd",
    "xzcat": "xz-utils",
    "setpriv": "util-linux",
    "tar": "tar",
}
"""What building and restoring need on the PATH, and the packages that have it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    emulator: Emulator
    image: Path
    kernel: str
    directory: Path
    cache: Cache


@contextmanager
def snapshot(kernel: str = STABLE) -> Iterator[Snapshot]:
    """The booted, prepared machine, made if it is not in the cache. Unavailable where that is not possible."""
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise Unavailable(f"virtual machines need {', '.join(missing)}: run ./dev setup as root")
    cache = Cache()
    key = key_of(HERE / "image.sh", HERE / "mirror.sh")
    with emulator(cache) as found, cache.entry("debian", key, _build_image) as image:
        key = key_of(found.shape, image / "identity", *guest_files())

        def boot(directory: Path) -> None:
            _boot(found, cache, image, kernel, directory)

        with cache.entry(f"booted_{kernel}", key, boot) as directory:
            yield Snapshot(found, image, kernel, directory, cache)


@contextmanager
def machine_from(source: Snapshot) -> Iterator[Machine]:
    """A machine of its own that goes on from the snapshot, and is gone afterwards."""
    with source.cache.run_directory() as run:
        overlay = run / "disk.qcow2"
        source.emulator.overlay(source.directory / "disk.qcow2", "qcow2", overlay)
        files = (source.image / source.kernel / "vmlinuz", source.directory / "initrd")
        qemu = Qemu(source.emulator, run, overlay, *files, source.directory / "state.zst")
        try:
            qemu.wait_status("query-status", "paused")
            qemu.ask("cont")
            yield Machine(qemu)
        finally:
            qemu.kill()


def _build_image(directory: Path) -> None:
    build_step([HERE / "image.sh", directory])
    # Another build has other blocks on its disk: snapshots over this one are no use over that one.
    (directory / "identity").write_text(uuid.uuid4().hex)


def _boot(emulator: Emulator, cache: Cache, image: Path, kernel: str, directory: Path) -> None:
    began = time.monotonic()
    overlay, state = directory / "disk.qcow2", directory / "state.zst"
    emulator.overlay(image / "root.img", "raw", overlay)
    (directory / "initrd").write_bytes(initrd(image, kernel))
    with cache.run_directory() as run:
        qemu = Qemu(emulator, run, overlay, image / kernel / "vmlinuz", directory / "initrd", None)
        try:
            machine = Machine(qemu)
            facts = machine.wait_ready(BOOT_SECONDS)
            if facts["state"] != "running":
                failed = machine.run(
                    "systemctl --failed --no-legend; journalctl -b -p warning -n 30", check=False
                )
                raise MachineError(f"the guest came up {facts['state']}: {failed.output}")
            machine.run("/usr/local/lib/weighbridge-rig/prepare.sh", seconds=BOOT_SECONDS)
            qemu.ask("stop")
            qemu.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 33})
            qemu.ask("migrate", uri=f"exec:zstd -q -1 -T2 > '{state}'")
            qemu.wait_status("query-migrate", "completed")
            qemu.ask("quit")
            qemu.process.wait(60)
        finally:
            qemu.kill()
    facts["seconds"] = round(time.monotonic() - began, 1)
    (directory / "facts.json").write_text(json.dumps(facts))
