"""Links of the kernel: what keeps programs attached."""

from __future__ import annotations

import json
import subprocess

from bench.probe_set import ProbeSet


def links_of(pins: ProbeSet) -> set[int]:
    """Ids of the links that are pinned, the iterator's included."""
    pinned = [*pins.pins.glob("link_*"), *pins.pins.glob("walk")]
    shown = [_bpftool("link", "show", "pinned", str(path)) for path in pinned]
    return {json.loads(text)["id"] for text in shown}


def living_links() -> set[int]:
    """Ids of all links of the kernel, whoever made them."""
    return {link["id"] for link in json.loads(_bpftool("link", "list"))}


def _bpftool(*words: str) -> str:
    return subprocess.run(["bpftool", "--json", *words], capture_output=True, text=True, check=True).stdout
