r"""Cgroup path -> who it is. Pure, total: any text has an answer.

Strategy. The path is walked from the root, one name at a time. Each name is offered, with the names above
it, to an ordered table: one line for each way in which a runtime writes a container. The outermost container
wins: it is what the host bills, and everything below is `sandbox-internal`, whatever runtimes are nested in
it and whatever names the tenant gives there. An id is believed only in the place where a runtime puts one
and only in the shape in which that runtime makes it: 64 hex digits elsewhere, or 63 in the right place, are
a name like any other. What is not believed is no loss: it is metered as the unit or cgroup that it is.

Helpers beside a container (conmon, lxc.monitor, kata_overhead) are not the container. A virtual machine of
libvirt is one: somebody rents it whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, TextIO

import msgspec

from agent.meter.model import Role

KIND_CONTAINER = "container"
KIND_INTERNAL = "sandbox-internal"
KINDS = (KIND_CONTAINER, KIND_INTERNAL, "pod", "service", "scope", "slice", "user", "root", "other")

MAX_NAME = 255
"""NAME_MAX: no cgroup has a longer name; a longer one is nobody's id."""


class Identity(msgspec.Struct, frozen=True):
    """What a path says. None where it says nothing.

    `unit` is the innermost systemd unit at or above the container, with its escapes (`\\x2d`) as systemctl
    takes them; `pod_uid` is Kubernetes', with dashes.
    """

    path: str
    runtime: str | None
    container_id: str | None
    pod_uid: str | None
    unit: str | None
    kind: str


class _Rule(NamedTuple):
    """One way of writing a container: a name whose group is the id, below names that end in `above`."""

    runtime: str
    name: re.Pattern[str]
    above: re.Pattern[str]


def _rule(runtime: str, name: str, above: str = "") -> _Rule:
    return _Rule(runtime, re.compile(name), re.compile(rf"(?s:.*)(?:{above})"))


def _prefixed(runtime: str, prefixes: str, container_id: str) -> _Rule:
    """`<prefix>-<id>.scope` (systemd driver), `<prefix>-<id>` (CRI-O's and podman's cgroupfs driver) and
    `<slice>:<prefix>:<id>`: what the systemd driver expects, given to the cgroupfs driver, which makes one
    directory of it.
    """
    return _rule(runtime, rf"(?:(?:{prefixes})-|[^:]*:(?:{prefixes}):)({container_id})(?:\.scope)?")


_HEX = r"[0-9a-f]{64}"
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
_STEP = r"[0-9a-z]{25}"
"""BuildKit's ids: 128 bits in base 36."""
_ECS_TASK = r"[0-9a-f-]{32,36}"
_MACHINES = r"/machine(?:-[^/]*)?\.slice"

