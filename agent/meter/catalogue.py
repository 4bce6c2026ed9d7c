"""Who each unit is and who pays for it: identity, labels and owners in one place, remembered per path."""

from __future__ import annotations

from collections.abc import Iterable

from agent.meter.batch import Described, kind_of_special
from agent.meter.hostile import visible
from agent.meter.identity import Identity, identify, unescape
from agent.meter.labels import LabelCache
from agent.meter.model import Reading
from agent.meter.owners import Owners
from agent.meter.rows import ROOT_ID, Usage
from wire.limits import MAX_NAME_BYTES, MAX_PATH_BYTES
from wire.v1 import usage_pb2 as pb

MAX_REMEMBERED = 50_000

_KIND = {
    "container": pb.UNIT_KIND_CONTAINER,
    "service": pb.UNIT_KIND_SERVICE,
    "scope": pb.UNIT_KIND_SCOPE,
}


class Catalogue:
    """Answers change only with the labels and the rules; `forget` after either changed."""

    def __init__(self, owners: Owners, labels: LabelCache) -> None:
        self.owners = owners
        self.labels = labels
        self._described: dict[str, Described] = {}
        self._tenants: dict[str, str] = {}

    def tenant_of(self, reading: Reading) -> str:
        if reading.cgroup_id == ROOT_ID:
            return self.owners.host
        tenant = self._tenants.get(reading.path)
        if tenant is None:
            if len(self._tenants) >= MAX_REMEMBERED:
                self._tenants.clear()
            identity = identify(reading.path)
            tenant = self.owners.tenant(identity, self.labels.get(identity.container_id))
            self._tenants[reading.path] = tenant
        return tenant

    def describe(self, usage: Usage) -> Described:
        special = kind_of_special(usage.cgroup_id)
        if special is not None:
            return Described(special, "/" if usage.cgroup_id == ROOT_ID else "")
        known = self._described.get(usage.path)
        if known is None:
            if len(self._described) >= MAX_REMEMBERED:
                self._described.clear()
            known = self._described[usage.path] = self._describe(identify(usage.path))
        return known

    def _describe(self, identity: Identity) -> Described:
        name = self.labels.get(identity.container_id).name
        if name is None and identity.unit is not None:
            name = visible(unescape(identity.unit), MAX_NAME_BYTES)
        return Described(
            kind=int(_KIND.get(identity.kind, pb.UNIT_KIND_OTHER)),
            path=visible(identity.path, MAX_PATH_BYTES),
            runtime=identity.runtime or "",
            container_id=visible(identity.container_id or "", MAX_NAME_BYTES),
            pod_uid=identity.pod_uid or "",
            name=name or "",
        )

    def learn(self, paths: Iterable[str]) -> None:
        """Ask the label sources when somebody new is there or the time is up. Blocks for seconds at most."""
        if not self.labels.sources:
            return
        ids = [i for path in paths if (i := identify(path).container_id) is not None]
        if self.labels.due(ids):
            self.labels.refresh()
            self.forget()

    def forget(self) -> None:
        self._described.clear()
        self._tenants.clear()
