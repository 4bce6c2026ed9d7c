"""What a proof found."""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_FINDINGS = 100
"""Of one kind are named; all are counted."""


class Finding(NamedTuple):
    kind: str
    text: str
    """For an operator."""
    weight: int = 1
    """How many of this kind it stands for."""

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, "count": self.weight}


def bounded(kind: str, texts: list[str], total: int) -> list[Finding]:
    """The first of them by name, and one that counts the others."""
    named = [Finding(kind, text) for text in texts[:MAX_FINDINGS]]
    if total > len(named):
        named.append(Finding(kind, f"and {total - len(named)} more", total - len(named)))
    return named
