"""Typed YAML settings: a file, its drop-ins, and errors that name file, line, key and fix.

Settings are msgspec Structs with `forbid_unknown_fields=True`; every default is in code, so an empty file
is valid. Drop-ins (`agent.d/*.yaml` beside `agent.yaml`, in lexical order) are merged key by key; a list
replaces a list. YAML is read as nodes, so that each value keeps its line; aliases are refused, which ends
alias bombs, and so are duplicate keys, which hide mistakes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

T = TypeVar("T", bound=msgspec.Struct)

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_SECONDS = 1e9
"""Thirty years, and its nanoseconds fit 63 bits."""
MAX_BYTES = 1 << 62

_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_UNIT_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNIT_BYTES |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


class SettingsError(Exception):
    """What is wrong with a settings file, one line per finding, each with its place and its fix."""


class Seconds(float):
    """A duration: a number of seconds or "500ms", "10s", "5m", "1h", "7d"."""

    @property
    def ns(self) -> int:
        return round(self * 1_000_000_000)


class Bytes(int):
    """A size: a number of bytes or "64KiB", "512 MB", "1GiB"."""


_Place = tuple[str, int]
_Path = tuple[str | int, ...]


def load(path: Path, into: type[T], required: bool = True) -> T:
    """The settings of a file and its drop-ins. SettingsError when any of them cannot be used. A file that is not
    `required` may be missing: its drop-ins count all the same."""
    places: dict[_Path, _Place] = {}
    merged: dict[str, Any] = {}
    for file in files_of(path):
        if not required and file == path and not path.exists():
            continue
        _merge(merged, _read(file, places))
    return convert(merged, into, places, str(path))


def files_of(path: Path) -> tuple[Path, ...]:
    """A settings file and its drop-ins, in the order in which they are laid over one another."""
    return path, *sorted((path.parent / f"{path.stem}.d").glob("*.yaml"))


def convert(raw: Mapping[str, Any], into: type[T], places: Mapping[_Path, _Place], origin: str) -> T:
    """Typed settings out of plain values; `places` says where each key stands."""

    def at(path: _Path) -> str:
        while path and path not in places:
            path = path[:-1]
        file, line = places.get(path, (origin, 1))
        return f"{file}:{line}"

    findings = [f"{at(path)}: {text}" for path, text in _unknown_keys(raw, into, (), into)]
    if findings:
        raise SettingsError("\n".join(findings))
    try:
        return msgspec.convert(raw, into, strict=True, dec_hook=_decode)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        where_path = _parse_path(where.rstrip("`"))
        dotted = ".".join(str(p) for p in where_path) or "(whole file)"
        raise SettingsError(f"{at(where_path)}: {dotted}: {_plain(text)}") from None


def _read(file: Path, places: dict[_Path, _Place]) -> dict[str, Any]:
    try:
        with file.open("rb") as handle:
            data = handle.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError(
            f"{file}: no such file; create it (an empty file means all defaults) or name another with --config"
        ) from None
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}; make it a file readable by this user") from None
    if len(data) > MAX_FILE_BYTES:
        raise SettingsError(f"{file}: larger than {MAX_FILE_BYTES} bytes; is this a settings file?")
    try:
        node = yaml.compose(data.decode(), Loader=yaml.CSafeLoader)
        value = None if node is None else _plain_value(node, (), str(file), places, set())
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SettingsError(f"{file}:{line}: not UTF-8; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        lines = data.decode().splitlines()
        tab = line <= len(lines) and lines[line - 1].lstrip(" ").startswith("\t")
        hint = "; indent with spaces, not tabs" if tab else ""
        raise SettingsError(f"{file}:{line}: not YAML: {error.problem}{hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{file}:1: not YAML: {' '.join(str(error).split())[:200]}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"{file}:1: expected `key: value` lines, found a {_yaml_name(value)}")
    return value


def _plain_value(node: yaml.Node, path: _Path, file: str, places: dict[_Path, _Place], seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    places[path] = (file, places.get(path, (file, line))[1] if places.get(path, ("", 0))[0] == file else line)
    if id(node) in seen:
        raise SettingsError(f"{file}:{line}: aliases (*name) are not accepted; write the value out")
    if len(path) > MAX_DEPTH:
        raise SettingsError(f"{file}:{line}: nested deeper than {MAX_DEPTH} levels")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise SettingsError(f"{file}:{key_line}: a key must be plain text")
            key = key_node.value
            if key in out:
                raise SettingsError(f"{file}:{key_line}: `{key}` stands twice; keep one")
            places[(*path, key)] = (file, key_line)
            out[key] = _plain_value(value_node, (*path, key), file, places, seen)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain_value(n, (*path, i), file, places, seen) for i, n in enumerate(node.value)]
    loader = yaml.CSafeLoader("")
    try:
        value = loader.construct_object(node)
    # PyYAML's constructors trip over explicit tags (`!!int ""`, `!!bool x`, `!!timestamp x`).
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise SettingsError(f"{file}:{line}: {' '.join(str(error).split())[:200]}; quote the value") from None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(node.value)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def struct_fields(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Key -> annotation (with its Meta) of a settings struct."""
    return get_type_hints(struct, include_extras=True)


