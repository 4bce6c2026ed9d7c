"""ClickHouse under the system calls that the ledger's unit leaves it, without a systemd to enforce them.

The unit's `SystemCallFilter=` and `MemoryDenyWriteExecute=` become the seccomp filter that systemd would make of them, of a
process of the test's own.
"""

from __future__ import annotations

import platform
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.test_units import UNITS

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls are x86-64's")

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
EXECUTABLE, WRITABLE = 4, 2
LOAD, EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050001
"""The latter: EPERM."""
NUMBER, THIRD_ARGUMENT = 0, 32

RUN = """
import ctypes, sys
program = bytes.fromhex(sys.argv[1])
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(len(program) // 8, program)), 0, 0) == 0, ctypes.get_errno()
import clickhouse_connect
compiled = dict.fromkeys(("compile_expressions", "compile_aggregate_expressions", "compile_sort_description"), int(sys.argv[3]))
often = dict.fromkeys(("min_count_to_compile_expression", "min_count_to_compile_aggregate_expression"), 0)
client = clickhouse_connect.get_client(interface="chdb", path=sys.argv[2], settings=compiled | often)
client.command("CREATE TABLE t (a UInt64, b UInt64) ENGINE = ReplacingMergeTree ORDER BY a SETTINGS fsync_after_insert = 1")
for _ in range(2):
    client.command("INSERT INTO t SELECT number, number % 7 FROM numbers(10000)")
client.command("OPTIMIZE TABLE t FINAL")
print(*client.query("SELECT b, sum(a * 3 + b) FROM t FINAL WHERE a * 2 + b > 5 GROUP BY b ORDER BY b").result_rows[0])
client.close()
"""


def named(words: str) -> Iterator[str]:
    """System calls, out of their names and the names of systemd's sets."""
    for word in words.split():
        if not word.startswith("@"):
            yield word
            continue
        said = subprocess.check_output(["systemd-analyze", "syscall-filter", word], text=True)
        yield from named(" ".join(re.findall(r"^    ([@a-z]\S*)", said, re.MULTILINE)))


@cache
def numbers() -> dict[str, int]:
    found = re.findall(r"^#define __NR_(\w+) (\d+)", HEADER.read_text(), re.MULTILINE)
    return {name: int(number) for name, number in found}


def filter_of(unit: str) -> bytes:
    """As BPF."""
    text = (UNITS / unit).read_text()
    assert "\nMemoryDenyWriteExecute=yes\n" in text
    allowed: set[str] = set()
    for refused, words in re.findall(r"^SystemCallFilter=(~?)(.+)$", text, re.MULTILINE):
        allowed = allowed - set(named(words)) if refused else allowed | set(named(words))
    lines = [(LOAD, 0, 0, NUMBER)]
    for names, bits in ((("mmap",), EXECUTABLE | WRITABLE), (("mprotect", "pkey_mprotect"), EXECUTABLE)):
        for name in names:
            lines += [
                (EQUAL, 0, 5, numbers()[name]),
                (LOAD, 0, 0, THIRD_ARGUMENT),
                (AND, 0, 0, bits),
                (EQUAL, 0, 1, bits),
                (RETURN, 0, 0, REFUSE),
                (RETURN, 0, 0, ALLOW),
            ]
    for name in sorted(allowed & numbers().keys()):
        lines += [(EQUAL, 0, 1, numbers()[name]), (RETURN, 0, 0, ALLOW)]
    lines.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def engine(tmp_path: Path, compiling: bool) -> subprocess.CompletedProcess[str]:
    program = filter_of("weighbridge-ledger.service").hex()
    command = [sys.executable, "-c", RUN, program, str(tmp_path / "db"), str(int(compiling))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_engine_books_merges_and_adds_up_with_what_the_unit_leaves_it(tmp_path: Path) -> None:
    done = engine(tmp_path, compiling=False)
    assert done.returncode == 0, done.stderr
    numbers = range(0, 10_000, 7)
    assert done.stdout.split() == ["0", str(sum(3 * number for number in numbers if number * 2 > 5))]


def test_its_compiler_has_to_be_off(tmp_path: Path) -> None:
    """Or the ledger would fail once it had asked something some times; ledger/store switches it off."""
    done = engine(tmp_path, compiling=True)
    assert done.returncode != 0
    assert "CANNOT_MPROTECT" in done.stderr
