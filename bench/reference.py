"""Writes docs/configuration.md and the example settings from the code: `python -m bench.reference`."""

from __future__ import annotations

import sys
from pathlib import Path

from agent.config import Settings as AgentSettings
from collector.config import Settings as CollectorSettings
from ledger.config import Settings as LedgerSettings
from wire.daemon.settings_reference import example, reference

DOCS = Path(__file__).parent.parent / "docs"

_INTRODUCTION = """\
# Configuration

Generated from the code by `python -m bench.reference`; a test checks that it is up to date.

Each daemon reads one YAML file (`--config FILE`, or `/etc/weighbridge/agent.yaml`, `collector.yaml` and
`ledger.yaml` there) and then its drop-ins (`agent.d/*.yaml` beside `agent.yaml`) in lexical order: maps are
merged key by key, a list replaces a list. Every default is in the code, so an empty file is valid.
An unknown key is an error with file, line and the nearest known key. `check-config` says whether a
file is good; SIGHUP takes a changed file up, and a bad one changes nothing and shows in `status`, `/readyz`
and the metrics `weighbridge_agent_reload_failed`, `weighbridge_collector_reload_failed` and
`weighbridge_ledger_reload_failed`.

Durations are written `500ms`, `10s`, `5m`, `24h`, `7d`; sizes `64KiB`, `512MB`, `1GiB`.
Commented example files: [agent.yaml](agent.yaml), [collector.yaml](collector.yaml), [ledger.yaml](ledger.yaml).
"""


def files() -> dict[str, str]:
    """File name below docs/ -> content."""
    return {
        "configuration.md": f"{_INTRODUCTION}\n## Agent\n\n{reference(AgentSettings)}\n"
        f"## Collector\n\n{reference(CollectorSettings)}\n"
        f"## Ledger\n\n{reference(LedgerSettings)}".rstrip()
        + "\n",
        "agent.yaml": "# weighbridge-agent: every key at its default.\n" + example(AgentSettings),
        "collector.yaml": "# weighbridge-collector: every key at its default.\n" + example(CollectorSettings),
        "ledger.yaml": "# weighbridge-ledger: every key at its default.\n" + example(LedgerSettings),
    }


def main() -> int:
    for name, text in files().items():
        (DOCS / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
