"""The agent's identity: enrolment with a join token, renewal at half life.

Key, certificate and the rest are one file, replaced by one rename: no crash can leave a key beside a
certificate that does not fit it. `cryptography` is loaded only when a key is made, so that an idle agent
does not carry it.
"""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import grpc.aio
import msgspec

from agent.errors import AgentError
from wire.daemon.files import replace_durably
from wire.identity import AgentId
from wire.tls import CHANNEL_OPTIONS, client_credentials, client_credentials_without_certificate
from wire.token import JoinToken, TokenError
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import EnrolmentStub

FILE_NAME = "identity.json"


class EnrolError(AgentError):
    """Enrolment or renewal did not work; the message names the fix."""


class Identity(msgspec.Struct, frozen=True):
    """Who this agent is. `not_before`, `not_after`: unix seconds."""

    agent_id: AgentId
    collectors: list[str]
    not_before: int
    not_after: int
    ca_pem: str
    certificate_chain_pem: str
    key_pem: str

    @classmethod
    def load(cls, state_dir: Path) -> Identity:
        path = state_dir / FILE_NAME
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            raise EnrolError(
                f"this host is not enrolled ({path} does not exist): on the collector run"
                " `weighbridge-collector token create`, here `weighbridge-agent enroll TOKEN`"
            ) from None
        except (OSError, msgspec.MsgspecError) as error:
            raise EnrolError(
                f"{path}: {error}; make it readable for this user, or enrol again with --force"
            ) from error

    def renewal_due(self, now: float) -> bool:
        """Half of the certificate's life is over."""
        return now >= (self.not_before + self.not_after) / 2

    def credentials(self) -> grpc.ChannelCredentials:
        return client_credentials(
            self.ca_pem.encode(), self.certificate_chain_pem.encode(), self.key_pem.encode()
        )

    def save(self, state_dir: Path) -> None:
        """Replace the identity atomically and durably."""
        path = state_dir / FILE_NAME
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
            replace_durably(path, msgspec.json.encode(self))
        except OSError as error:
            raise EnrolError(f"{path}: {error.strerror}; make {state_dir} writable for this user") from error


def enroll(
    token_text: str, state_dir: Path, host: str, agent_id: AgentId | None, timeout_seconds: float
) -> Identity:
    """Spend a join token for an identity and save it. The key is made here and never leaves the host."""
    try:
        token = JoinToken.decode(token_text)
    except TokenError as error:
        raise EnrolError(str(error)) from None
    key_pem, csr_der = _new_key()
    request = pb.EnrolRequest(token=token.secret, csr_der=csr_der, agent_id=agent_id or "", host=host)
    trouble = ""
    for address in token.addresses:
        credentials = client_credentials_without_certificate(token.ca_pem.encode())
        with grpc.secure_channel(address, credentials, CHANNEL_OPTIONS) as channel:
            try:
                answer = EnrolmentStub(channel).Enrol(request, timeout=timeout_seconds)
            except grpc.RpcError as error:
                trouble = f"{address}: {error.details()}"
                if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT):
                    raise EnrolError(trouble) from None
                continue
        host_reached = address.rpartition(":")[0]
        collectors = [f"{host_reached}{c}" if c.startswith(":") else c for c in answer.collectors]
        identity = _identity(AgentId(answer.agent_id), collectors, answer, key_pem)
        identity.save(state_dir)
        return identity
    raise EnrolError(
        f"no collector could be reached ({trouble}): check the address in the token, the firewall and this host's clock"
    )


async def renew(
    identity: Identity, channel: grpc.aio.Channel, state_dir: Path, timeout_seconds: float
) -> Identity:
    """A new key and certificate for the same agent, saved. The old one stays good until it expires."""
    key_pem, csr_der = _new_key()
    try:
        answer = await EnrolmentStub(channel).Renew(pb.RenewRequest(csr_der=csr_der), timeout=timeout_seconds)
    except grpc.aio.AioRpcError as error:
        raise EnrolError(f"renewal: {error.code().name}: {error.details()}") from None
    fresh = _identity(identity.agent_id, identity.collectors, answer, key_pem)
    fresh.save(state_dir)
    return fresh


def _identity(
    agent_id: AgentId, collectors: list[str], answer: pb.EnrolResponse | pb.RenewResponse, key_pem: str
) -> Identity:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(answer.certificate_chain_pem)
    not_before = certificate.not_valid_before_utc.timestamp()
    if time.time() < not_before:
        raise EnrolError(
            "this host's clock is behind the collector's: set it (chronyc makestep) and enrol again"
        )
    return Identity(
        agent_id=agent_id,
        collectors=collectors,
        not_before=int(not_before),
        not_after=int(certificate.not_valid_after_utc.timestamp()),
        ca_pem=answer.ca_bundle_pem.decode(),
        certificate_chain_pem=answer.certificate_chain_pem.decode(),
        key_pem=key_pem,
    )


def _new_key() -> tuple[str, bytes]:
    """(private key PEM, signing request DER)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem.decode(), csr.public_bytes(serialization.Encoding.DER)
