"""Settings structs -> their reference in Markdown and a commented example file. Nothing is written twice."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from wire.daemon.settings import Bytes, Seconds, struct_fields, struct_in


def reference(into: type[msgspec.Struct]) -> str:
    """A Markdown table per section: key, type, default, meaning."""
    return "\n".join(_section(into, ""))


def example(into: type[msgspec.Struct]) -> str:
    """YAML with every key at its default, commented out; loading it gives the defaults."""
    return "".join(f"{line}\n" for line in _example(into, into(), 0))


def _section(struct: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    yield f"### `{prefix}`" if prefix else "### At the top of the file"
    yield ""
    text = inspect.cleandoc(struct.__doc__ or "")
    if text and prefix:
        yield text
        yield ""
    nested: list[tuple[str, type[msgspec.Struct]]] = []
    rows = []
    defaults = struct()
    for key, annotation in struct_fields(struct).items():
        inner = struct_in(annotation)
        if inner is not None:
            many = {list: "[]", dict: ".NAME"}.get(get_origin(_bare(annotation)), "")
            nested.append((f"{prefix}.{key}{many}".lstrip("."), inner))
            if _is_section(annotation):
                continue
        default = getattr(defaults, key)
        rows.append(f"| `{key}` | {_kind(annotation)} | {_shown(default)} | {_meaning(annotation)} |")
    if rows:
        yield "| key | type | default | meaning |"
        yield "|---|---|---|---|"
        yield from rows
        yield ""
    for name, inner in nested:
        yield from _section(inner, name)


def _example(struct: type[msgspec.Struct], values: Any, depth: int) -> Iterator[str]:
    indent = "  " * depth
    # Plain keys first: below a section they would look like a part of it.
    for key, annotation in sorted(struct_fields(struct).items(), key=lambda item: _is_section(item[1])):
        value = getattr(values, key)
        inner = struct_in(annotation)
        if inner is not None and _is_section(annotation):
            yield ""
            yield f"{indent}# {' '.join(inspect.cleandoc(inner.__doc__ or '').split())}"
            yield f"{indent}#{key}:"
            yield from _example(inner, value, depth + 1)
            continue
        yield f"{indent}# {_meaning(annotation)}"
        yield f"{indent}#{key}: {_yaml(value)}"


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_section(annotation: Any) -> bool:
    bare = _bare(annotation)
    return isinstance(bare, type) and issubclass(bare, msgspec.Struct)


def _meta(annotation: Any) -> msgspec.Meta | None:
    return next((m for m in get_args(annotation)[1:] if isinstance(m, msgspec.Meta)), None)


def _meaning(annotation: Any) -> str:
    meta = _meta(annotation)
    assert meta is not None, "every key is documented where it is declared"
    assert meta.description
    bounds = [f"{word} {n}" for word, n in (("at least", meta.ge), ("at most", meta.le)) if n is not None]
    return meta.description + (f" ({', '.join(bounds)})" if bounds else "")


_NAMES = {
    int: "number",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    Seconds: "duration",
    Bytes: "size",
}


def _kind(annotation: Any) -> str:
    bare = _bare(annotation)
    if bare in _NAMES:
        return _NAMES[bare]
    origin = get_origin(bare)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in get_args(bare))
    if origin is list:
        return f"list of {_kind(get_args(bare)[0])}"
    if origin is dict:
        return f"map of {_kind(get_args(bare)[1])}"
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        return "section, see below"
    # X | None
    return " or ".join(_kind(a) for a in get_args(bare) if a is not type(None))


def _shown(value: Any) -> str:
    return "none" if value is None else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Seconds):
        return _scaled(
            round(value * 1000), ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms"))
        )
    if isinstance(value, Bytes):
        return _scaled(int(value), ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "")))
    if isinstance(value, str) and not value:
        return '""'
    if isinstance(value, (list, dict)):
        assert not value, "defaults are empty"
        return "[]" if isinstance(value, list) else "{}"
    return f'"{value}"' if isinstance(value, str) and ":" in value else str(value)


def _scaled(value: int, units: tuple[tuple[int, str], ...]) -> str:
    return next(f"{value // size}{name}" for size, name in units if value % size == 0)
