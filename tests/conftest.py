"""What every test may use: real cgroups of our own, and a throw-away site of real processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from bench.cgroups import Cgroup, slice_of_our_own
from bench.probe_set import LOADER
from bench.site import Site

settings.register_profile(
    "default", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root and a writable v2 hierarchy the `root` tests say so and are skipped, and without the kernel probes
    those that load them; but never in CI.
    """
    if os.environ.get("CI"):
        return
    if not LOADER.exists():
        unbuilt = pytest.mark.skip(reason="the kernel probes could not be built here: ./dev setup says why")
        theirs = ("tests/probes/", "acceptance/test_probes", "operators/test_watched")
        for item in items:
            if any(name in item.nodeid for name in theirs):
                item.add_marker(unbuilt)
    if os.geteuid() == 0:
        return
    why = pytest.mark.skip(reason="makes real cgroups: needs root and a writable cgroup v2 hierarchy")
    for item in items:
        if "root" in item.keywords:
            item.add_marker(why)


@pytest.fixture
def ours() -> Iterator[Cgroup]:
    """A slice of our own at the root of the v2 hierarchy, gone afterwards with all in it."""
    with slice_of_our_own("weighbridge-test") as cgroup:
        yield cgroup


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """CA, collector and agent to start as real processes; killed afterwards if they still run."""
    with Site(tmp_path / "site") as made:
        yield made


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options, "size=1m" or "ro,size=1m"; gone afterwards. For `root` tests."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        disk = tmp_path / f"disk-{len(made)}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        made.append(disk)
        return disk

    yield mount
    for disk in made:
        # Lazily, so that what a failed test still holds open does not keep the mount.
        subprocess.run(["umount", "--lazy", disk], check=True)
