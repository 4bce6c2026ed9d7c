"""The broker of tests/kafka, for who reads it; and one ClickHouse inside this process, with a database for each test."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.handoff.log import writer
from ledger.store.client import Store
from ledger.store.migrate import migrate
from tests.kafka.conftest import broker
from tests.ledger.site import Place
from wire.measures import MEASURES

__all__ = ["broker"]


@pytest.fixture(scope="session")
def engine() -> Iterator[Path]:
    """The state directory of every ledger in this process: chDB has one directory a process, and databases in it. In memory
    where that goes: each of thousands of inserts is synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="weighbridge-ledger-", dir=memory if os.access(memory, os.W_OK) else None
    ) as made:
        yield Path(made)


_made = 0


@pytest.fixture
def database() -> str:
    """A name that no test had before."""
    global _made
    _made += 1
    return f"test_{_made}"


@pytest.fixture
def store(engine: Path, database: str) -> Iterator[Store]:
    """With all tables, empty."""
    made = Store(engine / "db", "", "", database, 1 << 30)
    migrate(made)
    yield made
    made.close()


@pytest.fixture
def few_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements of two measures instead of 34: most of what a small one costs is to plan its columns. For tests that need
    many statements and are not about measures."""
    for module in ("rollup.parts", "rollup.hours", "usage", "closing", "period_books", "proof.rollups"):
        monkeypatch.setattr(f"ledger.{module}.MEASURES", MEASURES[:2])


@pytest.fixture
def place(engine: Path, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A collector's log, which says at once that it is synced, and a ledger of it."""
    monkeypatch.setattr(writer, "SEAL_AFTER_SECONDS", 0.01)
    made = Place(engine, database, tmp_path / "log")
    yield made
    made.close()
