"""Settings: errors that name file, line, key and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.daemon.settings import Bytes, Seconds, SettingsError, load


class Inner(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    every: Seconds = Seconds(10)
    size: Bytes = Bytes(1)
    count: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1


class Top(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str = "x"
    inner: Inner = Inner()
    many: list[Inner] = []
    where: Path | None = None


def of(directory: Path, text: str | bytes) -> Top:
    path = directory / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path, Top)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nmae: y", "s.yaml:1: nmae: unknown key; did you mean `name`?"),
        ("name: y\n\ninner:\n  evry: 3s", "s.yaml:4: inner.evry: unknown key; did you mean `every`?"),
        ("every: 3s", "it belongs under `inner.every`"),
        ("zzz: 1", "known here: inner, many, name, where"),
        ("many:\n- count: 1\n- cuont: 2", "s.yaml:3: many.1.cuont"),
        ("name: 5", "s.yaml:1: name: expected text"),
        ("inner:\n  count: 10", "s.yaml:2: inner.count"),
        ("inner:\n  every: 5 parsecs", "expected a duration such as 10s"),
        ("inner:\n  size: -1", "expected a size such as 64KiB"),
        ("inner: 7", "inner: expected a map of keys"),
        ("name: a\nname: b", "s.yaml:2: `name` stands twice"),
        ("name: &a x\nwhere: *a", "aliases"),
        ("inner:\n\tcount: 1", "indent with spaces"),
        ("- a\n- b", "expected `key: value`"),
        ("name: [", "not YAML"),
        (b"name: \xff", "not UTF-8"),
        ("x: " + "[" * 500, "not YAML"),
        ("name: " + "y" * (2 << 20), "larger than"),
        ("where: ''", "expected a path"),
        ("inner:\n  count: !!int ''", "s.yaml:2:"),
        ("name: !!bool x", "quote the value"),
        ("name: !!timestamp x", "quote the value"),
        ("inner: {every: " + "9" * 400 + "d}", "expected a duration"),
        ("inner: {every: .inf}", "expected a duration"),
        ("inner: {every: .nan}", "expected a duration"),
        ("inner: {size: " + "9" * 400 + "GiB}", "expected a size"),
        ("inner: {size: " + "9" * 5_000 + "}", "quote the value"),
        ("a: " * 30 + "1", "not YAML"),
        ("x: " + "{a: " * 30 + "1" + "}" * 30, "nested deeper"),
        ("? [a]\n: 1", "a key must be plain text"),
        ("a: 1\n---\nb: 2", "not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_its_fix(
    tmp_path: Path, text: str | bytes, says: str
) -> None:
    with pytest.raises(SettingsError) as error:
        of(tmp_path, text)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("10s", 10), ("5m", 300), ("1h", 3_600), ("7d", 604_800), ("3", 3), ("1.5", 1.5)],
)
def test_durations(tmp_path: Path, text: str, seconds: float) -> None:
    found = of(tmp_path, f"inner: {{every: {text}}}").inner.every
    assert found == seconds
    assert found.ns == round(seconds * 1e9)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64KiB", 65_536), ("512 MB", 512_000_000), ("1GiB", 1 << 30), ("7", 7), ("1.5kb", 1_500)],
)
def test_sizes(tmp_path: Path, text: str, size: int) -> None:
    assert of(tmp_path, f"inner: {{size: {text}}}").inner.size == size


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert of(tmp_path, "") == of(tmp_path, "# nothing\n") == Top()


def test_drop_ins_are_merged_in_lexical_order_and_errors_name_the_drop_in(tmp_path: Path) -> None:
    (tmp_path / "s.d").mkdir()
    (tmp_path / "s.d" / "20.yaml").write_text("inner: {count: 3}\nmany: [{count: 2}]\n")
    (tmp_path / "s.d" / "10.yaml").write_text("inner: {count: 2, every: 1s}\nname: drop\n")
    found = of(tmp_path, "name: base\nmany: [{count: 1}, {count: 1}]\n")
    assert (found.name, found.inner.count, found.inner.every) == ("drop", 3, 1)
    assert [m.count for m in found.many] == [2]
    (tmp_path / "s.d" / "30.yaml").write_text("\ninner: {cuont: 3}\n")
    with pytest.raises(SettingsError, match=r"30\.yaml:2"):
        of(tmp_path, "")


def test_drop_ins_count_also_where_a_file_that_need_not_be_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "s.d").mkdir()
    (tmp_path / "s.d" / "10.yaml").write_text("name: drop\n")
    assert load(tmp_path / "s.yaml", Top, required=False).name == "drop"
    with pytest.raises(SettingsError, match="no such file"):
        load(tmp_path / "s.yaml", Top)


def test_a_file_that_is_not_there_or_not_readable_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        load(tmp_path / "none.yaml", Top)
    with pytest.raises(SettingsError, match="readable"):
        load(tmp_path, Top)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.text("nameinrcoutvy:[]{}-&*!|> \n\t'\"#0123456789", max_size=120),
        # Right keys with any value, tagged or not: what gets past the parser.
        st.builds(
            "{} {}{}".format,
            st.sampled_from(["name:", "where:", "inner:\n  every:", "inner:\n  size:", "inner:\n  count:"]),
            st.sampled_from(
                ["", *(f"!!{tag} " for tag in ("int", "float", "bool", "null", "binary", "map"))]
            ),
            st.text("0123456789.eE+-_:xKMGTiBmshd'~", max_size=30),
        ),
    )
)
def test_no_text_makes_loading_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
) -> None:
    try:
        assert isinstance(of(tmp_path_factory.mktemp("s"), text), Top)
    except SettingsError as error:
        assert "s.yaml" in str(error)
