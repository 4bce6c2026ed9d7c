"""agent/read/probes/records.py against bpf/records.h, as the C compiler lays it out."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from struct import Struct

import pytest

from agent.meter.model import NETWORK
from agent.read.probes import records

HEADER = Path(__file__).parent.parent.parent / "bpf/records.h"

MIRRORED: Mapping[str, tuple[type, Struct]] = {
    "wb_birth": (records.Birth, records._BIRTH),
    "wb_tombstone": (records.Tombstone, records._TOMBSTONE),
    "wb_row": (records.Row, records._ROW),
    "wb_snapshot_head": (records.Head, records._HEAD),
    "wb_overflow": (records.Overflow, records._OVERFLOW),
    "wb_about": (records.About, records._ABOUT),
}


def compiled(directory: Path, expressions: list[str]) -> list[int]:
    """The values of C expressions over the header."""
    source = directory / "layout.c"
    prints = "\n".join(f'printf("%lld\\n", (long long)({e}));' for e in expressions)
    source.write_text(
        f'#include <stdio.h>\n#include <stddef.h>\n#include "{HEADER}"\nint main(void) {{ {prints} return 0; }}\n'
    )
    subprocess.run(["cc", "-Wall", "-Werror", "-o", directory / "layout", source], check=True)
    done = subprocess.run([directory / "layout"], check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def offsets(layout: Struct, count: int) -> list[int]:
    """Where each field begins, told from what a lone non-zero byte there changes."""
    found: list[int] = []
    for at in range(layout.size):
        data = bytearray(layout.size)
        data[at] = 1
        (changed,) = [
            i
            for i, v in enumerate(layout.unpack(data))
            if v not in (0, bytes(len(v) if isinstance(v, bytes) else 0))
        ]
        if changed == len(found):
            found.append(at)
    assert len(found) == count
    return found


@pytest.mark.parametrize("name", MIRRORED)
def test_every_field_is_where_the_compiler_puts_it(name: str, tmp_path: Path) -> None:
    kind, layout = MIRRORED[name]
    fields = [field for field in kind._fields if not (kind is records.Tombstone and field == "cgroup_id")]
    size, *where = compiled(
        tmp_path, [f"sizeof(struct {name})", *(f"offsetof(struct {name}, {field})" for field in fields)]
    )
    assert size == layout.size
    assert where == offsets(layout, len(fields))
    declared = re.search(rf"struct {name} {{(.*?)\n}};", HEADER.read_text(), re.DOTALL)
    assert declared is not None
    assert len(re.findall(r"^\t(?:unsigned|char)[^;]*;", declared[1], re.MULTILINE)) == len(fields)


def test_rows_and_traffic_are_where_the_compiler_puts_them(tmp_path: Path) -> None:
    names = [
        (way, peer, field) for field in ("bytes", "segments") for peer in range(3) for way in ("rx", "tx")
    ]
    in_element, element, network, *slots = compiled(
        tmp_path,
        [
            "WB_ROWS_IN_ELEMENT",
            "sizeof(struct wb_rows)",
            "sizeof(struct wb_network)",
            *(f"offsetof(struct wb_network, {way}[{peer}].{field}) / 8" for way, peer, field in names),
        ],
    )
    assert (in_element, element) == (records.ROWS_IN_ELEMENT, records.SIZES["snapshot"][1])
    assert network == records._NETWORK.size
    assert tuple(slots) == records._NETWORK_SLOTS
    classes = {0: "loopback", 1: "internal", 2: "external"}
    assert (
        tuple(
            f"net_{way}_{classes[peer]}_{'packets' if field == 'segments' else field}"
            for way, peer, field in names
        )
        == NETWORK
    )


def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    wanted = {
        "WB_LAYOUT": records.LAYOUT,
        "WB_PATH_BYTES": records.PATH_BYTES,
        "WB_CLASSES": records.CLASSES,
        **{f"WB_KNOWS_{bit.name}": bit for bit in records.Knows if bit < records.Knows.CHILDLESS},
        "WB_CHILDLESS": records.Knows.CHILDLESS,
        "WB_PATH_CUT": records.Knows.PATH_CUT,
        **{f"WB_HAS_{bit.name}": bit for bit in records.Has},
        **{f"WB_WALK_{walk.name}": walk for walk in records.Walk},
        **{f"WB_ENGINE_{engine.name}": engine for engine in records.Engine},
    }
    assert compiled(tmp_path, list(wanted)) == [int(value) for value in wanted.values()]
    declared = set(re.findall(r"\bWB_(?:KNOWS|HAS|WALK|ENGINE)_\w+", HEADER.read_text()))
    assert declared == {name for name in wanted if re.match(r"WB_(KNOWS|HAS|WALK|ENGINE)_", name)}


def test_a_record_comes_back_as_it_was_written() -> None:
    value = records._TOMBSTONE.pack(*range(1, 11), 12, 13, b"/a/\xff" + bytes(records.PATH_BYTES - 4))
    (tombstone,) = records.tombstones(memoryview(records.key(77)), memoryview(value))
    assert tombstone[:-1] == (77, *range(1, 11), 12, 13)
    assert tombstone.path == "/a/\udcff"
    full = records.birth(records._BIRTH.pack(1, 2, 3, 4, 5, 0, b"/" + b"x" * (records.PATH_BYTES - 1)))
    assert len(full.path) == records.PATH_BYTES


def test_traffic_is_the_sum_over_all_cpus() -> None:
    one = records._NETWORK.pack(*range(18))
    two = records._NETWORK.pack(*[100] * 18)
    keys = records.key(5) + records.key(6)
    got = list(records.network(memoryview(keys), memoryview(one + two + two + two), 2))
    assert got[1] == (6, (200,) * 12)
    assert got[0] == (5, tuple(100 + slot for slot in records._NETWORK_SLOTS))
