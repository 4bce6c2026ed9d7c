"""What the host must offer to bcc, and the fix for what it lacks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

MODULES = Path("/lib/modules")

_RELEASE = re.compile(r'#define\s+UTS_RELEASE\s+"([^"]*)"')


def without_bcc() -> str | None:
    """What is wrong with the distribution's bcc; None if it is there."""
    found = importlib.util.find_spec("bcc")
    if found is not None and found.origin is not None:
        return None
    return (
        "python3-bpfcc is missing: apt-get install python3-bpfcc"
        " (dnf install python3-bcc; `bcc` of PyPI is something else)"
    )


def without_headers(release: str) -> str | None:
    """What is wrong with the headers of the running kernel, where bcc looks for them; None if they are its own."""
    build = MODULES / release / "build"
    fix = f"apt-get install linux-headers-{release} (dnf install kernel-devel-{release})"
    if not build.is_dir():
        return f"{build}: the headers of the running kernel {release} are missing: {fix}"
    found = _release_of(build)
    if found != release:
        return f"{build} holds headers of {found or 'no known kernel'}, but {release} is running: {fix}"
    return None


def _release_of(build: Path) -> str | None:
    """What the headers themselves say."""
    try:
        text = (build / "include" / "generated" / "utsrelease.h").read_text(errors="replace")
    except OSError:
        return None
    said = _RELEASE.search(text)
    return said[1] if said else None
