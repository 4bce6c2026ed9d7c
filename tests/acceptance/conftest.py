"""Machines for tests. Where this host cannot have them the tests say why and are skipped; in CI they fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.acceptance.machines.cache import Unavailable
from tests.acceptance.machines.machine import Machine
from tests.acceptance.machines.snapshot import machine_from, snapshot

BUILD_AND_RUN_SECONDS = 1_500
"""A first run builds the image: everything in here is emulated, and nothing waits without an end."""

collect_ignore = [] if os.environ.get("WEIGHBRIDGE_WHOLE_LIFE") else ["test_installed.py"]
"""A long form, like a bench: 20 minutes where machines are emulated. docs/machines.md says how to run it."""

NewMachine = Callable[[], AbstractContextManager[Machine]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(BUILD_AND_RUN_SECONDS))


@pytest.fixture(scope="session")
def new_machine() -> Iterator[NewMachine]:
    """Makes machines: `with new_machine() as machine`. The first use ever builds the image, for minutes."""
    with ExitStack() as held:
        try:
            source = held.enter_context(snapshot())
        except Unavailable as why:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(why))
        yield lambda: machine_from(source)


@pytest.fixture
def machine(new_machine: NewMachine) -> Iterator[Machine]:
    """A booted machine with nothing of ours in it, gone afterwards."""
    with new_machine() as made:
        yield made
