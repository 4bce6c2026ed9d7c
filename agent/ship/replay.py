"""Send exported batches again, each under the identity it was born with, so that a replay changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import grpc
from google.protobuf.message import DecodeError

from agent.ship.export import read_export
from agent.ship.spool_file import SpoolError
from wire.identity import AgentId, digest
from wire.statuses import Reason, Status
from wire.v1 import ingest_pb2 as pb
from wire.v1 import usage_pb2
from wire.v1.ingest_pb2_grpc import IngestStub

ITEMS = 50
TIMEOUT_SECONDS = 60.0


def replay(
    files: Iterable[BinaryIO], agent_id: AgentId, channel: grpc.Channel, timeout_seconds: float
) -> Counter[str]:
    """Deliver every batch of the exports; how many of each answer. SpoolError names what cannot be sent."""
    items = [_item(body, agent_id) for file in files for body in read_export(file)]
    answers: Counter[str] = Counter()
    if not items:
        return answers

    def requests() -> Iterator[pb.DeliverRequest]:
        # oldest_seq 0: what this file does not hold says nothing about the stream.
        hello = pb.Hello(
            epoch=items[-1].epoch, next_seq=items[-1].seq + 1, producer="weighbridge-agent/replay"
        )
        yield pb.DeliverRequest(hello=hello)
        for start in range(0, len(items), ITEMS):
            yield pb.DeliverRequest(delivery=pb.Delivery(items=items[start : start + ITEMS]))

    try:
        for response in IngestStub(channel).Deliver(requests(), timeout=timeout_seconds):
            for answer in response.answers.answers:
                name = Status.Name(answer.status).removeprefix("STATUS_").lower()
                reason = Reason.Name(answer.reason).removeprefix("REASON_").lower() if answer.reason else ""
                answers[f"{name} {reason}".strip()] += 1
    except grpc.RpcError as error:
        raise SpoolError(
            f"after {answers.total()} of {len(items)} answers: {error.details()}; run it again, nothing is counted twice"
        ) from None
    return answers


def _item(body: bytes, agent_id: AgentId) -> pb.Item:
    try:
        batch = usage_pb2.UsageBatch.FromString(body)
    except DecodeError:
        raise SpoolError("a batch in the file is damaged; export it again") from None
    if batch.agent_id != agent_id:
        raise SpoolError(
            f"the file has batches of agent {batch.agent_id}, this host is {agent_id}: replay it on that host"
        )
    return pb.Item(epoch=batch.epoch, seq=batch.seq, digest=digest(body), batch=body)
