"""A node of a cluster, as far as the manifests' containers can tell: what a kubelet and its runtime make of a pod.

Images' file systems, commands, users, environments, volumes and their propagation, capabilities, seccomp and the read-only
root are the manifests'; crun makes the containers. Only /proc and /sys are this machine's. Containers get no cgroup of their
own: nothing is limited.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.packaging.apart import Apart
from tests.packaging.images import Image
from tests.waiting import until

NAME = "node-1"
SECCOMP = Path("/usr/share/containers/seccomp.json")
OF_THIS_MACHINE = ("/sys", "/proc")
PROPAGATION = {None: "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}
Json = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A template of a manifest; `claims` are the names of volumes that its set claims for it."""

    spec: Json
    image: Image
    claims: frozenset[str]

    def container(self, name: str) -> Json:
        (found,) = (
            c for c in [*self.spec.get("initContainers", []), *self.spec["containers"]] if c["name"] == name
        )
        return found

    def security(self, container: Json) -> Json:
        """The container's own word has precedence."""
        return self.spec.get("securityContext", {}) | container.get("securityContext", {})


class Node:
    """`hosts` are names that resolve to the loopback; `settings`: ConfigMap -> file name -> text."""

    def __init__(
        self, apart: Apart, output: Path, hosts: Sequence[str], settings: Mapping[str, Mapping[str, str]]
    ) -> None:
        self._apart, self._output, self._settings = apart, output, settings
        self._directory = apart.directory / "node"
        for name in ("volumes", "bundles", "crun"):
            apart.seen(self._directory / name).mkdir(parents=True)
        self._hosts = self._directory / "hosts"
        apart.seen(self._hosts).write_text(f"127.0.0.1 localhost {' '.join(hosts)}\n")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.ran: set[str] = set()
        """Containers that were run as their manifests say."""

    def run(self, pod: Pod, name: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A container to its end; with words, its entry point has these for arguments."""
        return self._apart.run(self._crun("run", *self._bundle(pod, name, words)), check=check)

    def start(self, pod: Pod, name: str) -> None:
        """A container that stays; its output is in `journal`."""
        with (self._output / f"{name}.journal").open("ab") as journal:
            self._daemons[name] = self._apart.start(
                self._crun("run", *self._bundle(pod, name, ())), output=journal
            )

    def execute(self, name: str, *words: str) -> str:
        """As `kubectl exec` does, in a container that was started."""
        bundle = self._apart.seen(self._directory / "bundles" / name)
        process = json.loads((bundle / "config.json").read_text())["process"] | {"args": words}
        (bundle / "process.json").write_text(json.dumps(process))
        inside = self._directory / "bundles" / name / "process.json"
        return self._apart.run(self._crun("exec", "--process", inside, name)).stdout

    def stop(self, name: str) -> int:
        """As the kubelet stops a container; its exit code."""
        self._apart.run(self._crun("kill", name, "TERM"))
        return self._daemons.pop(name).wait(60)

    def journal(self, name: str) -> str:
        return (self._output / f"{name}.journal").read_text()

    def get(self, port: int, path: str) -> tuple[int, str]:
        """(status, body) of what a container serves; 0 if nobody does."""
        url = f"http://127.0.0.1:{port}{path}"
        curl = ["curl", "-s", "--max-time", "10", "--write-out", "\n%{http_code}", url]
        body, _, status = self._apart.run(curl, check=False).stdout.rpartition("\n")
        return int(status), body

    def wait_well(self, name: str, port: int, path: str) -> None:
        """Until its probe succeeds."""

        def well() -> bool:
            assert self._daemons[name].poll() is None, self.journal(name)
            return self.get(port, path)[0] == 200

        until(well, 60)

    def volume(self, pod: Pod, name: str) -> Path:
        """Where a volume lies, as it is seen from this machine."""
        return self._apart.seen(self._volume(pod, name))

    def _crun(self, *words: str | Path) -> list[str | Path]:
        return ["crun", "--root", self._directory / "crun", "--cgroup-manager", "disabled", *words]

    def _bundle(self, pod: Pod, name: str, words: Sequence[str]) -> list[str | Path]:
        if not words:
            self.ran.add(name)
        bundle = self._directory / "bundles" / name
        self._apart.seen(bundle).mkdir(exist_ok=True)
        config = self._config(pod, pod.container(name), words)
        self._apart.seen(bundle / "config.json").write_text(json.dumps(config))
        return ["--bundle", bundle, name]

    def _config(self, pod: Pod, container: Json, words: Sequence[str]) -> Json:
        """OCI runtime specification 1.0."""
        security = pod.security(container)
        privileged = security.get("privileged", False)
        namespaces = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]
        linux: Json = {"namespaces": namespaces, "rootfsPropagation": "rslave"}
        if any(mount.get("mountPropagation") == "Bidirectional" for mount in container["volumeMounts"]):
            linux["rootfsPropagation"] = "rshared"
        if not privileged:
            linux["maskedPaths"] = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]
            linux["readonlyPaths"] = [
                "/proc/bus",
                "/proc/fs",
                "/proc/irq",
                "/proc/sys",
                "/proc/sysrq-trigger",
            ]
        if not privileged and security.get("seccompProfile", {}).get("type") == "RuntimeDefault":
            linux["seccomp"] = _default_seccomp()
        return {
            "ociVersion": "1.0.2",
            "hostname": NAME,
            "root": {
                "path": str(pod.image.root),
                "readonly": security.get("readOnlyRootFilesystem", False),
            },
            "process": {
                "cwd": pod.image.config.get("WorkingDir") or "/",
                "args": _arguments(container, pod.image, words),
                "env": [*pod.image.config["Env"], *_environment(container)],
                "user": _user(security, pod.image),
                "noNewPrivileges": not security.get("allowPrivilegeEscalation", True),
                "capabilities": _capabilities(privileged),
            },
            "mounts": [*_own_mounts(privileged), _bind(self._hosts, "/etc/hosts", "ro")]
            + [self._mount(pod, mount) for mount in container["volumeMounts"]],
            "linux": linux,
        }

    def _mount(self, pod: Pod, mount: Json) -> Json:
        source = self._volume(pod, mount["name"])
        if "subPath" in mount:
            source /= mount["subPath"]
        access = "ro" if mount.get("readOnly") else "rw"
        return _bind(source, mount["mountPath"], access, PROPAGATION[mount.get("mountPropagation")])

    def _volume(self, pod: Pod, name: str) -> Path:
        """Where a volume lies on the node; made at its first use, as a kubelet makes it."""
        if name in pod.claims:
            place = self._directory / "volumes" / name
            if not self._apart.seen(place).exists():
                self._make(place)
                os.chown(self._apart.seen(place), 0, pod.spec["securityContext"]["fsGroup"])
                self._apart.seen(place).chmod(0o2775)
            elif pod.spec["securityContext"].get("fsGroupChangePolicy") != "OnRootMismatch":
                for file in self._apart.seen(place).rglob("*"):
                    file.chmod(file.stat().st_mode | 0o060)
            return place
        (volume,) = (found for found in pod.spec["volumes"] if found["name"] == name)
        if "hostPath" in volume:
            path = volume["hostPath"]["path"]
            if path.startswith(OF_THIS_MACHINE):
                return Path(path)
            assert volume["hostPath"]["type"] == "DirectoryOrCreate"
            return self._make(self._apart.shared / path.lstrip("/"))
        if "emptyDir" in volume:
            place = self._make(self._directory / "volumes" / name)
            self._apart.seen(place).chmod(0o777)
            return place
        named = volume.get("configMap", {}).get("name") or volume["secret"]["secretName"]
        place = self._make(self._directory / "volumes" / named)
        for file, text in self._settings.get(named, {}).items():
            (self._apart.seen(place) / file).write_text(text)
        return place

    def _make(self, directory: Path) -> Path:
        self._apart.seen(directory).mkdir(parents=True, exist_ok=True)
        return directory


def _arguments(container: Json, image: Image, words: Sequence[str]) -> list[str]:
    if words:
        return [*image.config["Entrypoint"], *words]
    if "command" in container:
        return [*container["command"], *container.get("args", [])]
    return [*image.config["Entrypoint"], *container.get("args", image.config["Cmd"])]


def _environment(container: Json) -> Iterator[str]:
    for variable in container.get("env", []):
        if "value" in variable:
            yield f"{variable['name']}={variable['value']}"
        else:
            assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
            yield f"{variable['name']}={NAME}"


def _user(security: Json, image: Image) -> Json:
    user, _, group = image.config["User"].partition(":")
    numbers: Json = {
        "uid": security.get("runAsUser", int(user)),
        "gid": security.get("runAsGroup", int(group)),
    }
    if "fsGroup" in security:
        numbers["additionalGids"] = [security["fsGroup"]]
    return numbers


def _capabilities(privileged: bool) -> Json:
    """All that root has here, or none: no manifest adds one."""
    names: list[str] = []
    if privileged:
        said = subprocess.check_output(["setpriv", "--dump"], text=True)
        (known,) = re.findall("^Capability bounding set: (.*)$", said, re.MULTILINE)
        names = [f"CAP_{name.upper()}" for name in known.split(",")]
    return dict.fromkeys(("bounding", "effective", "permitted"), names)


def _default_seccomp() -> Json:
    """What runtimes call their default, for a process without capabilities. The file is Docker's, in its own format."""
    profile = json.loads(SECCOMP.read_text())
    ours = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    rules = [
        {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None}
        for rule in profile["syscalls"]
        if not rule.get("includes", {}).get("caps") and ours in rule.get("includes", {}).get("arches", [ours])
    ]
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "syscalls": rules,
    }


def _own_mounts(privileged: bool) -> list[Json]:
    """What every container has."""
    quiet = ["nosuid", "noexec", "nodev"]
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": quiet},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "mode=755", "size=64k"],
        },
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": [*quiet, "mode=1777", "size=64m"],
        },
        {
            "destination": "/sys",
            "type": "sysfs",
            "source": "sysfs",
            "options": [*quiet, "rw" if privileged else "ro"],
        },
    ]
    # The host's, as runtimes give it to a privileged container.
    return [*mounts, _bind(Path("/sys/fs/cgroup"), "/sys/fs/cgroup", "rw")] if privileged else mounts


def _bind(source: Path, destination: str, access: str, propagation: str = "rprivate") -> Json:
    options = ["rbind", access, propagation]
    return {"destination": destination, "type": "bind", "source": str(source), "options": options}
