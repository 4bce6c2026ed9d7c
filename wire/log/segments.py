"""The files of the log's directory, by the offsets they begin at."""

from __future__ import annotations

from pathlib import Path


def segments(directory: Path) -> list[int]:
    """First offsets of the segments, ascending."""
    return sorted(int(path.stem) for path in directory.glob("[0-9]*.log") if path.stem.isdigit())


def segment_path(directory: Path, base: int) -> Path:
    return directory / f"{base:020d}.log"
