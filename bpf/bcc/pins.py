"""The set of pins that the loader prepared, and that the helper completes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import kernel
import records
from records import About

MAPS = ("births", "tombstones", "wake", "network", "classes", "class_changes", "overflow", "paths")
SCRATCH = ("new_birth", "new_tombstone", "recent_peers")
LINKS = ("link_on_mkdir", "link_on_rmdir", "link_on_release", "link_on_ingress", "link_on_egress")


class Pins:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.maps: Mapping[str, kernel.Map] = {
            name: kernel.Map(kernel.pinned(directory / name)) for name in (*MAPS, *SCRATCH)
        }
        records.check(self.maps)

    def has(self, name: str) -> bool:
        return (self.directory / name).exists()

    def put_link(self, link: int, name: str) -> None:
        """In the place of what may be there: at every instant one of the two is attached."""
        fresh = self.directory / f"{name}_new"
        fresh.unlink(missing_ok=True)
        kernel.pin(link, fresh)
        fresh.chmod(0o600)
        fresh.rename(self.directory / name)

    def remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def remove_foreign(self) -> None:
        """What another engine left and this one does not keep up to date: its way to walk, its snapshot."""
        for name in os.listdir(self.directory):
            if name not in (*MAPS, *SCRATCH, *LINKS, "about"):
                self.remove(name)

    def about(self) -> About | None:
        """None: not ready."""
        try:
            held = kernel.Map(kernel.pinned(self.directory / "about"))
        except FileNotFoundError:
            return None
        try:
            return About.parse(held.lookup(records.FIRST) or b"")
        finally:
            os.close(held.fd)

    def write_about(self, has: int, version: str) -> About:
        """Readers may begin. A set that was there before goes on counting: it stays the same load."""
        before, now = self.about(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        load_id = before.load_id if before else now
        about = About(records.LAYOUT, records.ENGINE_BCC, has, 0, load_id, now, version.encode()[:31])
        if before:
            self.change_about(about)
            return about
        held = kernel.create_array("about", records.ABOUT_BYTES)
        held.update(records.FIRST, about.pack())
        fresh = self.directory / "about_new"
        fresh.unlink(missing_ok=True)
        kernel.pin(held.fd, fresh)
        os.close(held.fd)
        os.chown(fresh, -1, self.directory.stat().st_gid)
        fresh.chmod(0o640)
        fresh.rename(self.directory / "about")
        return about

    def change_about(self, about: About) -> None:
        held = kernel.Map(kernel.pinned(self.directory / "about"))
        held.update(records.FIRST, about.pack())
        os.close(held.fd)


def remove_unfinished(directory: Path) -> None:
    """What the loader prepared for a helper that could not start. A set that is in use is left alone."""
    if (directory / "about").exists():
        return
    with contextlib.suppress(FileNotFoundError):
        for pin in directory.iterdir():
            pin.unlink()
        directory.rmdir()
