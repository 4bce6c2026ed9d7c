"""When the collector's own certificates end. Looks only: renewal is the CA's."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509

from collector.config import Settings
from collector.door.ca import CA_FILE, SERVER_FILE
from collector.errors import CollectorError


def expiries(settings: Settings) -> Iterator[tuple[str, datetime]]:
    """("server" or "ca", its end) of each that can be read."""
    for name, path in certificate_files(settings).items():
        try:
            yield name, ends(path)
        except CollectorError:
            continue


def certificate_files(settings: Settings) -> dict[str, Path]:
    """Where they are, with a CA of our own or another's."""
    tls = settings.tls
    return {
        "server": tls.certificate_file or settings.ca_dir / SERVER_FILE,
        "ca": tls.client_ca_file or settings.ca_dir / CA_FILE,
    }


def ends(path: Path) -> datetime:
    """When the first certificate of a file to end does. CollectorError when there is none."""
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CollectorError(f"{path}: {error}; see `tls` in the settings") from error
    return min(certificate.not_valid_after_utc for certificate in found)
