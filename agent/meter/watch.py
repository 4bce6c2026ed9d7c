"""What the kernel probes covered between two readings, and what they lost. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from agent.meter.model import ProbeMark
from wire.v1 import usage_pb2 as pb

_LOSES = {
    "births": int(pb.COVERAGE_EXITS),
    "tombstones": int(pb.COVERAGE_EXITS),
    "network_skbs": int(pb.COVERAGE_NETWORK),
}
"""Kind of loss -> what was then not seen as a whole. Other kinds cost no usage: files are read instead, or later."""
SEEN_BY_PROBES = int(pb.COVERAGE_EXITS | pb.COVERAGE_NETWORK)


def losses(before: ProbeMark | None, now: Sequence[ProbeMark]) -> dict[str, int]:
    """Kind -> what there was no room for since the last reading, of usage."""
    lost: dict[str, int] = {}
    for mark in now:
        earlier = before.lost if before is not None and before.load_id == mark.load_id else {}
        for kind in _LOSES:
            more = mark.lost.get(kind, 0) - earlier.get(kind, 0)
            if more > 0:
                lost[kind] = lost.get(kind, 0) + more
    return lost


def covered(before: ProbeMark | None, now: ProbeMark | None, lost: dict[str, int]) -> int:
    """Bits of Coverage: what was watched from the last reading to this one without a hole."""
    if before is None or now is None or before.load_id != now.load_id:
        return 0
    bits = 0
    if before.exits and now.exits:
        bits |= int(pb.COVERAGE_EXITS)
    if before.network and now.network:
        bits |= int(pb.COVERAGE_NETWORK)
    for kind in lost:
        bits &= ~_LOSES[kind]
    return bits
