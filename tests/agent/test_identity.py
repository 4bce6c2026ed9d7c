"""Cgroup path -> who it is: a table of other people's hosts, and what must hold for any text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.meter.identity import KINDS, identify, identify_lines, role, unescape
from agent.meter.model import Role

TABLE = json.loads((Path(__file__).parent / "identity_table.json").read_text())
CONTAINERS = sorted(
    {row["path"] for row in TABLE if row["kind"] == "container" and "deleted" not in row["path"]}
)

ANY_TEXT = st.text(st.characters(codec=None, categories=None, exclude_categories=()), max_size=80)
segments = st.one_of(
    st.sampled_from([segment for row in TABLE for segment in row["path"].split("/")]),
    ANY_TEXT.map(lambda text: text.replace("/", "")),
)
paths = st.lists(segments, max_size=7).map(lambda parts: "/" + "/".join(parts))


@pytest.mark.parametrize("row", TABLE, ids=[ascii(row["path"])[1:60] for row in TABLE])
def test_the_table_of_other_peoples_hosts(row: dict[str, str | None]) -> None:
    assert row["path"] is not None
    assert msgspec.structs.asdict(identify(row["path"])) == row


def test_the_table_is_long_and_has_every_kind_and_runtime() -> None:
    assert len(TABLE) >= 150
    assert {row["kind"] for row in TABLE} == set(KINDS)
    assert len({row["runtime"] for row in TABLE}) >= 12


@given(paths | ANY_TEXT)
def test_any_text_has_an_answer_and_keeps_its_path(path: str) -> None:
    found = identify(path)
    assert found.path == path
    assert found.kind in KINDS
    assert (found.container_id is not None) == (found.kind in ("container", "sandbox-internal"))


@given(
    st.sampled_from(CONTAINERS),
    st.lists(segments.filter(lambda s: s not in ("", ".", "..")), min_size=1, max_size=4),
)
def test_whatever_lies_below_a_container_is_internal_to_that_container(path: str, below: list[str]) -> None:
    outer, inner = identify(path), identify("/".join((path.rstrip("/"), *below)))
    if below[-1].endswith(" (deleted)"):
        return
    assert inner.kind == "sandbox-internal"
    assert (inner.runtime, inner.container_id, inner.pod_uid) == (
        outer.runtime,
        outer.container_id,
        outer.pod_uid,
    )


@given(st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), max_size=10))
def test_identify_prints_one_json_object_a_line_in_order_whatever_the_bytes(lines: list[bytes]) -> None:
    out = io.StringIO()
    assert identify_lines([line + b"\n" for line in lines], out) == len(lines)
    printed = out.getvalue().splitlines()
    assert len(printed) == len(lines)
    for line, text in zip(lines, printed, strict=True):
        assert text.isascii()
        assert json.loads(text)["path"].encode("utf-8", "surrogateescape") == line


def test_escaped_units_read_as_they_were_named() -> None:
    assert unescape("dev-disk-by\\x2duuid") == "dev-disk-by-uuid"
    assert unescape("\\xff\\xfe") == "\\xff\\xfe"


def test_a_container_is_one_unit_with_all_below_and_slices_are_passed_through() -> None:
    assert role("/docker/" + "a" * 64, inside_unit=False) is Role.LEAF_UNIT
    assert role("/system.slice", inside_unit=False) is Role.PASS
    assert role("/system.slice/nginx.service", inside_unit=False) is Role.UNIT
    assert role("/kubepods/burstable", inside_unit=False) is Role.PASS
    assert role("/docker", inside_unit=False) is Role.PASS
    assert role("/mine", inside_unit=False) is Role.UNIT
    assert role("/system.slice/nginx.service/worker", inside_unit=True) is Role.PASS
