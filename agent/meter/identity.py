r"""Cgroup path -> who it is. Pure, total: any text has an answer.

Strategy. The path is walked from the root, one segment at a time. Each segment is offered to an ordered
list of matchers together with what lies around it (the runtime directory it is in, the pod, the unit).
The outermost container wins: it is what the host bills, and everything below is `sandbox-internal`,
whatever runtimes are nested in it. An id is believed only in the place where a runtime puts one: 64 hex
digits elsewhere are a name like any other.

Sources of the naming: docker and containerd (cgroupfs `/docker/<id>`, systemd `docker-<id>.scope`, wrong
driver `system.slice:docker:<id>`), CRI-O and podman (libpod, `crio-conmon` is not the container),
kubelet `cm/` (QoS and pod directories in both drivers, static pods with 32-hex uids), LXC/LXD/Incus
(`lxc.payload.<name>`), systemd-nspawn and machined, Nomad, ECS, Garden, Mesos, buildkit, Kata, Slurm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TextIO

import msgspec

from agent.meter.model import Role

KIND_CONTAINER = "container"
KIND_INTERNAL = "sandbox-internal"
KINDS = (KIND_CONTAINER, KIND_INTERNAL, "pod", "service", "scope", "slice", "user", "root", "other")

MAX_SEGMENT = 255
"""NAME_MAX: no cgroup has a longer name; a longer one is nobody's id."""


class Identity(msgspec.Struct, frozen=True):
    """What a path says. None where it says nothing. `unit` is the systemd unit's name as on disk (escaped)."""

    path: str
    runtime: str | None
    container_id: str | None
    pod_uid: str | None
    unit: str | None
    kind: str


class _Around(msgspec.Struct):
    """What the segments so far have told."""

    runtime_directory: str | None = None
    """Runtime whose containers are the next segments, and how their names look."""
    in_kubepods: bool = False
    in_ecs: bool = False
    ecs_task: bool = False
    pod_uid: str | None = None
    unit: str | None = None
    kind: str = "root"


_Found = tuple[str | None, str] | None
"""(runtime, container id); the runtime is None where the path does not name it."""

_HEX64 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{12,64}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")
_UNIT = re.compile(
    r".+\.(service|scope|slice|mount|socket|swap|timer|target|path|automount|device)", re.DOTALL
)
_POD = re.compile(
    r"(?:.*-)?pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?"
)
_USER_SLICE = re.compile(r"user-[0-9]+\.slice")

_SCOPE_PREFIXES: tuple[tuple[str, str], ...] = (
    # systemd driver: <prefix>-<id>.scope. Longer prefixes first; None is a helper, not a container.
    ("cri-containerd", "containerd"),
    ("cri-o", "crio"),
    ("nerdctl", "containerd"),
    ("containerd", "containerd"),
    ("docker", "docker"),
    ("moby", "docker"),
    ("libpod-payload", "podman"),
    ("libpod", "podman"),
    ("crio", "crio"),
    ("buildkit", "buildkit"),
    ("runc", "runc"),
    ("crun", "crun"),
    ("youki", "youki"),
    ("kata", "kata"),
    ("garden", "garden"),
    ("isulad", "isulad"),
    ("pouch", "pouch"),
    ("apptainer", "apptainer"),
    ("singularity", "singularity"),
)
_COLON_RUNTIME = {
    "cri-containerd": "containerd",
    "containerd": "containerd",
    "nerdctl": "containerd",
    "k8s.io": "containerd",
    "docker": "docker",
    "moby": "docker",
    "crio": "crio",
    "libpod": "podman",
    "buildkit": "buildkit",
}

_DIRECTORIES: dict[str, tuple[str, re.Pattern[str]]] = {
    # cgroupfs driver: a directory whose children are the containers of one runtime, and their names.
    "docker": ("docker", _ID),
    "moby": ("docker", _ID),
    "buildkit": ("buildkit", re.compile(r"[0-9a-z]{25}|[0-9a-f]{12,64}")),
    "buildx": ("buildkit", re.compile(r"[0-9a-z]{25}|[0-9a-f]{12,64}")),
    "libpod_parent": ("podman", re.compile(r"libpod-([0-9a-f]{12,64})")),
    "crio": ("crio", _ID),
    "k8s.io": ("containerd", _ID),
    "containerd": ("containerd", _ID),
    "nerdctl": ("containerd", _ID),
    "default": ("containerd", _NAME),
    "lxc": ("lxc", _NAME),
    "lxc.payload": ("lxc", _NAME),
    "garden": ("garden", _NAME),
    "mesos": ("mesos", _UUID),
    "mesos_containers": ("mesos", _UUID),
    "kata_overhead": ("kata-overhead", re.compile(r"(?!)")),
    "actions_job": ("docker", _ID),
    "azpl_job": ("docker", _ID),
    "pouch": ("pouch", _ID),
    "isulad": ("isulad", _ID),
    "rkt": ("rkt", _UUID),
    "apptainer": ("apptainer", _NAME),
    "singularity": ("singularity", _NAME),
}
_HELPERS = ("conmon", "monitor", "overhead")


