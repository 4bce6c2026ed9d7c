"""What the pipeline carries along with one Delivery, from its arrival to its answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from operator import attrgetter
from typing import NamedTuple

from collector.decide.dedup import StreamState
from collector.door.authenticate import Peer
from collector.tally import TenantTotal
from wire.v1 import ingest_pb2 as pb


class Item(NamedTuple):
    """A batch as it was delivered. Plain, since every look at the bytes of a protobuf message is another copy of them."""

    epoch: int
    seq: int
    digest: bytes
    batch: bytes

    @classmethod
    def of(cls, message: pb.Item) -> Item:
        return cls._make(_fields_of(message))


_fields_of = attrgetter(*Item._fields)


class Park(NamedTuple):
    """A batch to be queued once it is durable."""

    tenant: str
    weight: int
    size: int
    start: int
    """Bytes of the job's records before its own."""


class Job:
    """One Delivery on its way to the disk."""

    __slots__ = ("accepted", "agent", "answers", "begun", "charges", "claims_durable", "done", "frames", "marks",
                 "parks", "peer", "received_at_unix_ns", "rejected", "streams")  # fmt: skip

    def __init__(self, peer: Peer, done: asyncio.Future[list[pb.Answer]]) -> None:
        self.peer = peer
        self.done = done
        self.begun = time.monotonic()
        self.received_at_unix_ns = time.time_ns()
        self.agent = uuid.UUID(peer.agent_id).bytes
        self.answers: list[pb.Answer] = []
        self.frames: list[bytes] = []
        self.streams: dict[int, StreamState] = {}
        """By epoch: those of this Delivery."""
        self.marks: list[tuple[StreamState, int, bytes]] = []
        """(stream, seq, digest) of what is to be marked once it is durable."""
        self.accepted: dict[str, TenantTotal] = {}
        self.charges: dict[str, int] = {}
        """Micro-tokens of those, by tenant: given back if the disk refuses them."""
        self.parks: list[Park] = []
        self.claims_durable = False
        """Some answer says that a batch is on disk, so the disk has to be waited for."""
        self.rejected = 0
