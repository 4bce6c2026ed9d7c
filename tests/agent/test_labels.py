"""Label sources over real unix sockets: bounded, opt-in, and never in the way of metering."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from agent.meter import labels
from agent.meter.labels import CriLabels, DockerLabels, LabelCache
from agent.meter.owners import NO_LABELS, LabelsSettings

ID = "f" * 64


@contextmanager
def docker(path: Path, answer: bytes) -> Iterator[list[bytes]]:
    """Something that listens like Docker and gives one answer to everything."""
    asked: list[bytes] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(65_536))
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def containers(*entries: object) -> bytes:
    return http(json.dumps(list(entries)).encode())


def test_docker_names_and_labels_are_read_and_made_safe(tmp_path: Path) -> None:
    entry = {"Id": ID, "Names": ["/we\x1bb"], "Labels": {"tenant": "acme", "evil": "a\nb" + "x" * 5_000}}
    with docker(tmp_path / "d.sock", containers(entry, {"nothing": 1}, 7)) as asked:
        found = DockerLabels(tmp_path / "d.sock").list()
    assert asked[0].startswith(b"GET /containers/json?all=1 ")
    assert list(found) == [ID]
    assert found[ID].name == "we\\x1bb"
    assert found[ID].labels["tenant"] == "acme"
    assert "\n" not in found[ID].labels["evil"]
    assert len(found[ID].labels["evil"]) <= labels.MAX_VALUE_BYTES


@pytest.mark.parametrize(
    "answer",
    [http(b"{}"), http(b"not json"), http(b"[]", "500 No"), b"rubbish\r\n\r\n", b"", http(b'"text"')],
)
def test_a_runtime_that_speaks_nonsense_costs_labels_only(tmp_path: Path, answer: bytes) -> None:
    with docker(tmp_path / "d.sock", answer):
        cache = LabelCache([DockerLabels(tmp_path / "d.sock")], 60)
        cache.refresh()
    assert cache.failures == {"docker": 1}
    assert cache.last_error.startswith("docker: ")
    assert cache.get(ID) == NO_LABELS


def test_labels_are_remembered_after_the_container_has_gone(tmp_path: Path) -> None:
    source = DockerLabels(tmp_path / "d.sock")
    cache = LabelCache([source], 0)
    with docker(tmp_path / "d.sock", containers({"Id": ID, "Names": ["/a"], "Labels": None})):
        assert cache.due([ID])
        cache.refresh()
    cache.refresh()
    assert cache.failures == {"docker": 1}
    assert cache.get(ID).name == "a"


def test_no_socket_is_opened_unless_it_is_configured() -> None:
    assert labels.sources(LabelsSettings()) == []


def test_cri_labels_name_the_pod_and_its_namespace(tmp_path: Path) -> None:
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    pairs = {
        "io.kubernetes.pod.namespace": "shop",
        "io.kubernetes.pod.name": "web-1",
        "io.kubernetes.container.name": "nginx",
    }
    entries = b"".join(field(8, field(1, k.encode()) + field(2, v.encode())) for k, v in pairs.items())
    body = field(1, b"c1") + bytes([6 << 3, 1]) + entries
    answer = bytes([1 << 3 | 2]) + bytes([len(body) & 0x7F | 0x80, len(body) >> 7]) + body
    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context: answer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("runtime.v1.RuntimeService", {"ListContainers": handler}),)
    )
    server.add_insecure_port(f"unix://{tmp_path}/cri.sock")
    server.start()
    try:
        found = CriLabels(tmp_path / "cri.sock").list()
    finally:
        server.stop(0).wait()
    assert found["c1"].name == "nginx"
    assert found["c1"].namespace == "shop"


def test_a_cri_that_is_not_there_costs_labels_only(tmp_path: Path) -> None:
    cache = LabelCache([CriLabels(tmp_path / "none.sock")], 60)
    cache.refresh()
    assert cache.failures == {"cri": 1}
