"""Cgroup path -> who it is: a table of other people's hosts, and what must hold for any text."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.meter.identity import _RULES, KINDS, identify, identify_lines, role, unescape
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
    assert len(TABLE) >= 250
    assert len({row["path"] for row in TABLE}) == len(TABLE)
    assert {row["kind"] for row in TABLE} == set(KINDS)
    assert {row["runtime"] for row in TABLE} == {None} | {rule.runtime for rule in _RULES}


def test_every_line_of_the_rules_has_a_path_in_the_table_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for index, rule in enumerate(_RULES):
        monkeypatch.setattr("agent.meter.identity._RULES", _RULES[:index] + _RULES[index + 1 :])
        assert any(msgspec.structs.asdict(identify(row["path"])) != row for row in TABLE), rule


@pytest.mark.parametrize("row", [row for row in TABLE if row["path"].startswith("/")])
def test_slashes_a_namespace_and_a_removed_cgroup_change_nothing(row: dict[str, str]) -> None:
    path = row["path"].removesuffix(" (deleted)")
    for same in (path[1:], f"/..{path}", f"//{path}//", path.replace("/", "//"), f"{path} (deleted)"):
        assert msgspec.structs.asdict(identify(same)) == {**row, "path": same}


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


@given(st.sampled_from(CONTAINERS), st.sampled_from(CONTAINERS))
def test_a_container_in_a_container_belongs_to_the_outer_one(outer: str, inner: str) -> None:
    found = identify(f"{outer.rstrip('/')}/{inner.lstrip('/')}")
    assert found.kind == "sandbox-internal"
    assert found.container_id == identify(outer).container_id


@pytest.mark.parametrize(
    "row",
    [
        row
        for row in TABLE
        if row["kind"] == "container"
        and re.fullmatch("[0-9a-f]{64}", row["container_id"])
        # People choose the ids of these.
        and not row["path"].startswith(("/runc-", "/crun-", "/default/"))
    ],
)
def test_one_digit_more_or_less_or_in_capitals_is_no_id(row: dict[str, str]) -> None:
    right = row["container_id"]
    for wrong in (right[:-1], right + "0", right[:12], right.upper()):
        assert identify(row["path"].replace(right, wrong)).container_id is None


@pytest.mark.parametrize(
    "path",
    [
        "/" + "x" * 65_536,
        "/docker/" + "a" * 65_536,
        "/lxc.payload." + "a" * 65_536,
        "/system.slice/" + "\\x2d" * 16_384 + ".service",
        "/machine.slice/machine-" + "\\xff" * 16_384 + ".scope",
        "/a" * 32_768,
        "/" * 65_536,
        ":" * 65_536,
        "/pod" + "-pod" * 16_384,
        "/kubepods" + "-kubepods" * 25,
    ],
    ids=lambda path: f"{path[:24]}*{len(path)}",
)
def test_64_kib_of_anything_is_nobody_and_takes_no_time(path: str) -> None:
    started = time.process_time()
    found = identify(path)
    assert time.process_time() - started < 2
    assert (found.runtime, found.container_id, found.pod_uid, found.path) == (None, None, None, path)
    assert found.kind in ("root", "other")


def test_a_name_too_long_for_a_cgroup_inside_a_container_is_internal() -> None:
    container_id = "a" * 64
    assert identify(f"/docker/{container_id}/{'x' * 65_536}").container_id == container_id


def test_no_name_leads_out_of_a_container() -> None:
    container_id = "a" * 64
    for way in ("..", "../..", "../../system.slice/sshd.service", "./../.."):
        assert identify(f"/docker/{container_id}/{way}").container_id == container_id


@given(st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")), max_size=10))
def test_identify_prints_one_json_object_a_line_in_order_whatever_the_bytes(lines: list[bytes]) -> None:
    out = io.StringIO()
    assert identify_lines([line + b"\n" for line in lines], out) == len(lines)
    printed = out.getvalue().splitlines()
    assert len(printed) == len(lines)
    for line, text in zip(lines, printed, strict=True):
        assert text.isascii()
        assert json.loads(text)["path"].encode("utf-8", "surrogateescape") == line


def test_the_command_answers_every_line_of_its_input_in_order() -> None:
    lines = [row["path"].encode("utf-8", "surrogateescape") for row in TABLE if "\n" not in row["path"]]
    lines += [
        b"",
        b"\xff\xfe/\x80.service",
        b"/lxc.payload.\xc3",
        b"/ends\r",
        b"/docker/" + b"a" * 65_536,
        b"/last",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "agent", "identify"],
        input=b"\n".join(lines),
        capture_output=True,
        check=True,
        timeout=60,
        env={"LC_ALL": "C"},
    )
    answers = [json.loads(line) for line in done.stdout.split(b"\n")[:-1]]
    assert [answer["path"].encode("utf-8", "surrogateescape") for answer in answers] == lines
    for answer in answers:
        assert list(answer) == ["path", "runtime", "container_id", "pod_uid", "unit", "kind"]
        assert answer == msgspec.structs.asdict(identify(answer["path"]))


def test_escaped_units_read_as_they_were_named() -> None:
    assert unescape("dev-disk-by\\x2duuid") == "dev-disk-by-uuid"
    assert unescape("\\xff\\xfe") == "\\xff\\xfe"


def test_a_container_is_one_unit_with_all_below_and_slices_are_passed_through() -> None:
    assert role("/docker/" + "a" * 64, inside_unit=False) is Role.LEAF_UNIT
    assert role("/system.slice", inside_unit=False) is Role.PASS
    assert role("/system.slice/nginx.service", inside_unit=False) is Role.UNIT
    assert role("/kubepods/burstable", inside_unit=False) is Role.PASS
    assert role("/burstable", inside_unit=False) is Role.UNIT
    assert role("/docker", inside_unit=False) is Role.PASS
    assert role("/mine", inside_unit=False) is Role.UNIT
    assert role("/system.slice/nginx.service/worker", inside_unit=True) is Role.PASS
