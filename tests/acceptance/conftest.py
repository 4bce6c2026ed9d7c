"""Machines for tests. Where this host cannot have them the tests say why and are skipped; in CI they fail."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.acceptance.machines.cache import Unavailable
from tests.acceptance.machines.machine import Machine
from tests.acceptance.machines.snapshot import STABLE, Snapshot, machine_from, snapshot

ROOT = Path(__file__).parent.parent.parent
BUILD_AND_RUN_SECONDS = 2_400
"""A first run builds the image: everything in here is emulated, and nothing waits without an end."""

LONGEST = (
    "test_ledger",
    "test_installed",
    "test_rpm",
    "test_probes_deliver",
    "test_engine_bcc",
    "test_delivered_usage",
)
"""Files that are begun first, in this order, by whichever worker has nothing to do: so they end at about the same time."""

NewMachine = Callable[..., AbstractContextManager[Machine]]
"""Takes the kernel, `STABLE` unless told."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(BUILD_AND_RUN_SECONDS))
    turns = {name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path.stem, len(turns)))


@pytest.fixture(scope="session")
def new_machine() -> Iterator[NewMachine]:
    """Makes machines: `with new_machine() as machine`. The first use ever builds the image, for minutes."""
    sources: dict[str, Snapshot] = {}
    with ExitStack() as held:

        def new(kernel: str = STABLE) -> AbstractContextManager[Machine]:
            try:
                if kernel not in sources:
                    sources[kernel] = held.enter_context(snapshot(kernel))
            except Unavailable as why:
                if os.environ.get("CI"):
                    raise
                pytest.skip(str(why))
            return machine_from(sources[kernel])

        yield new


@pytest.fixture
def machine(new_machine: NewMachine) -> Iterator[Machine]:
    """A booted machine with nothing of ours in it, gone afterwards."""
    with new_machine() as made:
        yield made


@pytest.fixture(scope="session")
def short_lives_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, linked statically: the machine's C library is not this host's."""
    program = tmp_path_factory.mktemp("short-lives") / "short_lives"
    subprocess.run(["cc", "-static", "-O2", "-o", program, ROOT / "bench/short_lives.c"], check=True)
    return program
