"""Container tables: what is packed opens to the same, and nothing opens to more than it may."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.containers import BadTable, open_table, put_table, table_of
from wire.limits import MAX_BATCH_BYTES, MAX_PATH_BYTES, MAX_TABLE_EXPANSION
from wire.v1 import usage_pb2 as pb

TEXTS = st.lists(st.text(max_size=80), max_size=40)


@given(TEXTS, TEXTS, st.lists(st.integers(0, 2**64 - 1), max_size=40))
def test_what_is_put_in_comes_out(paths: list[str], names: list[str], ids: list[int]) -> None:
    table = pb.ContainerTable(cgroup_id=ids, cgroup_path=paths, name=names)
    batch = pb.UsageBatch()
    put_table(batch, table)
    again = pb.UsageBatch.FromString(batch.SerializeToString())
    assert table_of(again) == table
    assert batch.ByteSize() <= pb.UsageBatch(containers=table).ByteSize()


def test_what_is_put_in_takes_the_place_of_what_was_there() -> None:
    batch = pb.UsageBatch()
    for number in (1, 9, 1):  # plain, packed, plain
        table = pb.ContainerTable(cgroup_path=["/system.slice/one.service"] * number)
        put_table(batch, table)
        assert (batch.WhichOneof("table"), table_of(batch)) == (
            "containers" if number == 1 else "containers_zlib",
            table,
        )


def test_a_table_that_no_reader_would_open_is_left_as_it_is() -> None:
    """Units deep down, all in one place: packed it would be a hundredth."""
    table = pb.ContainerTable(cgroup_path=["/" + "x" * (MAX_PATH_BYTES - 1)] * 500)
    batch = pb.UsageBatch()
    put_table(batch, table)
    assert batch.WhichOneof("table") == "containers"
    assert table_of(batch) == table


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (b"", "cut off"),
        (b"/system.slice", "no zlib stream"),
        (zlib.compress(b"x" * 100, 0)[:-1], "cut off"),
        (zlib.compress(b"x" * 100, 0)[:-1] + b"\0", "no zlib stream"),  # its checksum
        (zlib.compress(b"", 0) + b"more", "4 bytes behind its end"),
        (zlib.compress(b"\xff\xff\xff", 0), "no ContainerTable"),
        (zlib.compress(pb.ContainerTable(name=["\x80"]).SerializeToString()[:-1], 0), "no ContainerTable"),
        (zlib.compress(bytes(1 << 30)), "opens to more than"),
    ],
)
def test_what_is_no_packed_table_is_named(packed: bytes, why: str) -> None:
    with pytest.raises(BadTable, match=why):
        open_table(packed)


@pytest.mark.parametrize("more", [0, 1])
def test_it_opens_to_so_many_times_its_bytes_and_no_further(more: int) -> None:
    def packed(size: int) -> bytes:
        return zlib.compress(pb.ContainerTable(name=["x" * size]).SerializeToString(), 9)

    most = next(
        size for size in range(128, 1 << 14) if size + 4 > len(packed(size + 1)) * MAX_TABLE_EXPANSION
    )
    if more:
        with pytest.raises(BadTable, match="opens to more than"):
            open_table(packed(most + more))
    else:
        assert open_table(packed(most)).name == ["x" * most]


def test_a_table_is_never_more_than_a_batch_may_be() -> None:
    table = pb.ContainerTable(name=["x" * 999] * (MAX_BATCH_BYTES // 1_000))
    stored = zlib.compress(table.SerializeToString() + b"\x3a\x00" * 4_000, 0)
    with pytest.raises(BadTable, match=f"more than {MAX_BATCH_BYTES} bytes"):
        open_table(stored)
