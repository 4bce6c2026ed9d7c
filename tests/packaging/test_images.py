"""The images, built from the packages and run as the manifests say: their users, read-only roots, commands and volumes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.packaging.apart import Apart
from tests.packaging.built import PARTS, Built
from tests.packaging.images import Image, Images
from tests.packaging.node import NAME, Node, Pod
from tests.packaging.test_deployment import objects

pytestmark = pytest.mark.root

MOST_BYTES = {"agent": 220_000_000, "collector": 240_000_000}
USERS = {"agent": "weighbridge", "collector": "weighbridge-collector"}
OFTEN = "meter: {interval: 1s, memory_sample: 1s}\n"


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with Apart() as made:
        yield made


@pytest.fixture(scope="module")
def images(built: Built, apart: Apart) -> dict[str, Image]:
    return Images(apart).build(built)


@pytest.fixture(scope="module")
def pods(images: dict[str, Image]) -> dict[str, Pod]:
    """By the name of their part."""
    found = {}
    for (kind, name), document in objects("one").items():
        if kind in ("DaemonSet", "StatefulSet"):
            spec = document["spec"]
            claims = frozenset(claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", []))
            part = name.removeprefix("weighbridge-")
            found[part] = Pod(spec["template"]["spec"], images[part], claims)
    return found


@pytest.fixture(scope="module")
def node(apart: Apart, images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory) -> Node:
    settings = {
        name: document["data"] for (kind, name), document in objects("one").items() if kind == "ConfigMap"
    }
    hosts = ["weighbridge-collector.weighbridge.svc"]
    return Node(apart, tmp_path_factory.mktemp("node"), hosts, settings)


@pytest.mark.parametrize("part", PARTS)
def test_an_image_takes_no_more_room_than_is_said(images: dict[str, Image], part: str) -> None:
    assert MOST_BYTES[part] / 2 < images[part].size_bytes <= MOST_BYTES[part]


def test_version(node: Node, pods: dict[str, Pod]) -> None:
    print(node.run(pods["agent"], "agent", "--version"))
    print(node.run(pods["agent"], "agent", "check-config"))
    print(node.run(pods["collector"], "ca"))
    node.start(pods["collector"], "collector")
    node.wait_well("collector", 9464, "/readyz")
    token = node.execute("collector", "weighbridge-collector", "token", "create")
    print(token)
    print(node.run(pods["agent"], "probes"))
    (node.volume(pods["agent"], "tokens") / NAME).write_text(token)
    print(node.run(pods["agent"], "enrol"))
    node.start(pods["agent"], "agent")
    try:
        node.wait_well("agent", 9465, "/readyz")
    finally:
        print(node.journal("agent"))
        print(node.get(9465, "/readyz"))
    print(node.stop("agent"))
    print(node.stop("collector"))
    assert 0