_RULES: tuple[_Rule, ...] = (
    # Docker; `docker/buildx` and the CI runners' groups are --cgroup-parent of containers like any other.
    _prefixed("docker", "docker|moby", _HEX),
    _rule("docker", rf"({_HEX})", r"/(?:docker|moby|actions_job|azpl_job)(?:/buildx)?"),
    _prefixed("containerd", "cri-containerd|containerd|nerdctl", _HEX),
    _rule("containerd", rf"({_HEX})", r"/(?:k8s\.io|containerd|nerdctl)"),
    # containerd's cgroupfs driver: /<namespace>/<id>; `ctr run` lets people choose the id.
    _rule("containerd", rf"({_NAME})", r"\A/default"),
    _prefixed("crio", "crio", _HEX),
    # podman; --cgroups=split puts the payload below the unit that called podman.
    _prefixed("podman", "libpod|libpod-payload", _HEX),
    # The steps of a build; dockerd gives its own BuildKit the prefix `docker`.
    _prefixed("buildkit", "buildkit|docker", _STEP),
    _rule("buildkit", rf"({_STEP}|{_HEX})", r"/buildkit"),
    *(
        # Low-level runtimes called directly: whatever id the caller gave.
        _rule(runtime, rf"(?:{runtime}-(?=.*\.scope\Z)|[^:]*:{runtime}:)({_NAME}?)(?:\.scope)?")
        for runtime in ("runc", "crun", "youki")
    ),
    _prefixed("isulad", "isulad", _HEX),
    _rule("isulad", rf"({_HEX})", r"/isulad"),
    _prefixed("pouch", "pouch", _HEX),
    _rule("pouch", rf"({_HEX})", r"/pouch"),
    # The process id of the starter is all the id there is.
    _rule("apptainer", r"(?:apptainer|singularity)-([0-9]+)\.scope"),
    _rule("apptainer", r"([0-9]+)", r"/(?:apptainer|singularity)"),
    # Kata's host side of a container; the virtual machine itself may be in kata_overhead.
    _rule("kata", rf"kata_(?:sandbox_)?({_HEX})"),
    # LXC ≥ 4, LXD, Incus; LXC 3; LXC 1 and 2, Proxmox.
    _rule("lxc", r"lxc\.payload\.((?s:.+))"),
    _rule("lxc", rf"({_NAME})", r"/lxc(?:\.payload)?"),
    # libvirt numbers its machines, with systemd and without; machined's other machines are nspawn's.
    _rule("libvirt", r"machine-((?:qemu|lxc|xen|ch)\\x2d[0-9]+\\x2d.+)\.scope", _MACHINES),
    _rule("libvirt", r"(.+)\.libvirt-(?:qemu|lxc)"),
    _rule("rkt", r"machine-rkt\\x2d(.+)\.scope", _MACHINES),
    _rule("nspawn", r"machine-(.+)\.scope", _MACHINES),
    _rule("nspawn", r"systemd-nspawn@(.+)\.service"),
    _rule("vmspawn", r"systemd-vmspawn@(.+)\.service"),
    _rule("firecracker", rf"({_NAME})", r"/firecracker"),
    # <allocation>.<task>, 1.3 to 1.6 with a dash; before that an id of the executor's own.
    _rule(
        "nomad",
        rf"({_UUID}(?:[.-].+?)?)(?:\.scope)?",
        r"/nomad(?:\.slice)?(?:/(?:share|reserve)(?:\.slice)?)?",
    ),
    # On EC2 the containers are Docker's; Fargate 1.4 runs containerd.
    _rule("docker", rf"({_HEX})", rf"/ecs/(?:[^/]+/)?{_ECS_TASK}"),
    _rule("containerd", r"([0-9a-f]{32}-[0-9]+)", rf"/ecs(?:/{_ECS_TASK})?"),
    # Cloud Foundry sorts its containers into good and bad by the CPU they are entitled to.
    _rule("garden", rf"(?!(?:good|bad)\Z)({_NAME})", r"/garden(?:/(?:good|bad))?"),
    _rule("mesos", rf"({_UUID})", r"/mesos"),
)

_SHELVES = re.compile(
    r"(?s:.*)/(?:kubepods(?:/(?:burstable|besteffort|guaranteed))?|kubelet|docker|moby|buildkit|buildx|actions_job"
    r"|azpl_job|k8s\.io|containerd|nerdctl|default|libpod_parent|isulad|pouch|apptainer|singularity|lxc|lxc\.payload|lxc\.monitor"
    r"|firecracker|garden|mesos|nomad|ecs|kata_overhead)/*"
)
"""Directories in which runtimes keep their containers; nobody runs in them."""

_NO_CONTAINERS = ("/libpod_parent", "/kata_overhead", "/lxc.monitor")
"""Below them 64 hex digits are a podman pod or a helper of the container of that id."""

_CONTAINER_OF_POD = re.compile(rf"{_HEX}|{_UUID}")
_HEX_ALONE = re.compile(_HEX)

_POD_SLICE = re.compile(r"(?:.+[-_])?kubepods(?:-[a-z]+)?-pod([0-9A-Za-z_]+)\.slice")
"""systemd driver. Dashes of the uid are underscores; kubelet in a slice of its own prefixes its name."""
_POD_UID = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?")
"""cgroupfs driver. Static pods have the hash of their manifest: 32 hex digits."""
_POD_ANY = re.compile(r"pod([0-9A-Za-z][0-9A-Za-z_.-]*)")
"""Whatever uid a manifest gave, in the place where only kubelet makes directories."""
_KUBEPODS = re.compile(r"(?s:.*)/kubepods(?:/(?:burstable|besteffort|guaranteed))?")

