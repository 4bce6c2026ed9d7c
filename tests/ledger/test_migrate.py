"""Tables from nothing, again, and from wherever the last try ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger.errors import LedgerError
from ledger.store.client import Store, StoreTrouble
from ledger.store.migrate import ddl, migrate, migrations, statements
from tests.ledger.site import failing

NAMES = [m.name for m in migrations()]


@pytest.fixture
def empty(engine: Path, database: str) -> Iterator[Store]:
    store = Store(engine / "db", "", "", database, 1 << 30)
    yield store
    store.close()


def tables(store: Store) -> list[str]:
    return [
        n
        for (n,) in store.query(
            "SELECT name FROM system.tables WHERE database = currentDatabase() ORDER BY name"
        )
    ]


def test_tables_are_made_once(empty: Store) -> None:
    assert migrate(empty) == NAMES
    made = tables(empty)
    assert {"batches", "verdicts", "usage_hours", "manifests"} <= set(made)
    assert migrate(empty) == []
    assert tables(empty) == made
    assert all(f"CREATE TABLE IF NOT EXISTS {name}\n" in ddl() for name in ("batches", "usage_hours"))


def test_a_crash_between_any_two_statements_is_made_good(empty: Store) -> None:
    at = 0
    while True:
        at += 1
        for name in tables(empty):
            empty.command(f"DROP TABLE {name} SYNC")
        with failing(empty, at, done=at % 2 == 0):
            try:
                migrate(empty)
            except StoreTrouble:
                pass
            else:
                break
        migrate(empty)
        assert migrate(empty) == []
        assert empty.query("SELECT count() FROM migrations FINAL") == [(len(NAMES),)]
    assert at > sum(len(list(statements(m.sql))) for m in migrations())


def test_every_statement_may_run_twice() -> None:
    for migration in migrations():
        for statement in statements(migration.sql):
            assert statement.startswith(("CREATE TABLE IF NOT EXISTS ", "CREATE VIEW IF NOT EXISTS ")), (
                statement
            )


def test_a_newer_ledgers_tables_are_refused(empty: Store) -> None:
    migrate(empty)
    empty.insert(
        "migrations", ("version", "name", "digest", "applied_at_ns"), [(9_999, "9999_later.sql", "x", 1)]
    )
    with pytest.raises(
        LedgerError, match=r"newer release \(migration 9999_later.sql\): install that release again"
    ):
        migrate(empty)


def test_an_altered_file_is_refused(empty: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(empty)
    altered = [m._replace(sql=m.sql + "\n-- changed") if m.version == 2 else m for m in migrations()]
    monkeypatch.setattr("ledger.store.migrate.migrations", lambda: altered)
    with pytest.raises(LedgerError, match="is not the one that made these tables: reinstall the package"):
        migrate(empty)
