"""Container names and labels from runtimes, each source opt-in. The only I/O of this package.

A Docker or CRI socket is as good as root, so none is used unless configured, and none is needed to meter.
A source that fails costs labels, never readings: every answer is bounded in time and size.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agent.meter.hostile import visible
from agent.meter.owners import NO_LABELS, Labels, LabelsSettings
from wire.limits import MAX_NAME_BYTES

MAX_ANSWER_BYTES = 16 << 20
MAX_LABELS = 64
MAX_VALUE_BYTES = 1_024
MAX_REMEMBERED = 20_000
TIMEOUT_SECONDS = 2.0
ASK_AT_MOST_EVERY_SECONDS = 1.0

_POD_NAME, _POD_NAMESPACE = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace"
_CONTAINER_NAME = "io.kubernetes.container.name"


class LabelSource(Protocol):
    """Asked from a worker thread; raises OSError or ValueError when it has no answer."""

    name: str

    def list(self) -> Mapping[str, Labels]:
        """Every container the runtime knows: id -> labels."""


class DockerLabels:
    """`GET /containers/json?all=1` of the Docker API, which podman speaks too."""

    def __init__(self, socket_path: Path, name: str = "docker") -> None:
        self.name = name
        self._path = str(socket_path)

    def list(self) -> Mapping[str, Labels]:
        connection = _UnixHttp(self._path)
        try:
            connection.request("GET", "/containers/json?all=1", headers={"Host": "localhost"})
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER_BYTES + 1)
            if answer.status != 200 or len(body) > MAX_ANSWER_BYTES:
                raise ValueError(f"{self.name} answered {answer.status} with {len(body)} bytes")
        except http.client.HTTPException as error:
            raise ValueError(f"{self.name} did not speak HTTP: {error!r}") from error
        finally:
            connection.close()
        entries = json.loads(body)
        if not isinstance(entries, list):
            raise ValueError(f"{self.name} answered no list")  # noqa: TRY004 - a wrong answer, not a wrong argument
        out = {}
        for entry in entries:
            if isinstance(entry, dict) and isinstance(entry.get("Id"), str):
                names = entry.get("Names")
                name = str(names[0]).lstrip("/") if isinstance(names, list) and names else None
                out[entry["Id"]] = bounded(name, entry.get("Labels"))
        return out


class CriLabels:
    """`runtime.v1.RuntimeService/ListContainers` of the Container Runtime Interface."""

    name = "cri"

    def __init__(self, socket_path: Path) -> None:
        self._target = f"unix://{socket_path}"

    def list(self) -> Mapping[str, Labels]:
        import grpc

        channel = grpc.insecure_channel(self._target, [("grpc.max_receive_message_length", MAX_ANSWER_BYTES)])
        try:
            call: Any = channel.unary_unary("/runtime.v1.RuntimeService/ListContainers")
            answer = call(b"", timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise ValueError(f"cri: {error.code().name}") from error
        finally:
            channel.close()
        out = {}
        for field, container in _fields(answer):
            if field == 1 and isinstance(container, bytes):
                identifier, labels = _cri_container(container)
                out[identifier] = bounded(labels.get(_CONTAINER_NAME), labels)
        return out


def _cri_container(data: bytes) -> tuple[str, dict[str, str]]:
    """runtime.v1.Container: id = 1, labels = 8 (map<string, string>)."""
    identifier, labels = "", {}
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            identifier = value.decode("utf-8", "replace")
        elif field == 8 and isinstance(value, bytes):
            entry = {k: v.decode("utf-8", "replace") for k, v in _fields(value) if isinstance(v, bytes)}
            labels[entry.get(1, "")] = entry.get(2, "")
    return identifier, labels


def _fields(data: bytes) -> list[tuple[int, bytes | int]]:
    """The fields of one protobuf message. Two are wanted of CRI's hundreds, so no stubs are carried for it."""
    out: list[tuple[int, bytes | int]] = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            number, at = _varint(data, at)
            out.append((tag >> 3, number))
            continue
        length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, -1), at)
        if length < 0 or at + length > len(data):
            raise ValueError("cri: an answer that is no protobuf")
        out.append((tag >> 3, data[at : at + length]))
        at += length
    return out


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("cri: an answer that is no protobuf")


def bounded(name: str | None, raw: Any) -> Labels:
    """Labels out of whatever a runtime said: at most 64, each cut and made printable."""
    pairs = raw.items() if isinstance(raw, dict) else ()
    labels = {
        visible(key, MAX_NAME_BYTES): visible(value, MAX_VALUE_BYTES)
        for key, value in list(pairs)[:MAX_LABELS]
        if isinstance(key, str) and isinstance(value, str)
    }
    return Labels(
        name=visible(name or labels.get(_POD_NAME) or "", MAX_NAME_BYTES) or None,
        namespace=labels.get(_POD_NAMESPACE),
        labels=labels,
    )


class LabelCache:
    """Remembers labels by container id, also after the container's end, for its last row."""

    def __init__(self, sources: Sequence[LabelSource], refresh_seconds: float) -> None:
        self.sources = sources
        self._refresh = refresh_seconds
        self._known: OrderedDict[str, Labels] = OrderedDict()
        self._asked = float("-inf")
        self.failures: dict[str, int] = {}
        self.last_error = ""

    def get(self, container_id: str | None) -> Labels:
        return self._known.get(container_id or "", NO_LABELS)

    def due(self, container_ids: Sequence[str]) -> bool:
        """Whether to ask the sources: someone new, or the time is up."""
        return time.monotonic() - self._asked >= self._refresh or any(
            i not in self._known for i in container_ids
        )

    def refresh(self) -> None:
        """Ask every source. Blocks for at most TIMEOUT_SECONDS each; run it in a thread."""
        self._asked = time.monotonic()
        for source in self.sources:
            try:
                found = source.list()
            except (OSError, ValueError) as error:
                self.failures[source.name] = self.failures.get(source.name, 0) + 1
                self.last_error = f"{source.name}: {error}"
                continue
            for identifier, labels in found.items():
                self._known[identifier] = labels
                self._known.move_to_end(identifier)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)


def sources(settings: LabelsSettings) -> list[LabelSource]:
    out: list[LabelSource] = []
    if settings.docker_socket is not None:
        out.append(DockerLabels(settings.docker_socket))
    if settings.podman_socket is not None:
        out.append(DockerLabels(settings.podman_socket, "podman"))
    if settings.cri_socket is not None:
        out.append(CriLabels(settings.cri_socket))
    return out


class _UnixHttp(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(self._path)
