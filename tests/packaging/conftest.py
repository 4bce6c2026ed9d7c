"""The packages are built once for all tests of a run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.built import Built
from tests.packaging.fresh import Fresh


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for the build, which has as long as it takes on a machine that is busy with other things."""
    for item in items:
        if "tests/packaging/" in item.nodeid:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def built() -> Iterator[Built]:
    """1.4 GB, which pytest would keep of its last three runs."""
    with tempfile.TemporaryDirectory(prefix="weighbridge-packages-") as scratch:
        yield Built(Path(scratch, "packages"), Path(scratch, "unpacked"))


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Fresh]:
    yield Fresh(tmp_path / "fresh")
    shutil.rmtree(tmp_path / "fresh")
