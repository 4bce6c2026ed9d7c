"""Identity + labels -> tenant, by ordered rules. Pure. The first rule all of whose keys match decides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from agent.errors import AgentError
from agent.meter.hostile import visible
from agent.meter.identity import KINDS, Identity
from wire.daemon.settings import Seconds
from wire.identity import UNATTRIBUTED
from wire.limits import MAX_TENANT_BYTES

MAX_RULES = 1_000

_TENANT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_TENANT_BYTES - 1}}}")


class OwnersError(AgentError):
    """A rule that cannot be used; the message says which and how to mend it."""


class Labels(msgspec.Struct, frozen=True):
    """What a runtime says of a container. All text is hostile; bounded where it enters."""

    name: str | None = None
    namespace: str | None = None
    labels: Mapping[str, str] = {}


NO_LABELS = Labels()


class LabelsSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where names and labels come from. All off by default."""

    docker_socket: Annotated[
        Path | None,
        msgspec.Meta(description="Docker's API socket. Whoever may open it is root; never needed to meter"),
    ] = None
    podman_socket: Annotated[
        Path | None, msgspec.Meta(description="podman's API socket (podman.socket), Docker-compatible")
    ] = None
    cri_socket: Annotated[
        Path | None,
        msgspec.Meta(description="containerd's or CRI-O's CRI socket (Kubernetes); root likewise"),
    ] = None
    refresh: Annotated[
        Seconds, msgspec.Meta(description="how often a source is asked when no new container asks for it")
    ] = Seconds(60)


