"""The schema: SQL files in order, each applied once. Forward only; every statement may run twice, since a crash can come
between a file's statements and the row that says it was applied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.resources import files
from typing import NamedTuple

from ledger.errors import LedgerError
from ledger.store.client import Store, now_ns

_MIGRATIONS = """\
CREATE TABLE IF NOT EXISTS migrations (version UInt32, name String, digest String, applied_at_ns UInt64)
ENGINE = ReplacingMergeTree ORDER BY version SETTINGS fsync_after_insert = 1, fsync_part_directory = 1"""


class Migration(NamedTuple):
    version: int
    name: str
    sql: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations() -> list[Migration]:
    """What this program brings, ascending."""
    found = sorted(files("ledger.store").joinpath("schema").iterdir(), key=lambda file: file.name)
    return [
        Migration(int(file.name[:4]), file.name, file.read_text(encoding="utf-8"))
        for file in found
        if file.name.endswith(".sql")
    ]


def statements(sql: str) -> Iterator[str]:
    """The statements of a file: each ends with a semicolon at the end of a line."""
    for statement in sql.split(";\n"):
        lines = [line for line in statement.splitlines() if not line.lstrip().startswith("--")]
        text = "\n".join(lines).strip().removesuffix(";")
        if text:
            yield text


def migrate(store: Store) -> list[str]:
    """Apply what is missing; the names of what was applied. LedgerError if the store is newer than this program, or was
    made by a file that has been changed since."""
    store.command(_MIGRATIONS)
    applied = {
        version: (name, digest)
        for version, name, digest in store.query(
            "SELECT version, name, digest FROM migrations FINAL ORDER BY version"
        )
    }
    own = {m.version: m for m in migrations()}
    if newer := sorted(set(applied) - set(own)):
        raise LedgerError(
            f"the ledger's tables are of a newer release (migration {applied[newer[0]][0]}): install that release again"
        )
    done = []
    for version, migration in sorted(own.items()):
        if version in applied:
            if applied[version][1] != migration.digest:
                raise LedgerError(
                    f"migration {migration.name} is not the one that made these tables: reinstall the package"
                )
            continue
        for statement in statements(migration.sql):
            store.command(statement)
        store.insert(
            "migrations",
            ("version", "name", "digest", "applied_at_ns"),
            [(version, migration.name, migration.digest, now_ns())],
        )
        done.append(migration.name)
    return done


def ddl() -> str:
    """All of it, for people: what `weighbridge-ledger schema` prints and the package installs."""
    head = "-- The ledger's tables. `weighbridge-ledger run` makes them by itself.\n"
    return head + "".join(f"\n-- {migration.name}\n{migration.sql}" for migration in migrations())
