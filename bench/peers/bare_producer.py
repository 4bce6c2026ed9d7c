"""confluent-kafka and nothing else: publishes batches that lie ready as messages, with the collector's own client, that is
with its settings, in groups of its size, each waited for.

A process of its own: `python -m bench.peers.bare_producer BROKER TOPIC FILE...` sends a file of length-delimited batches
for each line with its number on standard input, and answers with how many they were.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from collector.config import Kafka
from collector.handoff.kafka.client import GROUP_BYTES, Client
from collector.handoff.kafka.messages import Message
from wire.delimited import delimited
from wire.v1 import usage_pb2


class BareProducer:
    """The process, and what it is told."""

    def __init__(self, broker: str, topic: str, files: Sequence[Path]) -> None:
        words = [sys.executable, "-m", "bench.peers.bare_producer", broker, topic, *map(str, files)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._heard() == "ready"

    def send(self, number: int) -> int:
        """Publish that file; how many batches were confirmed."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return int(self._heard())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def _heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def _groups(file: Path, topic: str) -> list[list[Message]]:
    groups: list[list[Message]] = []
    size = GROUP_BYTES
    with file.open("rb") as source:
        for one in delimited(source):
            batch = usage_pb2.UsageBatch.FromString(one.body)
            if size >= GROUP_BYTES:
                groups.append([])
                size = 0
            size += len(one.body)
            headers: list[tuple[str, str | bytes | None]] = [
                ("agent_id", batch.agent_id.encode()),
                ("epoch", b"%d" % batch.epoch),
                ("seq", b"%d" % batch.seq),
                ("digest", b"0" * 64),
                ("schema_version", b"%d" % batch.schema_version),
                ("received_at", b"%d" % batch.interval_end_unix_ns),
            ]
            groups[-1].append(Message(topic, batch.tenant.encode(), one.body, headers))
    return groups


def main() -> None:
    broker, topic, *files = sys.argv[1:]
    work = [_groups(Path(file), topic) for file in files]
    client = Client(Kafka(brokers=[broker], topic=topic))
    client.producer.list_topics(timeout=20)
    print("ready", flush=True)
    for line in sys.stdin:
        print(sum(client.deliver(group) for group in work[int(line)]), flush=True)


if __name__ == "__main__":
    main()