class TenantFrom(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Takes the tenant from the container itself. One key."""

    label: Annotated[str | None, msgspec.Meta(description="value of this label")] = None
    namespace: Annotated[bool, msgspec.Meta(description="the Kubernetes namespace")] = False
    slice: Annotated[bool, msgspec.Meta(description="the innermost systemd slice, without `.slice`")] = False
    user: Annotated[bool, msgspec.Meta(description="`user-UID` of the user slice")] = False


class Rule(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """All keys that are given must match. `*` matches within a path segment, `**` across segments."""

    tenant: Annotated[str | None, msgspec.Meta(description="the tenant that pays")] = None
    tenant_from: Annotated[
        TenantFrom | None, msgspec.Meta(description="or: where to take the tenant's name from")
    ] = None
    label: Annotated[
        dict[str, str], msgspec.Meta(description="label -> pattern; needs a label source, see `labels`")
    ] = {}
    namespace: Annotated[str | None, msgspec.Meta(description="pattern of the Kubernetes namespace")] = None
    name: Annotated[str | None, msgspec.Meta(description="pattern of the container's name")] = None
    path: Annotated[str | None, msgspec.Meta(description="pattern of the cgroup path")] = None
    slice: Annotated[str | None, msgspec.Meta(description="pattern of any slice on the path")] = None
    unit: Annotated[str | None, msgspec.Meta(description="pattern of the systemd unit")] = None
    kind: Annotated[str | None, msgspec.Meta(description="container, service, scope or other")] = None
    runtime: Annotated[str | None, msgspec.Meta(description="docker, containerd, crio, podman ...")] = None


class OwnersSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Who pays: ordered rules from what a container is to a tenant."""

    default: Annotated[
        str, msgspec.Meta(description="tenant of what no rule claims; kept and delivered, never dropped")
    ] = UNATTRIBUTED
    host: Annotated[
        str, msgspec.Meta(description="tenant of the host's own row: kernel, slices, ended units' tails")
    ] = UNATTRIBUTED
    rules: Annotated[
        list[Rule], msgspec.Meta(description="tried in order; the first that matches decides")
    ] = []


class Owners:
    """Compiled rules. Raises OwnersError at construction, never later."""

    def __init__(self, settings: OwnersSettings) -> None:
        for where, tenant in (("owners.default", settings.default), ("owners.host", settings.host)):
            _checked(where, tenant)
        if len(settings.rules) > MAX_RULES:
            raise OwnersError(
                f"owners.rules: at most {MAX_RULES} rules; use `tenant_from` instead of a rule each"
            )
        self.default = settings.default
        self.host = settings.host
        self._rules = [_Compiled(number, rule) for number, rule in enumerate(settings.rules, start=1)]

    def tenant(self, identity: Identity, labels: Labels = NO_LABELS) -> str:
        for rule in self._rules:
            if rule.mismatch(identity, labels) is None:
                return rule.tenant(identity, labels) or self.default
        return self.default

    def explain(self, identity: Identity, labels: Labels = NO_LABELS) -> list[str]:
        """A line per rule up to the one that decides: why it did or did not match."""
        out = []
        for rule in self._rules:
            mismatch = rule.mismatch(identity, labels)
            if mismatch is not None:
                out.append(f"rule {rule.number}: no, {mismatch}")
                continue
            tenant = rule.tenant(identity, labels)
            if tenant is None:
                out.append(
                    f"rule {rule.number}: matches, but what it names is no tenant name; tenant is {self.default}"
                )
            else:
                out.append(f"rule {rule.number}: matches; tenant is {tenant}")
            return out
        return [*out, f"no rule matches; tenant is {self.default} (owners.default)"]


class _Compiled:
    def __init__(self, number: int, rule: Rule) -> None:
        self.number = number
        self._rule = rule
        where = f"owners.rules[{number}]"
        if (rule.tenant is None) == (rule.tenant_from is None):
            raise OwnersError(f"{where}: give exactly one of `tenant` and `tenant_from`")
        if rule.tenant is not None:
            _checked(f"{where}.tenant", rule.tenant)
        if rule.tenant_from is not None and sum(map(bool, msgspec.structs.astuple(rule.tenant_from))) != 1:
            raise OwnersError(f"{where}.tenant_from: give exactly one of label, namespace, slice, user")
        if rule.kind is not None and rule.kind not in KINDS:
            raise OwnersError(f"{where}.kind: `{rule.kind}` is none of {', '.join(KINDS)}")
        self._patterns = {
            key: _Glob(pattern)
            for key in ("namespace", "name", "path", "slice", "unit", "runtime")
            if (pattern := getattr(rule, key)) is not None
        }
        self._labels = {key: _Glob(pattern) for key, pattern in rule.label.items()}

    def mismatch(self, identity: Identity, labels: Labels) -> str | None:
        """None if the rule matches, else what did not."""
        rule = self._rule
        if rule.kind is not None and identity.kind != rule.kind:
            return f"kind is {identity.kind}, not {rule.kind}"
        for key, pattern in self._labels.items():
            value = labels.labels.get(key)
            if value is None or not pattern.matches(value):
                return f"label {key} is {_shown(value)}, not {pattern.text}"
        for key, pattern in self._patterns.items():
            if key == "slice":
                if not any(pattern.matches(name) for name in _slices(identity.path)):
                    return f"no slice on the path is {pattern.text}"
                continue
            value = getattr(labels if key in ("namespace", "name") else identity, key)
            if value is None or not pattern.matches(value):
                return f"{key} is {_shown(value)}, not {pattern.text}"
        return None

    def tenant(self, identity: Identity, labels: Labels) -> str | None:
        """The tenant this rule gives, or None if what it takes it from is absent or no tenant name."""
        source = self._rule.tenant_from
        if source is None:
            return self._rule.tenant
        slices = _slices(identity.path)
        value: str | None = None
        if source.label is not None:
            value = labels.labels.get(source.label)
        elif source.namespace:
            value = labels.namespace
        elif source.slice:
            value = slices[-1].removesuffix(".slice") if slices else None
        else:
            value = next((s.removesuffix(".slice") for s in slices if s.startswith("user-")), None)
        return value if value is not None and _TENANT.fullmatch(value) else None


class _Glob:
    """`*` within a segment, `**` across, `?` one character. Matched in linear passes, never by backtracking
    regular expressions, since the text is hostile.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._parts = re.findall(r"\*\*|\*|\?|[^*?]+", text)

    def matches(self, value: str) -> bool:
        positions = {0}
        for part in self._parts:
            if part == "**":
                positions = set(range(min(positions), len(value) + 1)) if positions else set()
            elif part == "*":
                reached: set[int] = set()
                for start in sorted(positions):
                    if start in reached:
                        continue
                    end = value.find("/", start)
                    reached.update(range(start, (end if end >= 0 else len(value)) + 1))
                positions = reached
            elif part == "?":
                positions = {p + 1 for p in positions if p < len(value) and value[p] != "/"}
            else:
                positions = {p + len(part) for p in positions if value.startswith(part, p)}
            if not positions:
                return False
        return len(value) in positions


def _slices(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment.endswith(".slice")]


def _checked(where: str, tenant: str) -> None:
    if not _TENANT.fullmatch(tenant):
        raise OwnersError(
            f"{where}: `{visible(tenant, 64)}` is no tenant name;"
            f" use letters, digits, . _ - ({MAX_TENANT_BYTES} at most)"
        )


def _shown(value: str | None) -> str:
    return "unknown" if value is None else visible(value, 80)
