"""The connection to ClickHouse: what it leaves on the disk."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

INSERTING = """
import os, signal, sys
from pathlib import Path
from clickhouse_connect.driver._backend import chdb_backend
from ledger.store.client import Store

store = Store(Path(sys.argv[1]), "", "", "weighbridge", 1 << 29)
store.command("CREATE TABLE IF NOT EXISTS t (a UInt64) ENGINE = MergeTree ORDER BY a")
store.insert_binary("t", ("a",), bytes(8))
assert not list(Path(sys.argv[1]).parent.glob("scratch/*"))
chdb_backend.os.unlink = lambda path: os.kill(os.getpid(), signal.SIGKILL)
store.insert_binary("t", ("a",), bytes(8))
"""


def test_what_a_killed_insert_leaves_is_beside_the_tables_and_gone_with_the_next_start(
    tmp_path: Path,
) -> None:
    before = set(Path(tempfile.gettempdir()).glob("tmp*.raw"))
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", INSERTING, tmp_path / "db"], capture_output=True, text=True
        )
        assert done.returncode == -9, done.stderr
        assert len(list((tmp_path / "scratch").iterdir())) == 1
    assert set(Path(tempfile.gettempdir()).glob("tmp*.raw")) <= before
