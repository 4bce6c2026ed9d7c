"""Attach what bcc compiled, over the maps of the set.

Links are pinned, so the programs go on counting while no helper runs. A link to a tracepoint needs kernel 5.15: before, the
tracepoints last as long as the helper, and the engine says so (`held`).
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import compiler
import kernel
import living
from compiler import Kind, Loaded, Refused, Text
from missed import Missed
from pins import Pins
from records import ENGINE_BCC, HAS_LIFECYCLE, HAS_NETWORK

LIFECYCLE = Text(
    "lifecycle.bcc.c",
    (
        ("on_mkdir", Kind.TRACEPOINT),
        ("on_rmdir", Kind.TRACEPOINT),
        ("on_release", Kind.TRACEPOINT),
        ("count_missed", Kind.RAW_TRACEPOINT),
    ),
    ("cgroup/cgroup_mkdir", "cgroup/cgroup_rmdir", "cgroup/cgroup_release"),
)
_LISTENING = ("link_on_mkdir", "link_on_rmdir", "link_on_release")
_NETWORK = Text("network.bcc.c", (("on_ingress", Kind.CGROUP_SKB), ("on_egress", Kind.CGROUP_SKB)))
_COUNTING = ("link_on_ingress", "link_on_egress")
_DIRECTIONS = (kernel.CGROUP_INGRESS, kernel.CGROUP_EGRESS)


@dataclass
class Engine:
    pins: Pins
    cgroup_root: Path
    verbose: bool = False
    hold_tracepoints: bool = False
    """As before 5.15, whatever the kernel can."""
    held: list[int] = field(default_factory=list)
    """Tracepoints that end with this process."""
    missed: Missed | None = None
    """None without the lifecycle programs."""

    def load(self) -> int:
        """What could be loaded (HAS_*). What could not is said, and left out."""
        before = self.pins.about()
        loaded = kept = 0
        for text, bit, links, attach, without_it in (
            (
                LIFECYCLE,
                HAS_LIFECYCLE,
                _LISTENING,
                self._attach_lifecycle,
                "ends of containers are not captured",
            ),
            (_NETWORK, HAS_NETWORK, _COUNTING, self._attach_network, "network traffic is not counted"),
        ):
            try:
                attach(compiler.load(text, self.pins.maps, self.verbose))
                loaded |= bit
            except (Refused, OSError) as error:
                if before is not None and before.has & bit and all(map(self.pins.has, links)):
                    kept |= bit
                    without_it = "the earlier programs stay"
                say(f"{text.file}: refused, so {without_it} ({error})")
        if not loaded:
            raise Refused("nothing was loaded")
        self.pins.remove_foreign()
        return loaded | kept

    def _attach_lifecycle(self, loaded: Loaded) -> None:
        maps, since, before = self.pins.maps, time.clock_gettime_ns(time.CLOCK_BOOTTIME), self.pins.about()
        nobody_listened = not self.pins.has("link_on_rmdir")
        if nobody_listened or before is None or before.engine != ENGINE_BCC:
            living.forget_paths(maps)
        living.enter(maps, living.ids_by_path(self.cgroup_root))
        on_mkdir, on_rmdir, on_release, count_missed = loaded.programs
        for link_name, program, event in zip(_LISTENING, (on_mkdir, on_rmdir, on_release), loaded.events):
            self._listen(link_name, program, event)
        self.missed = Missed(on_mkdir, on_rmdir, on_release, count_missed)
        # Those that were made between the first look and the attachment.
        now_living = living.ids_by_path(self.cgroup_root)
        living.enter(maps, now_living)
        living.name_parents(maps, now_living)
        if nobody_listened and (ended := living.close_missed(maps, since, now_living)):
            say(f"{ended} cgroups ended while nobody listened: their tombstones say when that was noticed")

    def _listen(self, link_name: str, program: int, event: int) -> None:
        if not self.hold_tracepoints:
            try:
                link = kernel.link_to_event(program, event)
            except OSError:
                self.hold_tracepoints = True
            else:
                self.pins.put_link(link, link_name)
                os.close(link)
                os.close(event)
        if self.hold_tracepoints:
            kernel.attach_to_event(program, event)
            self.held.append(event)
            self.pins.remove(link_name)

    def _attach_network(self, loaded: Loaded) -> None:
        root = os.open(self.cgroup_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for link_name, program, direction in zip(_COUNTING, loaded.programs, _DIRECTIONS):
                self._count(link_name, program, root, direction)
        finally:
            os.close(root)

    def _count(self, link_name: str, program: int, root: int, direction: int) -> None:
        if self.pins.has(link_name):
            link = kernel.pinned(self.pins.directory / link_name)
            kernel.exchange_program(link, program)
        else:
            link = kernel.link_to_cgroup(program, root, direction)
            self.pins.put_link(link, link_name)
        os.close(link)
        os.close(program)


def say(text: str) -> None:
    sys.stderr.write(f"weighbridge-probes: {text}\n")
    sys.stderr.flush()