def identify(path: str) -> Identity:
    """The identity of a cgroup path, relative to the cgroup mount ("/" is the root).

    Trailing and doubled slashes, `/..` prefixes as seen inside a cgroup namespace and v1's " (deleted)"
    are forgiven. `path` is given back as it came.
    """
    around = _Around()
    runtime = container_id = None
    internal = False
    segments = [s for s in path.removesuffix(" (deleted)").split("/") if s and s not in (".", "..")]
    for index, segment in enumerate(segments):
        if len(segment) > MAX_SEGMENT:
            around.kind, around.runtime_directory = "other", None
            continue
        found = _container(segment, around, segments[index - 1] if index else "")
        if found is not None:
            runtime, container_id = found
            if segment.endswith(".scope") or (segment.endswith(".service") and "@" in segment):
                around.unit = segment
            internal = index + 1 < len(segments)
            break
        _enter(segment, around, segments[index - 1] if index else "")
    kind = around.kind
    if container_id is not None:
        kind = KIND_INTERNAL if internal else KIND_CONTAINER
    return Identity(path, runtime, container_id, around.pod_uid, around.unit, kind)


def _container(segment: str, around: _Around, parent: str) -> _Found:
    """(runtime, container id) if this segment is a container in its place."""
    for matcher in _MATCHERS:
        found = matcher(segment, around, parent)
        if found is not None:
            return found
    return None


def _by_scope(segment: str, _around: _Around, _parent: str) -> _Found:
    """`docker-<id>.scope`, `cri-containerd-<id>.scope`, `crio-<id>`, `libpod-<id>` in either driver."""
    name = segment.removesuffix(".scope").removesuffix(".service")
    for prefix, runtime in _SCOPE_PREFIXES:
        if name.startswith(f"{prefix}-"):
            rest = name[len(prefix) + 1 :]
            if _ID.fullmatch(rest):
                return runtime, rest
            if segment.endswith(".scope") and prefix == "nerdctl" and _NAME.fullmatch(rest):
                return runtime, rest
    return None


def _by_colons(segment: str, around: _Around, _parent: str) -> _Found:
    """`system.slice:docker:<id>`: a systemd-style path given to the cgroupfs driver, as one directory."""
    parts = segment.split(":")
    if len(parts) == 3 and parts[1] in _COLON_RUNTIME and _NAME.fullmatch(parts[2]):
        pod = _POD.fullmatch(parts[0])
        if pod:
            around.pod_uid = _dashed(pod[1])
        return _COLON_RUNTIME[parts[1]], parts[2]
    return None


def _by_directory(segment: str, around: _Around, parent: str) -> _Found:
    """`/docker/<id>` and the like: the directory names the runtime, the child is the container."""
    if around.runtime_directory is None:
        return None
    runtime, pattern = _DIRECTORIES[around.runtime_directory]
    match = pattern.fullmatch(segment)
    if match is None or segment in _DIRECTORIES or segment in _HELPERS or segment.startswith("."):
        return None
    if pattern is _NAME and _UNIT.fullmatch(segment):
        return None
    return runtime, match[match.lastindex or 0]


def _by_pod(segment: str, around: _Around, parent: str) -> _Found:
    """A pod's child in the cgroupfs driver: `/kubepods/burstable/pod<uid>/<id>`."""
    if around.kind != "pod":
        return None
    name = segment.removesuffix(".scope")
    return (None, name) if _ID.fullmatch(name) or _UUID.fullmatch(name) else None


def _by_parent(segment: str, around: _Around, _parent: str) -> _Found:
    """`docker run --cgroup-parent /batch` with the cgroupfs driver: `/batch/<64 hex>`, no runtime named."""
    nameless = around.kind == "other" and around.runtime_directory is None
    return (None, segment) if nameless and _HEX64.fullmatch(segment) else None


def _by_lxc(segment: str, _around: _Around, _parent: str) -> _Found:
    """`lxc.payload.<name>`: LXC 4+, LXD and Incus."""
    for prefix in ("lxc.payload.", "lxc.payload@"):
        if segment.startswith(prefix) and len(segment) > len(prefix):
            return "lxc", segment[len(prefix) :]
    return None


def _by_machine(segment: str, around: _Around, parent: str) -> _Found:
    """`machine.slice/systemd-nspawn@<name>.service`, `machine-<name>.scope`."""
    if parent != "machine.slice":
        return None
    if segment.startswith("systemd-nspawn@") and segment.endswith(".service"):
        return "nspawn", unescape(segment[len("systemd-nspawn@") : -len(".service")])
    if segment.startswith("machine-") and segment.endswith(".scope"):
        name = unescape(segment[len("machine-") : -len(".scope")])
        return ("libvirt" if name.startswith(("qemu-", "lxc-")) else "nspawn"), name
    return None


