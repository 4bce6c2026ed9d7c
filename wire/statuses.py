"""Answers to a batch and the METER code each reason belongs to."""

from __future__ import annotations

from enum import StrEnum
from typing import cast

from wire.v1.ingest_pb2 import Reason, Status

__all__ = ["REASONS", "REJECTIONS", "Meter", "Reason", "Status", "label", "meter_code"]

REASONS = tuple(cast("Reason", number) for number in Reason.values() if number)
REJECTIONS = tuple(reason for reason in REASONS if reason < Reason.REASON_OUT_OF_WINDOW)
"""Reasons of REJECTED; those behind them are reasons of RETRY."""


def label(reason: Reason) -> str:
    """As the label `reason` of the metrics has it."""
    return Reason.Name(reason).removeprefix("REASON_").lower()


class Meter(StrEnum):
    """Codes in logs, answers and metrics; the operator guide has a section for each."""

    DATABASE_UNAVAILABLE = "METER-001"
    BUFFER_OVERFLOW = "METER-002"
    NOT_AUTHORISED = "METER-003"
    HIGH_LATENCY = "METER-004"
    INVALID_BATCH = "METER-005"
    IDENTITY_CONFLICT = "METER-006"


def meter_code(reason: Reason) -> Meter | None:
    """The code of a reason; None for REASON_UNSPECIFIED and for the ordinary reasons to retry."""
    if reason in (Reason.REASON_FOREIGN_AGENT, Reason.REASON_TENANT_NOT_PERMITTED):
        return Meter.NOT_AUTHORISED
    if reason == Reason.REASON_IDENTITY_CONFLICT:
        return Meter.IDENTITY_CONFLICT
    if reason == Reason.REASON_STORAGE_UNAVAILABLE:
        return Meter.DATABASE_UNAVAILABLE
    if reason in (Reason.REASON_OVERLOADED, Reason.REASON_PARK_FULL, Reason.REASON_MEMORY):
        return Meter.BUFFER_OVERFLOW
    if Reason.REASON_DIGEST_MISMATCH <= reason <= Reason.REASON_CHAIN_BROKEN:
        return Meter.INVALID_BATCH
    return None
