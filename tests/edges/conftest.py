"""What the edges start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.fakehost import CONTAINER, FakeHost


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    """A host with one container."""
    host = FakeHost(tmp_path / "host")
    host.cpu("/", 10_000)
    host.cpu(CONTAINER, 1_000)
    return host