def _by_ecs(segment: str, around: _Around, parent: str) -> _Found:
    """`/ecs/<task>/<id>`, `/ecs/<task>-<n>` and `ecstasks-<task>.slice/docker-<id>.scope` (by scope)."""
    if around.ecs_task and _ID.fullmatch(segment.split("-")[0]):
        return "docker", segment
    if parent == "ecs" and re.fullmatch(r"[0-9a-f]{32}-[0-9]+", segment):
        return "docker", segment
    return None


def _by_nomad(segment: str, around: _Around, parent: str) -> _Found:
    """`nomad.slice/share.slice/<alloc>.<task>.scope`; v1 `/nomad/<alloc>.<task>`."""
    if parent.startswith("nomad") or parent in ("share.slice", "reserve.slice", "share", "reserve"):
        match = re.fullmatch(rf"({_UUID.pattern})[.-](.+?)(?:\.scope)?", segment)
        if match:
            return "nomad", f"{match[1]}.{match[2]}"
    return None


def _by_kata(segment: str, _around: _Around, _parent: str) -> _Found:
    """`kata_<id>`, `kata_sandbox_<id>`."""
    match = re.fullmatch(r"kata_(?:sandbox_)?([0-9a-f]{12,64})", segment)
    return ("kata", match[1]) if match else None


_MATCHERS: tuple[Callable[[str, _Around, str], _Found], ...] = (
    _by_scope,
    _by_colons,
    _by_lxc,
    _by_machine,
    _by_kata,
    _by_nomad,
    _by_ecs,
    _by_pod,
    _by_directory,
    _by_parent,
)


def _enter(segment: str, around: _Around, parent: str) -> None:
    """Take note of a segment that is no container."""
    pod = _POD.fullmatch(segment)
    if pod and (around.in_kubepods or segment.startswith(("kubepods", "kubelet-kubepods", "pod"))):
        around.pod_uid, around.kind, around.in_kubepods = _dashed(pod[1]), "pod", True
        if segment.endswith(".slice"):
            around.unit = segment
        around.runtime_directory = None
        return
    if "kubepods" in segment:
        around.in_kubepods = True
    unit = _UNIT.fullmatch(segment)
    around.runtime_directory = segment if segment in _DIRECTORIES else None
    if unit:
        around.unit = segment
        suffix = unit[1]
        if suffix == "slice":
            around.kind = "user" if _USER_SLICE.fullmatch(segment) else "slice"
        else:
            around.kind = suffix if suffix in ("service", "scope") else "other"
    else:
        around.kind = "other"
    around.ecs_task = re.fullmatch(r"[0-9a-f]{32}|[0-9a-f-]{36}", segment) is not None and (
        parent == "ecs" or around.in_ecs
    )
    around.in_ecs = around.in_ecs or segment == "ecs"


def _dashed(uid: str) -> str:
    return uid.replace("_", "-")


def unescape(name: str) -> str:
    r"""systemd-escape -u: `\xNN` back to the byte. What is not UTF-8 then keeps its escaped form."""
    try:
        return re.sub(
            r"(?:\\x[0-9a-fA-F]{2})+", lambda m: bytes.fromhex(m[0].replace("\\x", "")).decode(), name
        )
    except UnicodeDecodeError:
        return name


@lru_cache(maxsize=16_384)
def role(path: str, inside_unit: bool) -> Role:
    """What the walk does with a cgroup: containers, services and scopes are metered, and so is a cgroup
    nobody explains, unless it lies inside a unit, to which it then belongs. QoS classes of Kubernetes and
    the directories runtimes keep their containers in are only passed through.
    """
    identity = identify(path)
    if identity.kind == KIND_CONTAINER:
        return Role.LEAF_UNIT
    if identity.kind in ("service", "scope"):
        return Role.UNIT
    if identity.kind == "other" and not inside_unit and not _is_shelf(path):
        return Role.UNIT
    return Role.PASS


def _is_shelf(path: str) -> bool:
    last = path.rstrip("/").rpartition("/")[2]
    return last in _DIRECTORIES or last in (
        "kubepods",
        "burstable",
        "besteffort",
        "guaranteed",
        "kubelet",
        "ecs",
    )


def identify_lines(lines: Iterable[bytes], out: TextIO) -> int:
    """One JSON object per input line, in order; returns how many. Bytes that are no UTF-8 are kept escaped."""
    count = 0
    for line in lines:
        path = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
        identity = identify(path)
        out.write(json.dumps(msgspec.structs.asdict(identity)) + "\n")
        count += 1
    return count
