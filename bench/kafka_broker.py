"""A real Kafka broker of our own: Kafka's jars on Java 17, KRaft, one node, below one directory, ended by its pid.

The jars come through Maven once and lie in `${XDG_CACHE_HOME:-~/.cache}/weighbridge/kafka`, outside the checkout.
Listeners: PLAINTEXT (everything is allowed), SASL (PLAIN; `writer` may use the topics that exist and make none), TLS.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from bench.ports import free_ports
from collector.door.ca import CertificateAuthority

POM = Path(__file__).with_name("kafka_broker.xml")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weighbridge/kafka"
FETCH_SECONDS = 600
HEAP = "-Xmx256m"
USERS = {"writer": "writer-secret", "admin": "admin-secret"}


def missing() -> str:
    """What is not installed that a broker needs, or empty."""
    tools = [tool for tool in ("java", "mvn") if shutil.which(tool) is None]
    return (
        f"needs {' and '.join(tools)}; ./dev setup installs openjdk-17-jre-headless and maven"
        if tools
        else ""
    )


def jars() -> Path:
    """Directory of the broker's jars; fetched when this is the first time."""
    directory = CACHE / hashlib.sha256(POM.read_bytes()).hexdigest()[:16]
    if directory.exists():
        return directory
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = CACHE / f".{directory.name}.{os.getpid()}"
    try:
        done = subprocess.run(
            ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={fresh}"],
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
        )
        assert done.returncode == 0, f"Kafka's jars cannot be fetched:\n{done.stdout}{done.stderr}"
        with contextlib.suppress(OSError):  # somebody else was faster
            fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    assert directory.exists()
    return directory


class KafkaBroker:
    """Starts, stops for a while, is killed, and comes back on its ports with its data."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        plain, sasl, tls, controller = free_ports(4)
        self.plain, self.sasl, self.tls = (f"127.0.0.1:{port}" for port in (plain, sasl, tls))
        self._controller = f"127.0.0.1:{controller}"
        self._ca = directory / "ca"
        self.ca_file = self._ca / "ca.crt"
        """Who signed the broker's certificate."""

    def start(self, seconds: float = 240.0) -> None:
        """Start and wait until it takes connections; after a kill it verifies what it has first."""
        assert self.process is None
        settings = self.directory / "server.properties"
        if not settings.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            CertificateAuthority.init(self._ca, "kafka.example", ["127.0.0.1"])
            settings.write_text(self._properties())
            node = "KJ2pQ0b4Qh6o4WmL1nYw7A"
            self._java("kafka.tools.StorageTool", "format", "-t", node, "-c", str(settings)).wait(seconds)
        self.process = self._java("kafka.Kafka", str(settings))
        deadline = time.monotonic() + seconds
        while not self._answers():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def pause(self) -> None:
        """As a machine that hangs: connections stay, nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def make_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        new = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(config or {}))
        client = AdminClient({"bootstrap.servers": self.plain})
        for future in client.create_topics([new]).values():
            future.result()

    def messages_in(self, topic: str) -> int:
        """How many messages a topic holds, by its partitions' ends."""
        consumer = Consumer({"bootstrap.servers": self.plain, "group.id": "counts"})
        try:
            partitions = consumer.list_topics(topic, timeout=20).topics[topic].partitions
            places = [TopicPartition(topic, number) for number in partitions]
            return sum(consumer.get_watermark_offsets(place, timeout=20)[1] for place in places)
        finally:
            consumer.close()

    def log(self) -> str:
        return (self.directory / "broker.log").read_text(errors="replace")[-4_000:]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _java(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.directory / "broker.log").open("ab") as log:
            return subprocess.Popen(
                ["java", HEAP, "-cp", f"{jars()}/*", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _answers(self) -> bool:
        for address in (self.plain, self.sasl, self.tls):
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0:
                    return False
        return True

    def _properties(self) -> str:
        users = " ".join(f'user_{name}="{secret}"' for name, secret in USERS.items())
        lines = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{self._controller}",
            "listeners": f"PLAINTEXT://{self.plain},SASL_PLAINTEXT://{self.sasl},SSL://{self.tls},"
            f"CONTROLLER://{self._controller}",
            "advertised.listeners": f"PLAINTEXT://{self.plain},SASL_PLAINTEXT://{self.sasl},SSL://{self.tls}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,SSL:SSL,"
            "CONTROLLER:PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": self.directory / "data",
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": 1,
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": "org.apache.kafka.common.security.plain."
            f"PlainLoginModule required {users};",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": self._ca / "server.pem",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS;User:admin",
        }
        return "".join(f"{key}={value}\n" for key, value in lines.items())
