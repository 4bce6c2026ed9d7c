"""`weighbridge-collector support-bundle`: what goes in. Nobody's usage, no key, no token; see `redaction`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collector import __version__, config, online
from collector.config import Settings
from collector.door.ca import CA_KEY_FILE, SERVER_FILE
from collector.server import ENDPOINTS_FILE
from wire.daemon import support_bundle
from wire.daemon.control import ask
from wire.daemon.redaction import Scrubber, secrets_in_file, settings_and_secrets, shown
from wire.daemon.support_bundle import Part, as_json

UNITS = ("weighbridge-collector.service",)
HARMLESS = frozenset(
    {
        "journal_level", "listen.*", "tls.trust_domain", "validation.tenants.*", "admission.rate",
        "admission.tenants.*", "handoff.kafka.brokers.*", "handoff.kafka.topic", "handoff.kafka.giants.*",
        "handoff.kafka.client.security.protocol", "handoff.kafka.client.sasl.mechanism",
        "handoff.kafka.client.sasl.mechanisms", "handoff.kafka.client.sasl.username",
        "handoff.kafka.client.ssl.*.location", "handoff.kafka.client.compression.*", "webhook.events.*",
        "local_port.address",
    }
)  # fmt: skip
"""Keys whose text anybody may see. All other text is hidden."""
ENDPOINTS = frozenset({"shared.redis", "webhook.url"})
"""URLs of which scheme, host and port may be seen."""
USAGE = tuple(f"weighbridge_collector_tenant_{what}" for what in ("batches", "rows", "cpu_usage"))


def make(output: Path, settings_file: Path | None, journal_file: Path | None) -> list[str]:
    """Write the bundle; returns the names in it."""
    settings, trouble, secrets = settings_and_secrets(
        config.read, settings_file, config.DEFAULT_FILE, Settings(), HARMLESS
    )
    for file in _secret_files(settings):
        secrets += secrets_in_file(file)
    return support_bundle.write(output, _parts(settings, trouble, journal_file), Scrubber(secrets))


def _secret_files(settings: Settings) -> Iterator[Path | None]:
    yield settings.ca_dir / CA_KEY_FILE
    yield settings.ca_dir / SERVER_FILE
    yield settings.tls.key_file
    yield settings.webhook.secret_file
    location = settings.handoff.kafka.client.get("ssl.key.location")
    yield Path(str(location)) if location else None


def _parts(settings: Settings, trouble: str, journal_file: Path | None) -> Iterator[Part]:
    where = settings.local_port

    def asked(command: str) -> dict[str, Any]:
        return ask(settings.control_socket, {"command": command})

    def status() -> dict[str, Any]:
        answer = asked("status")
        return {**answer, "tenants": sorted(answer["tenants"])}

    def plans() -> list[dict[str, Any]]:
        return [{k: v for k, v in plan.items() if k != "balance"} for plan in asked("plans")["tenants"]]

    def page(path: str) -> str:
        endpoints = settings.state_dir / ENDPOINTS_FILE
        port = where.port or int(json.loads(endpoints.read_bytes())["local"])
        return support_bundle.page(where.address, port, path)

    yield "versions.json", lambda: support_bundle.versions("weighbridge-collector", __version__)
    yield "settings.json", lambda: trouble or as_json(shown(settings, HARMLESS, ENDPOINTS))
    yield (
        "check.txt",
        lambda: "".join(f"{f.verdict:8} {f.what}: {f.text}\n" for f in online.findings(settings)),
    )
    yield "status.json", lambda: as_json(status())
    yield "parked.json", lambda: as_json(asked("parked"))
    yield "plans.json", lambda: as_json(plans())
    yield "metrics.txt", lambda: support_bundle.without_usage(page("/metrics"), USAGE)
    yield "readyz.txt", lambda: page("/readyz")
    yield "journal.txt", lambda: support_bundle.journal(journal_file, *UNITS)
    yield "units.txt", lambda: support_bundle.units(*UNITS)
    yield (
        "files.txt",
        lambda: support_bundle.files(settings.state_dir, settings.log_directory, settings.ca_dir),
    )
