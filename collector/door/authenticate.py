"""Peer certificate -> agent. gRPC has verified the chain; here the name and its standing are judged."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from cryptography import x509

from collector.door.registry import Registry
from wire.identity import AgentId, agent_of_spiffe
from wire.statuses import Meter


class NotAuthenticated(Exception):
    """Who knocks is no agent of ours; the text names the METER code and the fix."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{Meter.NOT_AUTHORISED}: {text}")


class Peer(NamedTuple):
    agent_id: AgentId
    serial: str
    not_after: float
    """Unix seconds."""
    tenants: frozenset[str] | None
    """Tenants it may report; None: any."""


class Standing(Enum):
    GOOD = "good"
    REVOKED = "revoked"
    CHANGED = "changed"
    """It may report other tenants than when it came in."""


class Authenticator:
    """`registry` is None with an external CA: then the certificate alone decides."""

    def __init__(self, trust_domain: str, registry: Registry | None) -> None:
        self._trust_domain = trust_domain
        self._registry = registry

    def peer(self, auth_context: Mapping[str, Iterable[bytes]]) -> Peer:
        """The agent behind a connection. NotAuthenticated says why there is none."""
        pem = next(iter(auth_context.get("x509_pem_cert", ())), None)
        if pem is None:
            raise NotAuthenticated("no client certificate; enrol with `weighbridge-agent enroll`")
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            sans = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound):
            raise NotAuthenticated("the certificate names no agent (no SPIFFE URI)") from None
        uris = sans.get_values_for_type(x509.UniformResourceIdentifier)
        agents = [agent for uri in uris if (agent := agent_of_spiffe(uri, self._trust_domain))]
        if len(uris) != 1 or len(agents) != 1:
            raise NotAuthenticated(
                f"the certificate is not for one agent of spiffe://{self._trust_domain}: enrol at this collector"
            )
        peer = Peer(
            agents[0],
            f"{certificate.serial_number:x}",
            certificate.not_valid_after_utc.timestamp(),
            self._tenants(agents[0]),
        )
        if self.expired(peer) or self._revoked(peer):
            raise NotAuthenticated("the certificate is revoked or has expired: enrol again")
        return peer

    @property
    def version(self) -> tuple[int, int]:
        """As long as it is the same, nobody's standing has changed."""
        return (0, 0) if self._registry is None else self._registry.version

    def expired(self, peer: Peer) -> bool:
        return time.time() > peer.not_after

    def standing(self, peer: Peer) -> Standing:
        """Of somebody who came in earlier."""
        if self._revoked(peer):
            return Standing.REVOKED
        try:
            return Standing.GOOD if self._tenants(peer.agent_id) == peer.tenants else Standing.CHANGED
        except NotAuthenticated:
            return Standing.REVOKED

    def _revoked(self, peer: Peer) -> bool:
        return self._registry is not None and self._registry.revoked(peer.serial, peer.agent_id)

    def _tenants(self, agent_id: AgentId) -> frozenset[str] | None:
        if self._registry is None:
            return None
        record = self._registry.agent(agent_id)
        if record is None:
            raise NotAuthenticated(f"agent {agent_id} is not enrolled here: enrol it with a join token")
        return record.tenants
