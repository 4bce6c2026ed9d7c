"""Logs to write, spoil and read."""

from __future__ import annotations

from pathlib import Path

from collector.handoff.log import DurableLog, Kind, Record, frame, scan
from wire.identity import digest

AGENT = bytes(range(16))
SEGMENT, FREE = 1 << 20, 0
FIRST = f"{0:020d}.log"


def record(seq: int, body: bytes, kind: Kind = Kind.ACCEPTED, note: bytes = b"") -> list[bytes]:
    return list(frame(kind, seq, AGENT, 7, seq, digest(body), note, body))


def written(directory: Path, groups: list[list[bytes]], segment: int = SEGMENT) -> list[int]:
    """A log of these groups of bodies, closed; the offsets behind each group."""
    log = DurableLog(directory, segment, FREE)
    ends = []
    seq = 0
    for bodies in groups:
        pieces = [piece for seq, body in enumerate(bodies, seq + 1) for piece in record(seq, body)]
        seq += len(bodies)
        ends.append(log.append_and_wait(pieces))
    log.close()
    assert all(end is not None for end in ends)
    return [end for end in ends if end is not None]


def bodies_of(directory: Path) -> list[bytes]:
    return [r.body for r in scan(directory) if isinstance(r, Record)]
