"""The image's build file and the Kubernetes manifests, checked against schemas and against what the programs really take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import agent
from agent.config import Settings as AgentSettings
from agent.config import read as read_agent
from collector.config import Settings as CollectorSettings
from collector.config import read as read_collector
from tests.packaging.built import ROOT

MANIFESTS = ROOT / "packaging/kubernetes"
CONTAINERFILE = ROOT / "packaging/container/Containerfile"
PATCHES = {"settings.yaml", "collector.yaml"}


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def objects(folder: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) -> object, of a folder's files but its kustomization."""
    return {
        (document["kind"], document["metadata"]["name"]): document
        for file in sorted((MANIFESTS / folder).glob("*.yaml"))
        if file.name != "kustomization.yaml"
        for document in documents(file)
    }


def pods() -> dict[str, dict[str, Any]]:
    return {
        name: o["spec"]["template"]["spec"]
        for (kind, name), o in objects("one").items()
        if kind in ("DaemonSet", "StatefulSet")
    }


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def test_manifests_are_what_the_api_takes() -> None:
    files = [str(f) for f in sorted(MANIFESTS.glob("*/*.yaml")) if f.name != "kustomization.yaml"]
    whole = [f for f in files if not f.endswith("scaled/collector.yaml")]  # a patch
    command = [Path(sys.prefix, "bin/kubernetes-validate"), "--strict", *whole]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("passed for resource") == 11


def test_a_manifest_with_an_unknown_field_is_found(tmp_path: Path) -> None:
    (document,) = [d for d in documents(MANIFESTS / "one/collector.yaml") if d["kind"] == "Service"]
    document["spec"]["sessionAfinity"] = "ClientIP"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(document))
    command = [Path(sys.prefix, "bin/kubernetes-validate"), "--strict", str(wrong)]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode != 0


@pytest.mark.parametrize("folder", ["one", "scaled"])
def test_a_kustomization_names_every_file_beside_it(folder: str) -> None:
    (kustomization,) = documents(MANIFESTS / folder / "kustomization.yaml")
    named = {*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))}
    there = {file.name for file in (MANIFESTS / folder).glob("*.yaml")} - {"kustomization.yaml"}
    assert {name for name in named if not name.startswith("..")} == there
    assert all((MANIFESTS / folder / name).exists() for name in named)


def test_every_patch_changes_something_that_is_there() -> None:
    there = objects("one")
    for (kind, name), patch in objects("scaled").items():
        if kind == "HorizontalPodAutoscaler":
            target = patch["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) in there
            continue
        assert (kind, name) in there
        if kind == "StatefulSet":
            ours = {c["name"] for c in containers(patch["spec"]["template"]["spec"])}
            assert ours <= {c["name"] for c in containers(there[kind, name]["spec"]["template"]["spec"])}


@pytest.mark.parametrize("folder", ["one", "scaled"])
def test_settings_are_ones_that_the_daemons_take(folder: str, tmp_path: Path) -> None:
    seen = 0
    for (kind, _), document in objects(folder).items():
        if kind != "ConfigMap":
            continue
        for name, text in document["data"].items():
            file = tmp_path / name
            file.write_text(text)
            read = read_agent if name == "agent.yaml" else read_collector
            assert read(file) != (AgentSettings() if name == "agent.yaml" else CollectorSettings())
            seen += 1
    assert seen == (2 if folder == "one" else 1)


def test_ports_and_probes_are_the_daemons_own() -> None:
    listen = CollectorSettings()
    wanted = {
        "weighbridge-agent": {AgentSettings().local_port.port},
        "weighbridge-collector": {
            int(listen.listen.ingest.rpartition(":")[2]),
            int(listen.listen.enrolment.rpartition(":")[2]),
            listen.local_port.port,
        },
    }
    for name, pod in pods().items():
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert set(ports.values()) == wanted[name]
        assert container["livenessProbe"]["httpGet"] | {"port": 0} == {"path": "/livez", "port": 0}
        assert container["livenessProbe"]["httpGet"]["port"] in ports


def test_selectors_find_the_pods_they_mean() -> None:
    found = objects("one")
    labels = {
        name: found[kind, name]["spec"]["template"]["metadata"]["labels"]
        for kind, name in found
        if kind in ("DaemonSet", "StatefulSet")
    }
    for (kind, name), document in found.items():
        spec = document.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector:
            wanted = selector.get("matchLabels", selector)
            assert wanted.items() <= labels[name].items(), (kind, name)


def test_every_volume_that_is_mounted_is_there_and_every_one_there_is_mounted() -> None:
    for (kind, name), document in objects("one").items():
        if kind not in ("DaemonSet", "StatefulSet"):
            continue
        pod = document["spec"]["template"]["spec"]
        claimed = {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
        there = {volume["name"] for volume in pod["volumes"]} | claimed
        assert {mount["name"] for c in containers(pod) for mount in c["volumeMounts"]} == there, name


def test_only_the_container_that_loads_the_probes_is_privileged() -> None:
    for name, pod in pods().items():
        for container in containers(pod):
            context = pod.get("securityContext", {}) | container["securityContext"]
            if container["name"] == "probes":
                assert context["privileged"] is True
                continue
            assert context["runAsNonRoot"], (name, container["name"])
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True


def test_images_users_and_versions_are_the_build_file_s() -> None:
    text = CONTAINERFILE.read_text()
    users = dict(re.findall(r"useradd .*?--uid (\d+) .*?(\S+) \\$", text, re.MULTILINE))
    assert sorted(users.values()) == ["weighbridge", "weighbridge-collector"]
    numbers = {user: int(number) for number, user in users.items()}
    for name, pod in pods().items():
        user = "weighbridge" if name == "weighbridge-agent" else name
        for container in containers(pod):
            assert container["image"] == f"{name}:{agent.__version__}"
            context = pod.get("securityContext", {}) | container["securityContext"]
            assert context["runAsUser"] in (0, numbers[user])
    assert re.findall(r"^USER (\d+):\1$", text, re.MULTILINE) == [str(n) for _, n in sorted(numbers.items())]


def test_hadolint_has_nothing_to_say_about_the_build_file() -> None:
    command = [Path(sys.prefix, "bin/hadolint"), "--failure-threshold", "style", CONTAINERFILE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_build_file_installs_what_the_build_needs() -> None:
    """`./dev setup` asks for these where they are missing; an image has no second try."""
    wanted = re.search(r"packages_to_run\(\) \{(.*?)\n\}", (ROOT / "dev").read_text(), re.DOTALL)
    assert wanted is not None
    names = set(re.findall(r"missing\+=\(([a-z0-9.\- ]+)\)", wanted[1]))
    stage = CONTAINERFILE.read_text().partition("AS agent")[0]
    for name in " ".join(names).split():
        assert re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", stage), name
    assert all(re.search(rf"\b{tool}\b", stage) for tool in ("clang", "gcc", "make"))
