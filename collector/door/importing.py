"""The side door: batches that a person brings, over the control socket of the running collector.

They take the same way as those of agents: identity, validation by the settings of today, the tenants that the agent may
report, admission, the log. Only the certificate is missing; who may open the control socket vouches for the sender
instead, and the audit log names that user. An agent that was never enrolled here may report any tenant that exists.

A batch that is known already is a duplicate here as anywhere, so nothing that is brought twice counts twice.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from collector.audit import Witness
from collector.door.authenticate import Peer
from collector.door.registry import Registry
from collector.errors import CollectorError
from collector.job import Item
from collector.pipeline import Pipeline
from wire.identity import AgentId, digest
from wire.limits import MAX_GROUP_BYTES, MAX_ITEMS_PER_DELIVERY, MAX_VALUE
from wire.statuses import Reason, Status
from wire.v1 import ingest_pb2 as pb

MAX_REQUEST_BYTES = MAX_GROUP_BYTES * 4 // 3 + (256 << 10)
"""Base64, and what stands around it."""
MAX_RUNS = 64
MAX_NAMES_TOLD = 16


class Importer:
    """`commands`: name -> what answers a request. One owner: the event loop."""

    def __init__(self, pipeline: Pipeline, registry: Registry | None, witness: Witness) -> None:
        self._pipeline = pipeline
        self._registry = registry
        self._witness = witness
        self._runs: OrderedDict[str, Counter[str]] = OrderedDict()
        self._count = 0
        self.commands: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "import_begin": self._begin,
            "import_deliver": self._deliver,
            "import_end": self._end,
        }

    async def _begin(self, request: dict[str, Any]) -> dict[str, Any]:
        names = [str(name)[:256] for name in request["names"][:MAX_NAMES_TOLD]]
        await asyncio.to_thread(
            self._witness,
            "import_begun",
            by={"uid": request["peer_uid"]},
            names=names,
            how=str(request["how"])[:32],
        )
        self._count += 1
        run = f"{self._count}"
        self._runs[run] = Counter()
        while len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)
        return {"run": run}

    async def _deliver(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answers as [status, reason, detail, retry_after_ms] in the order of `batches`: [agent, epoch, seq, base64]."""
        run = self._run(request)
        batches = request["batches"]
        if len(batches) > MAX_ITEMS_PER_DELIVERY:
            raise CollectorError(f"{len(batches)} batches in a request, at most {MAX_ITEMS_PER_DELIVERY}")
        by_agent: dict[AgentId, list[int]] = {}
        items = []
        for index, (agent_id, epoch, seq, text) in enumerate(batches):
            items.append(_item(epoch, seq, base64.b64decode(text, validate=True)))
            by_agent.setdefault(AgentId(str(UUID(agent_id))), []).append(index)
        answers: list[pb.Answer] = [pb.Answer()] * len(items)
        told = await asyncio.gather(
            *(
                self._pipeline.deliver(self._peer(agent_id), [items[index] for index in indexes])
                for agent_id, indexes in by_agent.items()
            )
        )
        for indexes, some in zip(by_agent.values(), told, strict=True):
            for index, answer in zip(indexes, some, strict=True):
                answers[index] = answer
        return {"answers": [_told(run, answer) for answer in answers]}

    async def _end(self, request: dict[str, Any]) -> dict[str, Any]:
        answers = dict(self._run(request))
        await asyncio.to_thread(
            self._witness, "import_ended", by={"uid": request["peer_uid"]}, answers=answers
        )
        del self._runs[request["run"]]
        return {"answers": answers}

    def _run(self, request: dict[str, Any]) -> Counter[str]:
        run = self._runs.get(request["run"])
        if run is None:
            raise CollectorError(
                "the collector was started anew meanwhile: run it again, nothing is counted twice"
            )
        return run

    def _peer(self, agent_id: AgentId) -> Peer:
        record = self._registry.agent(agent_id) if self._registry is not None else None
        return Peer(agent_id, "", math.inf, record.tenants if record else None)


def _item(epoch: int, seq: int, body: bytes) -> Item:
    """Numbers that the contract cannot carry become 0, which the pipeline refuses."""
    epoch, seq = (number if 0 < number < MAX_VALUE else 0 for number in (epoch, seq))
    return Item(epoch, seq, digest(body), body)


def _told(run: Counter[str], answer: pb.Answer) -> list[object]:
    status = Status.Name(answer.status).removeprefix("STATUS_").lower()
    if answer.status != Status.STATUS_RETRY:
        run[status] += 1
    reason = Reason.Name(answer.reason) if answer.reason else ""
    return [status, reason, answer.detail, answer.retry_after_ms]
