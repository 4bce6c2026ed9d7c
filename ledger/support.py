"""`weighbridge-ledger support-bundle`: what goes in. Nobody's usage, no key, no token; see `redaction`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ledger import __version__, config, online
from ledger.config import Settings
from ledger.server import ENDPOINTS_FILE
from wire.daemon import support_bundle
from wire.daemon.control import ask
from wire.daemon.redaction import Scrubber, secrets_in_file, settings_and_secrets, shown
from wire.daemon.support_bundle import Part, as_json

UNITS = (
    "weighbridge-ledger.service",
    "weighbridge-reconcile.service",
    "weighbridge-reconcile.timer",
)
HARMLESS = frozenset(
    {
        "journal_level", "source.kafka.brokers.*", "source.kafka.topic", "source.kafka.client.security.protocol",
        "source.kafka.client.sasl.mechanism", "source.kafka.client.sasl.mechanisms",
        "source.kafka.client.sasl.username", "source.kafka.client.ssl.*.location", "store.database",
        "periods.length", "local_port.address",
    }
)  # fmt: skip
"""Keys whose text anybody may see. All other text is hidden."""
ENDPOINTS = frozenset({"store.dsn"})
"""URLs of which scheme, host and port may be seen."""


def make(output: Path, settings_file: Path | None, journal_file: Path | None) -> list[str]:
    """Write the bundle; returns the names in it."""
    settings, trouble, secrets = settings_and_secrets(
        config.read, settings_file, config.DEFAULT_FILE, Settings(), HARMLESS
    )
    location = settings.source.kafka.client.get("ssl.key.location")
    for file in (settings.store.password_file, Path(str(location)) if location else None):
        secrets += secrets_in_file(file)
    return support_bundle.write(output, _parts(settings, trouble, journal_file), Scrubber(secrets))


def _parts(settings: Settings, trouble: str, journal_file: Path | None) -> Iterator[Part]:
    where = settings.local_port

    def status() -> dict[str, Any]:
        return ask(settings.control_socket, {"command": "status"})

    def page(path: str) -> str:
        endpoints = settings.state_dir / ENDPOINTS_FILE
        port = where.port or int(json.loads(endpoints.read_bytes())["local"])
        return support_bundle.page(where.address, port, path)

    yield "versions.json", lambda: support_bundle.versions("weighbridge-ledger", __version__)
    yield "settings.json", lambda: trouble or as_json(shown(settings, HARMLESS, ENDPOINTS))
    yield (
        "check.txt",
        lambda: "".join(f"{f.verdict:8} {f.what}: {f.text}\n" for f in online.findings(settings)),
    )
    yield "status.json", lambda: as_json(status())
    # No series of the ledger says how much anybody used.
    yield "metrics.txt", lambda: page("/metrics")
    yield "readyz.txt", lambda: page("/readyz")
    yield "journal.txt", lambda: support_bundle.journal(journal_file, *UNITS)
    yield "units.txt", lambda: support_bundle.units(*UNITS)
    # Of ClickHouse's directory the names of parts tell days, and there are thousands.
    yield (
        "files.txt",
        lambda: support_bundle.command("du", "--max-depth=1", "--bytes", str(settings.state_dir)),
    )
