"""The kernel probes of this checkout in a bpffs of the test's own, and what the maps then hold."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import bcc
from bench.probe_set import ProbeSet, directory_for_pins
from bench.short_lives import build

_MISSING = bcc.missing()
needs_bcc = pytest.mark.skipif(
    _MISSING is not None and not os.environ.get("CI"), reason=f"engine bcc needs {_MISSING}: ./dev setup"
)
"""In CI what is missing fails the test."""


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[ProbeSet]:
    """Nothing is loaded yet; whatever is in the end is removed."""
    with directory_for_pins(tmp_path) as directory:
        yield directory


@pytest.fixture
def probes(pins: ProbeSet) -> ProbeSet:
    """Loaded with the defaults."""
    pins.load()
    return pins


@pytest.fixture(scope="session")
def short_lives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of bench/short_lives.c."""
    return build(tmp_path_factory.mktemp("short-lives"))


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """The kernel does some things later, from a worker."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
