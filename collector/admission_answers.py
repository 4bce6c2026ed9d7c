"""What the running collector answers about admission over its control socket, and what it lets be changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from collector.audit import Witness
from collector.config import TenantPlan
from collector.decide.admission import Admission
from collector.decide.bucket import MICRO, UNLIMITED
from collector.errors import CollectorError
from collector.plans import Plans, save_overrides
from wire.daemon.journal import Journal

MAX_TENANTS_SHOWN = 10_000

log = Journal("collector.admission")


class AdmissionAnswers:
    """`commands`: name -> what answers a request."""

    def __init__(self, admission: Admission, plans: Plans, overrides_file: Path, witness: Witness) -> None:
        self._admission = admission
        self._plans = plans
        self._file = overrides_file
        self._witness = witness
        self.commands: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "parked": self._parked,
            "plans": self._show,
            "plan_set": self._set,
            "plan_clear": self._clear,
        }

    def _parked(self, _request: dict[str, Any]) -> dict[str, Any]:
        now_unix_ns = time.time_ns()
        views = self._admission.views(time.monotonic_ns())
        return {
            "tenants": [
                {
                    "tenant": view.tenant,
                    "batches": view.batches,
                    "bytes": view.bytes,
                    "debt_tokens": view.debt / MICRO,
                    "drained_in_seconds": view.drained_ns / 1e9,
                    "oldest_seconds": (now_unix_ns - view.oldest_unix_ns) / 1e9
                    if view.oldest_unix_ns
                    else 0.0,
                }
                for view in views[:MAX_TENANTS_SHOWN]
            ],
            "not_shown": max(0, len(views) - MAX_TENANTS_SHOWN),
        }

    def _show(self, request: dict[str, Any]) -> dict[str, Any]:
        """One tenant, or all that have a plan of their own or were heard of."""
        one = request.get("tenant")
        if one is not None:
            return {"tenants": [self._plan(str(one))], "not_shown": 0}
        names = sorted(self._plans.named().union(self._admission.tenants()))
        return {
            "tenants": [self._plan(name) for name in names[:MAX_TENANTS_SHOWN]],
            "not_shown": max(0, len(names) - MAX_TENANTS_SHOWN),
        }

    def _plan(self, tenant: str) -> dict[str, Any]:
        plan = self._plans.of(tenant)
        limited = plan.rate < UNLIMITED
        balance = self._admission.balance(tenant, time.monotonic_ns())
        return {
            "tenant": tenant,
            "source": self._plans.source(tenant),
            "rate": plan.rate / MICRO if limited else None,
            "burst": plan.capacity / MICRO if limited else None,
            "balance": balance / MICRO if limited else None,
            "park_bytes": plan.park_bytes,
            "park_batches": plan.park_batches,
        }

    def _set(self, request: dict[str, Any]) -> dict[str, Any]:
        tenant = str(request["tenant"])
        try:
            said = msgspec.convert(request["plan"], TenantPlan)
        except msgspec.ValidationError as error:
            raise CollectorError(f"{tenant}: {error}") from None
        self._witness(
            "plan_set", by={"uid": request["peer_uid"]}, tenant=tenant, plan=msgspec.to_builtins(said)
        )
        self._take({**self._plans.overrides, tenant: said})
        log.warning("plan_overridden", tenant=tenant, plan=msgspec.to_builtins(said))
        return {"tenants": [self._plan(tenant)], "not_shown": 0}

    def _clear(self, request: dict[str, Any]) -> dict[str, Any]:
        tenant = str(request["tenant"])
        overrides = dict(self._plans.overrides)
        if overrides.pop(tenant, None) is None:
            raise CollectorError(f"{tenant} is not overridden; see `weighbridge-collector plan show`")
        self._witness("plan_cleared", by={"uid": request["peer_uid"]}, tenant=tenant)
        self._take(overrides)
        log.info("plan_override_cleared", tenant=tenant)
        return {"tenants": [self._plan(tenant)], "not_shown": 0}

    def _take(self, overrides: dict[str, TenantPlan]) -> None:
        """On disk first: what an operator was told holds after a restart, too."""
        save_overrides(self._file, overrides)
        self._plans.overrides = overrides
        self._admission.reconsider(time.monotonic_ns())
