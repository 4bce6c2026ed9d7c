"""`weighbridge-agent support-bundle`: what goes in. Nobody's usage, no key, no token; see `redaction`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from agent import __version__, config
from agent.config import Settings
from agent.doctor import examine
from agent.read import host, plan
from agent.ship import export
from agent.ship.enrol import FILE_NAME
from wire.daemon import support_bundle
from wire.daemon.control import ask
from wire.daemon.redaction import Scrubber, secrets_in_file, settings_and_secrets, shown
from wire.daemon.support_bundle import Part, as_json

UNITS = ("weighbridge-agent.service", "weighbridge-probes.service")
HARMLESS = frozenset(
    {
        "host_name", "journal_level", "read.hierarchy", "read.probes", "ship.collectors.*", "local_port.address",
        "owners.default", "owners.host", "owners.rules.*",
    }
)  # fmt: skip
"""Keys whose text anybody may see. All other text is hidden."""
USAGE = ("weighbridge_tenant_", "weighbridge_container_")
KERNEL_FILES = (
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/net/core/bpf_jit_enable",
    "/proc/sys/fs/file-nr",
    "/proc/pressure/memory",
    "/proc/loadavg",
    "/sys/fs/cgroup/cgroup.controllers",
    "/sys/fs/cgroup/cgroup.subtree_control",
)


def make(output: Path, settings_file: Path | None, journal_file: Path | None) -> list[str]:
    """Write the bundle; returns the names in it."""
    settings, trouble, secrets = settings_and_secrets(
        config.read, settings_file, config.DEFAULT_FILE, Settings(), HARMLESS
    )
    secrets += _key_material(settings)
    return support_bundle.write(output, _parts(settings, trouble, journal_file), Scrubber(secrets))


def _key_material(settings: Settings) -> Iterator[str]:
    for text in secrets_in_file(settings.state_dir / FILE_NAME):
        try:
            key = str(json.loads(text)["key_pem"])
        except (ValueError, KeyError, TypeError):
            # Not as we wrote it: all of it is a secret.
            yield text
            continue
        yield key
        yield from (line for line in key.splitlines() if not line.startswith("-----"))


def _parts(settings: Settings, trouble: str, journal_file: Path | None) -> Iterator[Part]:
    where = settings.local_port

    def status() -> dict[str, object]:
        return ask(settings.control_socket, {"command": "status"})

    def page(path: str) -> str:
        return support_bundle.page(where.address, where.port or int(str(status()["local_port"])), path)

    yield "versions.json", lambda: support_bundle.versions("weighbridge-agent", __version__)
    yield "settings.json", lambda: trouble or as_json(shown(settings, HARMLESS, ()))
    yield "doctor.txt", lambda: "".join(f"{f.level:8} {f.check:10} {f.text}\n" for f in examine(settings))
    yield "status.json", lambda: as_json(status())
    yield "metrics.txt", lambda: support_bundle.without_usage(page("/metrics"), USAGE)
    yield "readyz.txt", lambda: page("/readyz")
    yield "journal.txt", lambda: support_bundle.journal(journal_file, *UNITS)
    yield "units.txt", lambda: support_bundle.units(*UNITS)
    yield "kernel.txt", lambda: _kernel(settings)
    yield "probes.json", lambda: support_bundle.command("weighbridge-probes", "status", "--json")
    yield "spool.json", lambda: as_json(export.summary(settings.state_dir))
    yield "files.txt", lambda: support_bundle.files(settings.state_dir, settings.run_dir)


def _kernel(settings: Settings) -> str:
    """What this kernel offers, and what is mounted where."""
    facts = host.probe(settings.read.cgroup_root, settings.read.proc_root)
    mounts = [
        line
        for line in (settings.read.proc_root / "self/mountinfo").read_text().splitlines()
        if line.partition(" - ")[2].split(" ", 1)[0] in ("cgroup", "cgroup2", "bpf")
    ]
    found = {name: Path(name).read_text().strip() for name in KERNEL_FILES if Path(name).exists()}
    btf = Path("/sys/kernel/btf/vmlinux")
    return as_json(
        {
            "facts": {name: getattr(facts, name) for name in facts.__slots__},
            "plan": plan.make(facts, settings.read.hierarchy).signature,
            "btf_bytes": btf.stat().st_size if btf.exists() else None,
            "clock": host.clock_state(),
            "files": found,
            "mounts": mounts,
        }
    )
