"""A simulated agent with a spool: it sends each batch until it is answered for, whatever happens in between."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc

from bench.fleet import SECOND_NS, SimulatedAgent, Stream
from bench.site import Site
from wire.statuses import Status
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub


class Sender(threading.Thread):
    """An agent of one tenant that sends what it was not answered for until it was."""

    def __init__(
        self,
        site: Site,
        agent: SimulatedAgent,
        tenant: str,
        rng: random.Random,
        most: int = 40,
        interval_ns: int = SECOND_NS,
    ) -> None:
        """`most`: batches made at once, some ten times a second."""
        super().__init__(daemon=True)
        self._site, self.agent, self._rng, self._most = site, agent, rng, most
        self._stream = Stream(agent.agent_id, 1, rows=30, tenant=tenant, interval_ns=interval_ns)
        self.made: list[pb.Item] = []
        self.spool: dict[int, pb.Item] = {}
        self.more = True
        self.error: Exception | None = None
        self.given_up = False

    def run(self) -> None:
        try:
            while not self.given_up and (self.more or self.spool):
                if self.more:
                    fresh = [self._stream.next() for _ in range(self._rng.randint(1, self._most))]
                    self.made += fresh
                    self.spool |= {item.seq: item for item in fresh}
                self._deliver(list(self.spool.values())[:100])
                time.sleep(self._rng.uniform(0.0, 0.2))
        except Exception as error:
            self.error = error

    def _deliver(self, items: list[pb.Item]) -> None:
        def requests() -> Iterator[pb.DeliverRequest]:
            yield self._stream.hello(items[0].seq if items else None)
            yield pb.DeliverRequest(delivery=pb.Delivery(items=items))

        address = f"127.0.0.1:{self._site.ports['ingest']}"
        with grpc.secure_channel(address, self.agent.credentials, CHANNEL_OPTIONS) as channel:
            try:
                for response in IngestStub(channel).Deliver(requests(), timeout=20):
                    for answer in response.answers.answers:
                        assert answer.status != Status.STATUS_REJECTED, answer
                        if answer.status != Status.STATUS_RETRY:
                            self.spool.pop(answer.seq, None)
            except grpc.RpcError:
                pass  # killed; what was answered before is answered


@contextmanager
def sending(senders: Sequence[Sender]) -> Iterator[None]:
    """They send while the test does its worst, and have been answered for everything in the end."""
    for sender in senders:
        sender.start()
    try:
        yield
        for sender in senders:
            sender.more = False
        for sender in senders:
            sender.join(120)
            assert sender.error is None, sender.error
            assert not sender.spool
    finally:
        for sender in senders:
            sender.given_up = True
