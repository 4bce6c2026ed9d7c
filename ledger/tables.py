"""Answers of the ledger as people read them: aligned columns, and exact numbers beside readable ones. Pure.

Tenants' and containers' names are other people's words: nothing of them reaches a terminal raw.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ledger.times import iso
from wire.measures import MEASURES

MAX_NAME_CHARACTERS = 60
MAX_TEXT_CHARACTERS = 1_000
_HOUR = 3_600
_MAIN = ("cpu_usage_ns", "memory_byte_seconds")
"""Measures that a table shows both readable and exactly; what bills are made of."""
_MORE = ("io_read_bytes", "io_write_bytes", "net_rx_external_bytes", "net_tx_external_bytes")
"""Measures that it shows readable; all the others are for --json and --csv."""
_HEADINGS = {"cpu_usage_ns": "CPU HOURS", "memory_byte_seconds": "GIB HOURS"}
_NAMES = ("tenant", "name")
"""Words of others, that are nothing else even if they look like a number."""
_SENTENCES = ("text", "sentence", "reason")
"""Stand last, and are not cut: they name batches."""
_FORMULAS = ("=", "+", "-", "@")


def plain(text: str) -> str:
    """Without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def readable(key: str, value: Any) -> str:
    """A value by the unit that its key ends in; `-` for what nobody knows."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, dict)):
        return str(len(value))
    number = _whole(value)
    if number is None or key in _NAMES:
        return _cut(plain(str(value)), MAX_TEXT_CHARACTERS if key in _SENTENCES else MAX_NAME_CHARACTERS)
    if key.endswith("_unix_ns"):
        return iso(number)
    if key.endswith("_byte_seconds"):
        return f"{number / (_HOUR << 30):.4f}"
    if key in MEASURES and key.endswith("_ns"):
        return f"{number / (_HOUR * 10**9):.4f}"
    return _size(number) if key.endswith("_bytes") else str(number)


def _whole(value: Any) -> int | None:
    """Of an int, or of one that is too large for JSON and so comes as text."""
    if isinstance(value, int):
        return value
    if isinstance(value, str) and value.removeprefix("-").isascii() and value.removeprefix("-").isdigit():
        return int(value) if len(value) < 50 else None
    return None


def _size(number: int) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(number) >= 1 << power:
            return f"{number / (1 << power):.1f} {unit}"
    return f"{number} B"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each; a column for each key but the lesser measures. Empty for no rows."""
    if not rows:
        return ""
    columns = list(_columns(dict.fromkeys(key for row in rows for key in row)))
    cells = [[heading for heading, _, _ in columns]]
    cells += [[_cell_of(row, key, exact) for _, key, exact in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [
        key in (*_NAMES, *_SENTENCES) or any(_is_text(row.get(key)) for row in rows) for _, key, _ in columns
    ]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell_of(row: Mapping[str, Any], key: str, exact: bool) -> str:
    if key not in row:
        return ""
    value = row[key]
    return plain(str(value)) if exact and value is not None else readable(key, value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and _whole(value) is None


def _columns(keys: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(heading, key, whether exactly)."""
    found = sorted(keys, key=lambda key: key in _SENTENCES)
    for key in found:
        if key not in MEASURES:
            yield plain(key.removesuffix("_unix_ns").replace("_", " ").upper()), key, False
    for key in _MAIN:
        if key in found:
            yield _HEADINGS[key], key, False
            yield key, key, True
    for key in _MORE:
        if key in found:
            yield key.removesuffix("_bytes").replace("_", " ").upper(), key, False


def facts(answer: Mapping[str, Any], indent: str = "") -> str:
    """A line for each key; lists of objects as tables below theirs."""
    lines = []
    width = max((len(key) for key in answer), default=0)
    for key, value in answer.items():
        label = f"{indent}{plain(key.replace('_', ' ')):{width}}"
        if isinstance(value, dict):
            lines += [label.rstrip(), *([facts(value, f"{indent}  ")] if value else [f"{indent}  nothing"])]
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            lines.append(f"{label}  {len(value)}")
            lines += [f"{indent}  {line}" for line in table(value).splitlines()]
        elif isinstance(value, list):
            lines.append(f"{label}  {', '.join(plain(str(one)) for one in value) or 'none'}")
        else:
            lines.append(f"{label}  {_exact_too(key, value)}")
    return "\n".join(lines)


def _exact_too(key: str, value: Any) -> str:
    shown = readable(key, value)
    if key in _MAIN:
        return f"{shown} {_HEADINGS[key].lower()} ({plain(str(value))})"
    return f"{shown} ({value})" if shown.endswith("iB") else shown


def as_json(value: Any) -> str:
    """One line of ASCII. DEL is the one control character that JSON leaves as it is."""
    return json.dumps(value).replace("\x7f", "\\u007f")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """All columns, exactly; `known_in_part` and other lists joined by blanks, what nobody knows empty. Text that a
    spreadsheet would take for a formula gets an apostrophe before it, as spreadsheets write text."""
    out = io.StringIO()
    if rows:
        writer = csv.writer(out, lineterminator="\n")
        keys = list(dict.fromkeys(key for row in rows for key in row))
        writer.writerow(keys)
        writer.writerows([_cell(row.get(key)) for key in keys] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return plain(" ".join(map(str, value)))
    if isinstance(value, dict):
        return as_json(value)
    text = plain(str(value))
    return f"'{text}" if text.startswith(_FORMULAS) and not _number(value) else text


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) or _whole(value) is not None
