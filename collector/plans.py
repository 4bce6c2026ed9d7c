"""Which plan is in force for a tenant: what an operator overrode, over what the settings say of it, over their default.

Overrides are made over the control socket and last until they are cleared; they live in one small file that is
replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from collector.config import AdmissionSettings, TenantPlan
from collector.decide.admission import HEAVIEST
from collector.decide.bucket import MICRO, UNLIMITED, Plan
from collector.errors import CollectorError
from wire.daemon.files import replace_durably

MAX_OVERRIDES = 10_000
DEFAULT_BURST_SECONDS = 60

Source = Literal["override", "settings", "default"]


def plan_of(said: Sequence[TenantPlan], default: AdmissionSettings) -> Plan:
    """The plan out of what was said, the strongest word first, and the default for the rest."""
    levels = [*said, TenantPlan(default.rate, default.burst, default.park, default.park_batches)]
    level = next(index for index, words in enumerate(levels) if words.rate is not None)
    rate = levels[level].rate
    # A burst that was said for a weaker rate is not meant for this one.
    burst = next((words.burst for words in levels[: level + 1] if words.burst is not None), None)
    park_bytes = next(words.park for words in levels if words.park is not None)
    park_batches = next(words.park_batches for words in levels if words.park_batches is not None)
    if rate == "unlimited" or rate is None:
        return Plan(UNLIMITED, UNLIMITED, park_bytes, park_batches)
    rate_micro = round(rate * MICRO)
    capacity = DEFAULT_BURST_SECONDS * rate_micro if burst is None else round(burst * MICRO)
    return Plan(rate_micro, max(HEAVIEST, capacity), park_bytes, park_batches)


class Plans:
    """Every tenant's plan. The settings change with a reload, the overrides with a command."""

    def __init__(self, settings: AdmissionSettings, overrides: Mapping[str, TenantPlan]) -> None:
        self.settings = settings
        self.overrides = dict(overrides)

    def of(self, tenant: str) -> Plan:
        said = (self.overrides.get(tenant), self.settings.tenants.get(tenant))
        return plan_of([words for words in said if words is not None], self.settings)

    def source(self, tenant: str) -> Source:
        if tenant in self.overrides:
            return "override"
        return "settings" if tenant in self.settings.tenants else "default"

    def named(self) -> set[str]:
        """Tenants with a plan of their own."""
        return self.settings.tenants.keys() | self.overrides.keys()


def load_overrides(path: Path) -> dict[str, TenantPlan]:
    """CollectorError when the file is there and cannot be used."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CollectorError(f"{path}: {error.strerror}; make it readable for this user") from error
    try:
        return msgspec.json.decode(data, type=dict[str, TenantPlan])
    except msgspec.DecodeError as error:
        raise CollectorError(f"{path}: {error}; move it away, the settings' plans apply then") from error


def save_overrides(path: Path, overrides: Mapping[str, TenantPlan]) -> None:
    """CollectorError leaves the old file as it was."""
    if len(overrides) > MAX_OVERRIDES:
        raise CollectorError(f"{MAX_OVERRIDES} tenants are overridden already; write plans into the settings")
    try:
        replace_durably(path, msgspec.json.format(msgspec.json.encode(overrides)) + b"\n", 0o640)
    except OSError as error:
        raise CollectorError(f"{path}: {error.strerror}; the override was not made") from error
