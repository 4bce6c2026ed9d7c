"""Target: a batch that is compared with the ones before it, byte by byte, before anything is decoded.

The validator has seen a batch of the host and one of a tenant with four containers; an input is a batch that follows. In
`delivery` few inputs come so far.
"""

from __future__ import annotations

from collector.decide.validate import Bounds, Validator
from tests.fuzz.delivery import AGENT, NOW_UNIX_NS, PERMITTED, TENANTS, is_right
from tests.fuzz.seeds import EPOCH, bodies
from wire.identity import BatchId
from wire.v1 import usage_pb2 as pb

SEQ = 20
_stream = [(pb.UsageBatch.FromString(body), body) for body in bodies(4)]
_TAUGHT = [
    next((batch.seq, body) for batch, body in _stream if batch.tenant == tenant and not batch.openings)
    for tenant in ("host", "acme")
]


def likeness(data: bytes) -> None:
    """The verdict is that of the contract, whichever way it was found."""
    validator = Validator(Bounds(tenants=TENANTS))
    for seq, body in _TAUGHT:
        assert validator.check(body, AGENT, EPOCH, seq, PERMITTED, NOW_UNIX_NS).refusal is None
    checked = validator.check(data, AGENT, EPOCH, SEQ, PERMITTED, NOW_UNIX_NS)
    is_right(checked, data, BatchId(AGENT, EPOCH, SEQ))


def followers() -> list[bytes]:
    """What the agent would send next if everybody went on as before."""
    out = []
    for _, body in _TAUGHT:
        batch = pb.UsageBatch.FromString(body)
        batch.seq, batch.previous_digest = SEQ, bytes(range(32))
        out.append(batch.SerializeToString(deterministic=True))
    return out
