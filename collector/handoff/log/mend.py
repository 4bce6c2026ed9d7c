"""What a person may do about damage: make the log readable again, keep everything that is sound, cut nothing."""

from __future__ import annotations

import os
from pathlib import Path

from collector.handoff.log.files import LogError, lock, sync_directory
from wire.log.records import HEADER_BYTES, Bad, filler, pieces
from wire.log.segments import segment_path, segments

MAX_GAP_BYTES = 1 << 30
"""Of a segment that was cut short, or of segments that are gone; more than that is no damage but a loss."""


def repair(directory: Path) -> list[str]:
    """Rewrite segments with bad places; the originals stay as *.log.damaged. Says what it did.
    LogError while a collector runs.
    """
    lock_fd = lock(directory)
    try:
        bases = segments(directory)
        mended = (
            _mend(directory, base, following)
            for base, following in zip(bases, [*bases[1:], None], strict=True)
        )
        return [told for told in mended if told]
    finally:
        os.close(lock_fd)


def _mend(directory: Path, base: int, following: int | None) -> str:
    path = segment_path(directory, base)
    data = path.read_bytes()
    if following is not None and base + len(data) < following:
        missing = following - base - len(data)
        if missing > MAX_GAP_BYTES:
            raise LogError(f"{missing} bytes are missing behind {path}: restore them from a backup")
        data += bytes(missing)
    bad = [piece for piece in pieces(data, base) if isinstance(piece, Bad)]
    if not bad:
        return ""
    mended = bytearray(data)
    for piece in bad:
        # Offsets name records, so what is sound keeps its place and the hole becomes refused records.
        start, stop = piece.offset - base, piece.end - base
        if stop - start >= HEADER_BYTES:
            mended[start:stop] = filler(data[start:stop])
        else:
            del mended[start:]  # shorter than any record, so at the very end
    fresh = path.with_suffix(".log.mended")
    with fresh.open("wb") as file:
        file.write(mended)
        file.flush()
        os.fsync(file.fileno())
    # The original keeps its bytes under a second name before the mended file takes the first.
    kept = _free_name(path)
    os.link(path, kept)
    fresh.replace(path)
    sync_directory(directory)
    return f"{path.name}: {len(bad)} damaged places replaced by fillers; original kept as {kept.name}"


def _free_name(path: Path) -> Path:
    """SEGMENT.log.damaged, with a number behind it from the second repair on."""
    kept, number = path.with_suffix(".log.damaged"), 1
    while kept.exists():
        number += 1
        kept = path.with_suffix(f".log.damaged-{number}")
    return kept
