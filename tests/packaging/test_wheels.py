"""Which wheels a package is made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.built import PARTS, ROOT

ASK = """
import json, sys
sys.path[:0] = ["packaging/builder", "."]
from checkout import Target
from wheels import locked_for
print(json.dumps({l.name: [l.version, sorted(l.hashes)] for l in locked_for(sys.argv[1], Target(sys.argv[2], 1, 0))}))
"""


def locked(part: str, python: str) -> dict[str, tuple[str, list[str]]]:
    return json.loads(subprocess.check_output([sys.executable, "-c", ASK, part, python], cwd=ROOT, text=True))


def test_the_first_patch_release_of_a_python_is_served_not_only_the_one_that_builds() -> None:
    """Debian 12 has 3.11.2; redis needs async-timeout before 3.11.3."""
    assert "async-timeout" in locked("collector", "3.11")
    assert "async-timeout" not in locked("collector", "3.13")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_each_wheel_is_locked_by_hash(part: str, python: str) -> None:
    found = locked(part, python)
    assert {"grpcio", "cryptography", "protobuf"} <= found.keys()
    assert all(hashes for _, hashes in found.values())


def test_a_wheel_that_is_not_what_the_lock_says_is_refused(tmp_path: Path) -> None:
    (store,) = (ROOT / ".cache/wheels").glob("agent-3.11-*")
    mine = tmp_path / store.name
    mine.mkdir()
    for wheel in store.glob("*.whl"):
        content = wheel.read_bytes()
        (mine / wheel.name).write_bytes(content + b"\0" if wheel.name.startswith("grpcio") else content)
    command = [
        sys.executable,
        "packaging/builder",
        "--part",
        "agent",
        "--wheels",
        tmp_path,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "0 wheels of grpcio" in done.stderr
    assert not list((tmp_path / "out").glob("*"))


INSERT_AND_QUERY = """
import sys, clickhouse_connect
client = clickhouse_connect.get_client(interface="chdb", path=sys.argv[1])
client.command("CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a")
client.raw_insert("t", column_names=["a"], insert_block=(7).to_bytes(8, "little"), fmt="RowBinary")
assert client.query("SELECT a FROM t").result_rows == [(7,)]
print(*sorted({"numpy", "pandas", "pyarrow"} & sys.modules.keys()))
client.close()
"""


def test_the_ledgers_engine_works_without_the_data_frames_that_it_asks_for(tmp_path: Path) -> None:
    """300 MB that no lock has: a query through clickhouse-connect moves bytes."""
    assert not {"numpy", "pandas", "pyarrow"} & locked("ledger", "3.11").keys()
    imported = subprocess.check_output([sys.executable, "-c", INSERT_AND_QUERY, tmp_path / "db"], text=True)
    assert imported == "\n"
