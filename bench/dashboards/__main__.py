"""`python -m bench.dashboards`: writes packaging/share/grafana. A test checks that it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from bench.dashboards.agents import agents
from bench.dashboards.collector import collector
from bench.dashboards.completeness import completeness
from bench.dashboards.tenants import tenant_usage

DIRECTORY = Path(__file__).parents[2] / "packaging/share/grafana"


def files() -> dict[str, str]:
    """File name -> dashboard as JSON."""
    encoder = JSONEncoder(sort_keys=True, indent=1)
    made = {
        "agents": agents,
        "collector": collector,
        "tenant-usage": tenant_usage,
        "completeness": completeness,
    }
    return {f"{name}.json": encoder.encode(make().build()) + "\n" for name, make in made.items()}


def main() -> int:
    for name, text in files().items():
        (DIRECTORY / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