_UNIT = re.compile(r"(?s:.+)\.(service|scope|slice|mount|socket|swap)")
"""The types of systemd units that have cgroups."""
_USER_SLICE = re.compile(r"user-[0-9]+\.slice")


def identify(path: str) -> Identity:
    """The identity of a cgroup path, relative to the cgroup mount ("/" is the root).

    Trailing and doubled slashes, `/..` as seen from inside a cgroup namespace and the kernel's " (deleted)"
    are forgiven; `..` never leads out of a container. `path` is given back as it came.
    """
    pod_uid: str | None = None
    unit: str | None = None
    kind = "root"
    names = [name for name in path.removesuffix(" (deleted)").split("/") if name not in ("", ".", "..")]
    for index, name in enumerate(names):
        if len(name) > MAX_NAME:
            kind = "other"
            continue
        above = "".join(f"/{n}" for n in names[max(0, index - 3) : index])
        unit_type = match[1] if (match := _UNIT.fullmatch(name)) else None
        found = _container(name, above, kind, unit)
        if found is not None:
            runtime, container_id = found
            if unit_type is not None:
                # systemd escapes what it puts into a unit's name, and nobody else does.
                unit, container_id = name, unescape(container_id)
            if pod := _POD_SLICE.fullmatch(name.partition(":")[0]):
                pod_uid = pod[1].replace("_", "-")
            kind = KIND_CONTAINER if index + 1 == len(names) else KIND_INTERNAL
            return Identity(path, runtime, container_id, pod_uid, unit, kind)
        if unit_type is not None:
            # systemd writes a unit that is called like a kernel file with a `_` in front: cg_escape().
            unit = name.removeprefix("_")
        if uid := _pod(name, above):
            pod_uid, kind = uid, "pod"
        elif _USER_SLICE.fullmatch(name):
            kind = "user"
        else:
            kind = unit_type if unit_type in ("service", "scope", "slice") else "other"
    return Identity(path, None, None, pod_uid, unit, kind)


def _container(name: str, above: str, kind: str, unit: str | None) -> tuple[str | None, str] | None:
    """(runtime, id) if this name is a container in its place; `kind` and `unit` are those above it.

    The runtime is None where the path does not tell it: below a pod in the cgroupfs driver, and
    `docker run --cgroup-parent /batch`. The latter has no unit above it: inside a service or a user's
    session 64 hex digits are somebody's hash.
    """
    for rule in _RULES:
        match = rule.name.fullmatch(name)
        if match is not None and rule.above.fullmatch(above):
            return rule.runtime, match[1]
    if kind == "pod" and _CONTAINER_OF_POD.fullmatch(name):
        return None, name
    if kind == "other" and unit is None and _HEX_ALONE.fullmatch(name) and not above.endswith(_NO_CONTAINERS):
        return None, name
    return None


def _pod(name: str, above: str) -> str | None:
    """The uid if this is a pod of Kubernetes."""
    match = _POD_SLICE.fullmatch(name) or _POD_UID.fullmatch(name)
    if match is None and _KUBEPODS.fullmatch(above):
        match = _POD_ANY.fullmatch(name)
    return match[1].replace("_", "-") if match else None


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
    if identity.kind == "other" and not inside_unit and not _SHELVES.fullmatch(path):
        return Role.UNIT
    return Role.PASS


def identify_lines(lines: Iterable[bytes], out: TextIO) -> int:
    """One JSON object per input line, in order; returns how many.

    Only the newline is taken off: a cgroup's name may hold any other byte. Bytes that are no UTF-8 become
    `\\udc80` to `\\udcff`, from which `os.fsencode` makes them again.
    """
    count = 0
    for line in lines:
        path = line.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        identity = identify(path)
        out.write(json.dumps(msgspec.structs.asdict(identity)) + "\n")
        count += 1
    return count