def struct_in(annotation: Any) -> type[msgspec.Struct] | None:
    """The settings struct an annotation holds, directly, as `X | None`, in a list or as a map's values."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    for argument in get_args(annotation):
        found = struct_in(argument)
        if found is not None:
            return found
    return None


def _unknown_keys(
    raw: Any, annotation: Any, path: _Path, top: type[msgspec.Struct]
) -> Iterator[tuple[_Path, str]]:
    if isinstance(raw, list):
        for index, item in enumerate(raw):
            yield from _unknown_keys(item, annotation, (*path, index), top)
    struct = struct_in(annotation)
    if struct is None or not isinstance(raw, dict):
        return
    if any(get_origin(a) is dict for a in (annotation, *get_args(annotation))):
        for key, value in raw.items():
            yield from _unknown_keys(value, struct, (*path, key), top)
        return
    fields = struct_fields(struct)
    for key, value in raw.items():
        if key in fields:
            yield from _unknown_keys(value, fields[key], (*path, key), top)
            continue
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
        elsewhere = [p for p in _all_keys(top) if p.rsplit(".", 1)[-1] == key]
        if near:
            fix = f"did you mean `{near[0]}`?"
        elif elsewhere:
            fix = f"it belongs under `{elsewhere[0]}`"
        else:
            fix = f"known here: {', '.join(sorted(fields))}"
        yield (*path, key), f"{'.'.join(str(p) for p in (*path, key))}: unknown key; {fix}"


def _all_keys(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for key, annotation in struct_fields(struct).items():
        yield f"{prefix}{key}"
        inner = struct_in(annotation)
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{key}.")


def _decode(kind: type, value: Any) -> Any:
    if kind is Seconds:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < MAX_SECONDS:
            return Seconds(value)
        match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
        if match and match[2] in _UNIT_SECONDS:
            seconds = float(match[1]) * _UNIT_SECONDS[match[2]]
            if seconds < MAX_SECONDS:
                return Seconds(seconds)
        raise ValueError(f"expected a duration such as 10s, 5m or 1h, found {value!r}")
    if kind is Bytes:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_BYTES:
            return Bytes(value)
        match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
        if match and match[2].lower() in _UNIT_BYTES:
            size = float(match[1]) * _UNIT_BYTES[match[2].lower()]
            if size < MAX_BYTES:
                return Bytes(size)
        raise ValueError(f"expected a size such as 64KiB, 512MB or 1GiB, found {value!r}")
    assert kind is Path or issubclass(kind, Path), f"settings have no way to read a {kind}"
    if isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    raise ValueError(f"expected a path, found {value!r}")


_TYPE_NAMES = {
    "int": "a whole number",
    "str": "text",
    "bool": "true or false",
    "object": "a map of keys",
    "array": "a list",
    "float": "a number",
    "null": "nothing (null)",
}


def _plain(text: str) -> str:
    """msgspec's message in the words of a YAML file."""
    for name, words in _TYPE_NAMES.items():
        text = text.replace(f"`{name} | null`", f"{words} or nothing").replace(f"`{name}`", words)
    return text[:1].lower() + text[1:]


def _parse_path(where: str) -> _Path:
    parts: list[str | int] = []
    for name, index in re.findall(r"\.([^.\[]+)|\[([0-9]+|\.\.\.)\]", where):
        parts.append(name or (int(index) if index.isdigit() else "*"))
    return tuple(parts)


def _yaml_name(value: Any) -> str:
    return "list" if isinstance(value, list) else "single value"
