"""The alert rules as they are shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SHARE = ROOT / "packaging/share"
RULES = SHARE / "prometheus/weighbridge.rules.yaml"
SCRAPE = SHARE / "prometheus/scrape.example.yaml"
DASHBOARDS = SHARE / "grafana"


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
