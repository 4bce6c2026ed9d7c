"""The three topics: made where they are missing, checked before anything is published.

What would lose usage or block the way is a finding that stops (`stops`); what only makes a loss likelier is named.
"""

from __future__ import annotations

from typing import NamedTuple

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from collector.config import Kafka
from collector.handoff.kafka.client import Client
from wire.daemon.journal import Journal
from wire.kafka.topics import MAX_VALUE_BYTES, OVERHEAD_BYTES, Topics
from wire.limits import MAX_BATCH_BYTES

LEAST_RETENTION_MS = 86_400_000
"""A ledger that is away for a weekend's night must still find everything."""

log = Journal("collector.kafka")


class Finding(NamedTuple):
    text: str
    """What, and the fix."""
    stops: bool


class TopicCheck:
    """Looks at the topics, and makes them."""

    def __init__(self, client: Client, kafka: Kafka) -> None:
        self._client = client
        self._kafka = kafka
        self._seconds = float(kafka.delivery_timeout)
        self._admin = AdminClient(client.configuration)
        usage, parked, rejected = self.names = Topics.of(kafka.topic)
        batch = MAX_BATCH_BYTES + OVERHEAD_BYTES
        self._needed_bytes = {usage: batch, parked: batch, rejected: MAX_VALUE_BYTES + OVERHEAD_BYTES}

    def findings(self, make: bool) -> list[Finding]:
        """What is wrong. `make`: topics that are missing are made, where the settings allow it; else only whether they
        could be. KafkaAway when nobody answers."""
        copies = self._copies()
        missing = [name for name in self.names if name not in copies]
        found: list[Finding] = []
        if missing:
            found += self._make(missing, validate_only=not make)
            copies = self._copies() if make and not found else copies
        found += self._settings({name: copies[name] for name in self.names if name in copies})
        return found

    def _copies(self) -> dict[str, int]:
        """Topic -> replicas of its partition that has the fewest."""
        try:
            # All of them: asking for one by name could make it, with the brokers' defaults.
            known = self._client.producer.list_topics(timeout=self._seconds).topics
        except KafkaException as error:
            raise self._client.away(error, "no broker answers") from error
        return {
            name: min((len(partition.replicas) for partition in topic.partitions.values()), default=0)
            for name, topic in known.items()
            if topic.error is None
        }

    def _make(self, missing: list[str], validate_only: bool) -> list[Finding]:
        kafka = self._kafka
        if not kafka.create_topics:
            names = ", ".join(missing)
            return [
                Finding(
                    f"topics {names} are missing; create them, or set `handoff.kafka.create_topics`", True
                )
            ]
        wanted = [
            NewTopic(
                name,
                num_partitions=kafka.partitions,
                replication_factor=-1 if kafka.replication is None else kafka.replication,
                config=self._wanted(name),
            )
            for name in missing
        ]
        futures = self._admin.create_topics(
            wanted,
            validate_only=validate_only,
            request_timeout=self._seconds,
            operation_timeout=self._seconds,
        )
        found = []
        for name, future in futures.items():
            try:
                future.result()
            except KafkaException as error:
                code = error.args[0].code()
                if code != KafkaError.TOPIC_ALREADY_EXISTS:
                    away = self._client.away(error, f"topic {name} is missing and cannot be made")
                    found.append(Finding(f"{away}; or create it by hand: {self._by_hand(name)}", True))
            else:
                if not validate_only:
                    log.info("topic_created", topic=name, partitions=kafka.partitions)
        return found

    def _wanted(self, name: str) -> dict[str, str]:
        config = {
            "cleanup.policy": "delete",
            "retention.ms": str(round(self._kafka.retention * 1_000)),
            "max.message.bytes": str(self._needed_bytes[name]),
        }
        if self._kafka.replication is not None:
            config["min.insync.replicas"] = str(min(2, self._kafka.replication))
        return config

    def _by_hand(self, name: str) -> str:
        configs = " ".join(f"--config {key}={value}" for key, value in self._wanted(name).items())
        return f"kafka-topics.sh --create --topic {name} --partitions {self._kafka.partitions} {configs}"

    def _settings(self, copies: dict[str, int]) -> list[Finding]:
        found: list[Finding] = []
        if not copies:
            return found
        futures = self._admin.describe_configs(
            [ConfigResource(ResourceType.TOPIC, name) for name in copies], request_timeout=self._seconds
        )
        for resource, future in futures.items():
            try:
                config = {key: entry.value or "" for key, entry in future.result().items()}
            except KafkaException as error:
                text = f"topic {resource.name}: its settings cannot be read: {error.args[0].str()}"
                found.append(Finding(f"{text}; allow this user DESCRIBE_CONFIGS to have them checked", False))
            else:
                found += judge(
                    resource.name, config, copies[resource.name], self._needed_bytes[resource.name]
                )
        return found


def judge(name: str, config: dict[str, str], copies: int, needed_bytes: int) -> list[Finding]:
    """What is wrong with one topic's settings. Pure."""
    found = []

    def finding(stops: bool, key: str, why: str, better: object) -> None:
        said = config.get(key, "")
        found.append(Finding(f"topic {name}: {key} is {said}: {why}; set it to {better}", stops))

    if "compact" in config.get("cleanup.policy", "delete"):
        finding(True, "cleanup.policy", "of each tenant all but the last batch would be deleted", "delete")
    if int(config.get("max.message.bytes", needed_bytes)) < needed_bytes:
        finding(True, "max.message.bytes", "the largest batches would not fit", f"{needed_bytes} or more")
    retention_ms = int(config.get("retention.ms", -1))
    if 0 <= retention_ms < LEAST_RETENTION_MS:
        finding(
            False, "retention.ms", "what no ledger reads within it is gone", f"{LEAST_RETENTION_MS} or more"
        )
    if int(config.get("retention.bytes", -1)) >= 0:
        finding(False, "retention.bytes", "a busy hour deletes what no ledger has read", -1)
    if copies >= 2 and int(config.get("min.insync.replicas", 1)) < 2:
        finding(False, "min.insync.replicas", "what one broker alone confirmed is lost with it", 2)
    if copies == 1:
        text = f"topic {name} has one replica: what it holds is lost with one broker"
        found.append(Finding(f"{text}; give it three", False))
    if copies >= 2 and config.get("unclean.leader.election.enable") == "true":
        finding(False, "unclean.leader.election.enable", "confirmed batches may be forgotten", "false")
    return found
