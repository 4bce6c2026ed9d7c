"""The packages are built once for all tests of a run."""

from __future__ import annotations

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
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def fresh(tmp_path: Path) -> Fresh:
    return Fresh(tmp_path / "fresh")
