"""Text from other people's hosts, made safe to print, store and bill by.

Container names, labels and cgroup names are hostile input: they may hold terminal escapes, bidirectional
overrides, newlines, any byte at all, and 64 KiB of it.
"""

from __future__ import annotations

import unicodedata

_PLAIN = frozenset(chr(code) for code in range(0x20, 0x7F)) - {"\\"}
_UNSAFE_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def visible(text: str, max_bytes: int) -> str:
    """`text` as valid UTF-8 of at most `max_bytes`, with everything unprintable written out.

    A byte that is not UTF-8 (a surrogate escape) becomes \\xNN, control and format characters \\xNN or
    \\u{NNNN}, a backslash \\\\; so two different names stay different unless they are cut.
    """
    if len(text) <= max_bytes and text.isascii() and text.isprintable() and "\\" not in text:
        return text
    out = []
    size = 0
    for character in text[: max_bytes + 1]:
        piece = character if character in _PLAIN else _written(character)
        size += len(piece.encode())
        if size > max_bytes:
            break
        out.append(piece)
    return "".join(out)


def _written(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) in _UNSAFE_CATEGORIES:
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{{{code:x}}}"
    return character
