"""One connection to ClickHouse. Blocking, and used by one thread at a time."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import clickhouse_connect
from clickhouse_connect.driver.exceptions import ClickHouseError

from ledger.errors import LedgerAway

SCRATCH = "scratch"
"""Beside chDB's directory."""
_SETTINGS: dict[str, Any] = {
    # An INSERT answers when its part is written, not when it is queued.
    "async_insert": 0,
    # Rows of one INSERT and partition are one part, so a chunk is few parts; catching up may span many days.
    "max_partitions_per_insert_block": 0,
    # An hour that is built anew from the same rows has the same rows: a replicated table would take them for a retry.
    "insert_deduplicate": 0,
    # Ranges of batches stand in statements as lists.
    "max_query_size": 16 << 20,
    "max_insert_block_size": 1_048_576,
    "min_insert_block_size_rows": 1_048_576,
    "min_insert_block_size_bytes": 256 << 20,
    "do_not_merge_across_partitions_select_final": 1,
    # `sum(x) AS x` means the column, also where x is used again.
    "prefer_column_name_to_alias": 1,
    # Compiled expressions need memory that is writable and executable, which the unit forbids.
    "compile_expressions": 0,
    "compile_aggregate_expressions": 0,
    "compile_sort_description": 0,
}


class StoreTrouble(LedgerAway):
    """ClickHouse did not do it now (METER-001): nothing is lost, the same can be tried again."""


class Store:
    """Queries and inserts. Each INSERT that returns is durable."""

    def __init__(self, path: Path | None, dsn: str, password: str, database: str, memory_bytes: int) -> None:
        """chDB at `path`, or the server of `dsn` (http://USER@HOST:8123). StoreTrouble names the fix."""
        self.embedded = path is not None
        self._scratch: Path | None = None
        self._where = str(path) if path is not None else urlsplit(dsn).hostname or dsn
        try:
            self._client = self._connect(path, dsn, password, memory_bytes)
            try:
                self._client.command(f"CREATE DATABASE IF NOT EXISTS `{database}`")
            except BaseException:
                self._client.close()  # chDB lets no other path be opened before.
                raise
            # chDB keeps it as USE; a server takes it with each request.
            self._client.database = database
        except (ClickHouseError, OSError, RuntimeError) as error:
            fix = (
                "is its directory writable for this user, and no other ledger using it?"
                if self.embedded
                else "is it up, and are `store.dsn` and `store.password_file` right?"
            )
            raise StoreTrouble(
                f"METER-001 ClickHouse at {self._where}: {_first_line(error)}; {fix}"
            ) from error

    def _connect(self, path: Path | None, dsn: str, password: str, memory_bytes: int) -> Any:
        if path is None:
            return clickhouse_connect.get_client(dsn=dsn, password=password, settings=_SETTINGS)
        path.mkdir(parents=True, exist_ok=True, mode=0o750)
        # What a killed process left is nobody's: the caller holds the ledger's lock.
        self._scratch = path.parent / SCRATCH
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(mode=0o750)
        return clickhouse_connect.get_client(
            interface="chdb",
            path=str(path),
            settings=_SETTINGS | {"max_memory_usage": memory_bytes},
        )

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows. `{name:Type}` in the text takes a parameter. StoreTrouble."""
        try:
            return list(self._client.query(sql, parameters=dict(parameters or {})).result_rows)
        except (ClickHouseError, OSError, RuntimeError) as error:
            raise self._trouble(error) from error

    def command(self, sql: str, parameters: Mapping[str, Any] | None = None) -> None:
        """DDL, or INSERT … SELECT. StoreTrouble."""
        try:
            self._client.command(sql, parameters=dict(parameters or {}))
        except (ClickHouseError, OSError, RuntimeError) as error:
            raise self._trouble(error) from error

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Some rows of Python values. StoreTrouble."""
        if not rows:
            return
        try:
            with self._scratch_files():
                self._client.insert(table, rows, column_names=list(columns))
        except (ClickHouseError, OSError, RuntimeError) as error:
            raise self._trouble(error) from error

    def insert_binary(self, table: str, columns: Sequence[str], data: bytes) -> None:
        """Rows in ClickHouse's RowBinary. StoreTrouble."""
        try:
            with self._scratch_files():
                self._client.raw_insert(table, column_names=list(columns), insert_block=data, fmt="RowBinary")
        except (ClickHouseError, OSError, RuntimeError) as error:
            raise self._trouble(error) from error

    @contextlib.contextmanager
    def _scratch_files(self) -> Iterator[None]:
        """clickhouse-connect hands an INSERT to chDB as a temporary file, which a kill leaves behind: where it is found again,
        and on the disk that has to have room for it anyway."""
        before = tempfile.tempdir
        tempfile.tempdir = None if self._scratch is None else str(self._scratch)
        try:
            yield
        finally:
            tempfile.tempdir = before

    def close(self) -> None:
        self._client.close()

    def _trouble(self, error: Exception) -> StoreTrouble:
        return StoreTrouble(f"METER-001 ClickHouse at {self._where}: {_first_line(error)}")


def now_ns() -> int:
    """Wall clock, as columns `*_at_ns` hold it."""
    return time.time_ns()


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    # Behind this comes the whole statement.
    return text.partition(": In scope ")[0].partition(": while executing")[0][:500]
