"""A small certificate authority: one root, short-lived leaves, one directory.

    <directory>/ca.crt ca.key          the root; the key is made here, 0600, and never overwritten
    <directory>/server.pem             the collector's own key and certificate, renewed at half life
    <directory>/registry.db            who holds what

ECDSA P-256 throughout. An agent's name is its SPIFFE URI; subjects are for people. With an external CA
none of this is used: point `tls` in the collector's settings at PEM files.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from collector.audit import Witness, unseen
from collector.door.registry import CertificateRecord, Registry
from collector.errors import CollectorError
from wire.daemon.files import replace_durably
from wire.daemon.journal import Journal
from wire.identity import AgentId, spiffe_uri
from wire.statuses import Meter

if TYPE_CHECKING:
    # gRPC is no part of what a command needs of the CA, and takes longer to load than all of that.
    from wire.tls import PemPair

ROOT_LIFE = timedelta(days=3_650)
SERVER_LIFE = timedelta(days=90)
BACKDATE = timedelta(minutes=5)
"""Agents' clocks may be a little behind."""
MAX_CSR_BYTES = 8_192
CA_FILE, CA_KEY_FILE, SERVER_FILE = "ca.crt", "ca.key", "server.pem"

log = Journal("collector.ca")


class CsrRefused(Exception):
    """A signing request that cannot be signed; the message says why."""


class CertificateAuthority:
    def __init__(self, directory: Path, witness: Witness = unseen) -> None:
        """Open an existing CA; `witness` is told of what it does. CollectorError if there is none or it cannot be read."""
        self.directory = directory
        self._witness = witness
        try:
            self.ca_pem = (directory / CA_FILE).read_bytes()
            key = serialization.load_pem_private_key((directory / CA_KEY_FILE).read_bytes(), None)
        except FileNotFoundError:
            raise CollectorError(
                f"no CA in {directory}: make one with `weighbridge-collector ca init --domain DOMAIN --host NAME`"
            ) from None
        except (OSError, ValueError) as error:
            raise CollectorError(
                f"CA in {directory}: {error}; run as its owner, or restore its files"
            ) from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._certificate = x509.load_pem_x509_certificate(self.ca_pem)
        self.trust_domain = str(
            self._certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
        )

    @functools.cached_property
    def registry(self) -> Registry:
        """Who holds what. Opened when it is asked: settings can be checked on a disk that is read-only."""
        return Registry(self.directory / "registry.db", self._witness)

    @classmethod
    def init(
        cls, directory: Path, trust_domain: str, hosts: Sequence[str], witness: Witness = unseen
    ) -> CertificateAuthority:
        """Make a root and the collector's first certificate."""
        if (directory / CA_KEY_FILE).exists() or (directory / CA_FILE).exists():
            raise CollectorError(
                f"{directory} has a CA already; it is never overwritten. Name another directory"
            )
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise CollectorError(
                f"{directory}: {error.strerror}; name a directory this user may make"
            ) from error
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain),
                x509.NameAttribute(NameOID.COMMON_NAME, "Weighbridge CA"),
            ]
        )
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + ROOT_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        witness("ca_made", domain=trust_domain, serial=f"{certificate.serial_number:x}")
        # The key first: a crash in between leaves a key without certificate, which `init` reports.
        replace_durably(directory / CA_KEY_FILE, _key_pem(key))
        replace_durably(directory / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        authority = cls(directory, witness)
        authority.issue_server(hosts)
        return authority

    def issue_server(self, hosts: Sequence[str]) -> None:
        """A new certificate for the collector under these host names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        certificate = self._sign(
            key.public_key(), x509.SubjectAlternativeName(names), ExtendedKeyUsageOID.SERVER_AUTH, SERVER_LIFE
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        self._witness(
            "server_certificate_issued", hosts=list(hosts)[:64], serial=f"{certificate.serial_number:x}"
        )
        # Key and certificate in one file, so that no crash can leave two that do not match.
        replace_durably(self.directory / SERVER_FILE, _key_pem(key) + pem)

    def server_pem(self) -> bytes:
        """Key and chain of the collector as they are. Whoever only looks must not renew: a root that checks
        would leave a key that the collector's user cannot read.
        """
        path = self.directory / SERVER_FILE
        try:
            return path.read_bytes()
        except OSError as error:
            raise CollectorError(
                f"{path}: {error.strerror}; issue one with `weighbridge-collector ca issue --server`"
            ) from error

    def server_pair(self) -> PemPair:
        """(key, chain) of the collector, renewed here when half of its life is over."""
        text = self.server_pem()
        certificate = x509.load_pem_x509_certificate(text)
        half = certificate.not_valid_before_utc + SERVER_LIFE / 2
        if datetime.now(UTC) > half:
            try:
                self.issue_server(_hosts(certificate))
                text = self.server_pem()
            except (CollectorError, OSError) as error:
                # The old one is good for as long again: nobody is turned away for a full disk.
                log.error("server_certificate_not_renewed", code=Meter.DATABASE_UNAVAILABLE, error=error)
        key, marker, rest = text.partition(b"-----BEGIN CERTIFICATE-----")
        return key, marker + rest

    def server_hosts(self) -> list[str]:
        """Names and addresses that the collector's certificate is good for."""
        _, chain = self.server_pair()
        return _hosts(x509.load_pem_x509_certificate(chain))

    def issue_agent(self, csr_der: bytes, agent_id: AgentId, life: timedelta) -> bytes:
        """Sign an agent's request: the chain in PEM. CsrRefused if the request is not acceptable."""
        certificate = self._sign(
            acceptable_key(csr_der),
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(spiffe_uri(self.trust_domain, agent_id))]
            ),
            ExtendedKeyUsageOID.CLIENT_AUTH,
            life,
        )
        self.registry.add_certificate(
            CertificateRecord(
                f"{certificate.serial_number:x}",
                agent_id,
                int(certificate.not_valid_before_utc.timestamp()),
                int(certificate.not_valid_after_utc.timestamp()),
                None,
            )
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def _sign(
        self,
        public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        names: x509.SubjectAlternativeName,
        usage: x509.ObjectIdentifier,
        life: timedelta,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.trust_domain)]))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )


def _hosts(certificate: x509.Certificate) -> list[str]:
    sans = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in sans]


def acceptable_key(csr_der: bytes) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    """The public key of a signing request, or CsrRefused."""
    if len(csr_der) > MAX_CSR_BYTES:
        raise CsrRefused(f"signing request of {len(csr_der)} bytes; at most {MAX_CSR_BYTES}")
    try:
        csr = x509.load_der_x509_csr(csr_der)
        good = csr.is_signature_valid
    except (ValueError, InvalidSignature, TypeError) as error:
        raise CsrRefused(f"not a PKCS#10 signing request in DER: {error}") from None
    if not good:
        raise CsrRefused("the signing request's signature does not fit its key")
    key = csr.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return key
    if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 4096:
        return key
    raise CsrRefused("key type not accepted: use ECDSA P-256 or P-384, or RSA of 2048 to 4096 bits")


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
