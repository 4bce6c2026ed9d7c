"""The images, built from the packages and run as the manifests say: their users, read-only roots, commands and volumes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agent
from agent.config import Settings as AgentSettings
from bench.cgroups import Cgroup
from collector.config import Settings as CollectorSettings
from tests.acceptance.machines.cache import Unavailable
from tests.packaging.apart import Apart
from tests.packaging.built import LIGHT, ROOT, Built
from tests.packaging.images import Image, Images
from tests.packaging.node import NAME, Node, Pod
from tests.packaging.test_deployment import MANIFESTS, containers, objects
from tests.waiting import until

pytestmark = pytest.mark.root

MOST_BYTES = {"agent": 230_000_000, "collector": 250_000_000}
USERS = {"agent": "weighbridge", "collector": "weighbridge-collector"}
SEARCHED = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BTF = Path("/sys/kernel/btf/vmlinux")
POD = "6f0f3c1e-5a1d-4f5b-9a7e-2f8d5f3a1b2c"
CONTAINER = "5e" * 32
OFTEN = "meter: {interval: 1s, memory_sample: 1s}\n"


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with Apart() as made:
        yield made


@pytest.fixture(scope="module")
def images(built: Built, apart: Apart) -> dict[str, Image]:
    missing = [tool for tool in ("buildah", "crun", "mmdebstrap") if shutil.which(tool) is None]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"{', '.join(missing)} cannot be found: ./dev setup")
    try:
        return Images(apart).build(built)
    except Unavailable as why:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(why))


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


def test_the_bounds_of_the_images_are_the_ones_that_are_written_down() -> None:
    row = re.search(r"^\| its file system .*$", (ROOT / "packaging/README.md").read_text(), re.MULTILINE)
    assert row is not None
    bounds = [int(number) * 1_000_000 for number in re.findall(r"\((\d+)\)", row[0])]
    assert bounds == [MOST_BYTES[part] for part in LIGHT]


@pytest.mark.parametrize("part", LIGHT)
def test_an_image_takes_no_more_room_than_is_said(images: dict[str, Image], part: str) -> None:
    assert MOST_BYTES[part] / 2 < images[part].size_bytes <= MOST_BYTES[part]


def test_users_ports_and_volumes_are_the_manifests_and_the_defaults(
    images: dict[str, Image], pods: dict[str, Pod]
) -> None:
    listen = CollectorSettings()
    ports = {
        "agent": {AgentSettings().local_port.port},
        "collector": {
            int(listen.listen.ingest.rpartition(":")[2]),
            int(listen.listen.enrolment.rpartition(":")[2]),
            listen.local_port.port,
        },
    }
    states = {"agent": AgentSettings().state_dir, "collector": CollectorSettings().state_dir}
    for part, pod in pods.items():
        config = images[part].config
        (container,) = pod.spec["containers"]
        context = pod.security(container)
        assert config["User"] == f"{context['runAsUser']}:{context['runAsGroup']}"
        assert set(config["ExposedPorts"]) == {f"{port}/tcp" for port in ports[part]}
        assert {port["containerPort"] for port in container["ports"]} == ports[part]
        assert list(config["Volumes"]) == [str(states[part])]


@pytest.mark.parametrize("part", LIGHT)
def test_the_package_finds_the_user_and_makes_none(images: dict[str, Image], apart: Apart, part: str) -> None:
    root = apart.seen(images[part].root)
    number = images[part].config["User"].partition(":")[0]
    made = [line for line in (root / "etc/passwd").read_text().splitlines() if "weighbridge" in line]
    assert [line.split(":")[:3] for line in made] == [[USERS[part], "x", number]]
    (state,) = images[part].config["Volumes"]
    assert (root / state.lstrip("/")).stat().st_uid == int(number)


def test_nothing_of_the_building_is_left_in_an_image(images: dict[str, Image], apart: Apart) -> None:
    for image in images.values():
        root = apart.seen(image.root)
        assert not list((root / "packages").glob("*"))
        assert not list((root / "var/lib/apt/lists").iterdir())
        assert not list((root / "var/cache/apt").rglob("*.*"))
        assert image.config["Env"] == [SEARCHED]


def test_a_pod_of_each_delivers_what_a_container_used(node: Node, pods: dict[str, Pod], ours: Cgroup) -> None:
    """Every container of `one/`, in the order in which a kubelet runs them, and the commands of the README."""
    meter, centre = pods["agent"], pods["collector"]
    assert node.run(meter, "agent", "--version").stdout == f"weighbridge-agent {agent.__version__}\n"
    assert node.run(meter, "agent", "check-config").stdout == "settings are good\n"

    node.run(centre, "ca")
    node.start(centre, "collector")
    node.wait_well("collector", 9464, "/readyz")
    (command,) = re.findall(r"-- (weighbridge-collector .*?) >", (MANIFESTS / "README.md").read_text())
    token = node.execute("collector", *command.split())

    loaded = node.run(meter, "probes").stderr
    assert ("loaded" in loaded) == BTF.exists()
    assert node.run(meter, "enrol", check=False).returncode != 0, "there is no token for it yet"
    (node.volume(meter, "tokens") / NAME).write_text(token)
    assert "enrolled as agent" in node.run(meter, "enrol").stdout
    (node.volume(meter, "node") / "often.yaml").write_text(OFTEN)
    node.start(meter, "agent")
    node.wait_well("agent", 9465, "/readyz")
    if BTF.exists():
        assert 'weighbridge_agent_probes{state="attached"' in node.get(9465, "/metrics")[1]

    pod = ours.child(f"kubepods-besteffort-pod{POD.replace('-', '_')}.slice")
    container = pod.child(f"cri-containerd-{CONTAINER}.scope")
    container.run(["sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done"]).wait()
    container.wait_empty()
    used_ns = container.cpu_usage_ns()
    assert used_ns > 10_000_000

    def delivered() -> list[dict[str, Any]]:
        lines = node.execute("collector", "weighbridge-collector", "log", "cat", "--json", "--rows")
        rows = [row for line in lines.splitlines() for row in json.loads(line)["usage"]]
        return [row for row in rows if row["container_id"] == CONTAINER]

    until(lambda: sum(row["cpu_usage_ns"] or 0 for row in delivered()) == used_ns, 60)
    assert {row["pod_uid"] for row in delivered()} == {POD}

    # Pods come and go: neither a CA nor an identity is made twice.
    assert (node.stop("agent"), node.stop("collector")) == (0, 0)
    assert node.run(centre, "ca").stdout == ""
    assert node.run(meter, "enrol").stdout == ""
    assert (node.volume(centre, "state") / "ca/ca.key").stat().st_mode & 0o777 == 0o600
    assert node.ran == {c["name"] for p in pods.values() for c in containers(p.spec)}


def test_what_ran_apart_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), Apart() as place, open(os.devnull, "ab") as nowhere:
        left = place.start(["sleep", "1000"], nowhere)
        place.run(["mount", "-t", "tmpfs", "tmpfs", place.shared])
        1 / 0  # noqa: B018 - whatever fails
    assert left.wait(20) != 0
    assert not place.directory.exists()
    assert str(place.directory) not in Path("/proc/self/mountinfo").read_text()


def test_a_run_that_is_killed_leaves_an_empty_directory_at_most() -> None:
    code = (
        "import time; from pathlib import Path; from tests.packaging.apart import Apart\n"
        "with Apart() as place: print(place.directory, place.seen(Path('/')), flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        directory, inside = run.stdout.readline().split()
        assert Path(inside).exists()
        run.kill()
    until(lambda: not Path(inside).parent.exists())
    Path(directory).rmdir()
