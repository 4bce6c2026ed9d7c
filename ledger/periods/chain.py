"""Manifests one after another: what was billed of a period, what came late, and whether all is in order. Pure."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from ledger.periods.calendar import Period, PeriodError, following, length_of
from ledger.periods.calendar import parse as parse_period
from ledger.periods.manifest import Manifest, ManifestError, Range, parse
from ledger.periods.spans import common, subtract
from ledger.periods.streams import Span


class Fault(StrEnum):
    UNREADABLE = "unreadable"
    NOT_CANONICAL = "not_canonical"
    PREVIOUS_DIGEST = "previous_digest"
    GAP = "gap"
    """The period does not follow the one before."""
    NOT_CLOSED_BEFORE = "not_closed_before"
    """An adjustment of a period that no earlier manifest closed."""
    MISCOUNTED = "miscounted"
    BILLED_TWICE = "billed_twice"


class Finding(NamedTuple):
    """What is wrong, in the manifest of which period (by its place, "#3", if nothing can be read), in a sentence."""

    fault: Fault
    period: str
    sentence: str


def billed(manifests: Iterable[Manifest], period: str) -> list[Span]:
    """What the manifests hold of a period, when it was closed and as adjustments since."""
    return [found.span for manifest in manifests for found in _ranges(manifest, period)]


def late(booked: Iterable[Span], already: Iterable[Span]) -> list[Span]:
    """The booked batches that overlap a closed period and are in no manifest for it, given those and `billed` of
    it: the adjustment that the next close has to make. Sorted, disjoint and maximal.
    """
    return subtract(booked, already)


def verify_chain(documents: Sequence[bytes]) -> list[Finding]:
    """What is wrong with manifests as they are stored, oldest first; nothing if all is in order."""
    out: list[Finding] = []
    read: list[tuple[Manifest, Period]] = []
    for number, document in enumerate(documents):
        try:
            manifest = parse(document)
            period = parse_period(manifest.period, length_of(manifest.period))
        except (ManifestError, PeriodError) as error:
            out.append(Finding(Fault.UNREADABLE, f"#{number + 1}", str(error)))
            continue
        if manifest.canonical() != document:
            sentence = (
                "the bytes are not the canonical ones of what they say: they were changed after the close"
            )
            out.append(Finding(Fault.NOT_CANONICAL, manifest.period, sentence))
        wanted = hashlib.sha256(documents[number - 1]).digest() if number else b""
        if manifest.previous_digest != wanted:
            sentence = (
                f"names {manifest.previous_digest.hex() or 'nothing'} as the manifest before it, and that is"
                f" {wanted.hex() or 'nothing: it is the first'}: one was changed, removed or put in"
            )
            out.append(Finding(Fault.PREVIOUS_DIGEST, manifest.period, sentence))
        read.append((manifest, period))
    for (_, before), (_, after) in pairwise(read):
        if after != following(before):
            sentence = f"follows {before.name}, and {following(before).name} should"
            out.append(Finding(Fault.GAP, after.name, sentence))
    out += _adjustments_of_open_periods(read)
    manifests = [manifest for manifest, _ in read]
    out += _miscounted(manifests)
    out += _billed_twice(manifests)
    return out


def _ranges(manifest: Manifest, period: str) -> Iterator[Range]:
    if manifest.period == period:
        yield from manifest.ranges
    for adjustment in manifest.adjustments:
        if adjustment.period == period:
            yield from adjustment.ranges


def _adjustments_of_open_periods(read: Sequence[tuple[Manifest, Period]]) -> Iterator[Finding]:
    closed: set[str] = set()
    for manifest, period in read:
        for adjustment in manifest.adjustments:
            # What lies before the first period that was closed can only come as late.
            if adjustment.period not in closed and adjustment.period >= read[0][1].name:
                sentence = f"adjusts {adjustment.period}, which no manifest before it closed"
                yield Finding(Fault.NOT_CLOSED_BEFORE, period.name, sentence)
        closed.add(period.name)


def _miscounted(manifests: Iterable[Manifest]) -> Iterator[Finding]:
    for manifest in manifests:
        for ranges, accounts in (
            (manifest.ranges, manifest.accounts),
            *((adjustment.ranges, adjustment.accounts) for adjustment in manifest.adjustments),
        ):
            for one in ranges:
                if one.batches != one.last_seq - one.first_seq + 1 or one.first_seq < 1:
                    sentence = f"{named(one.span)} cannot be {one.batches} batches"
                    yield Finding(Fault.MISCOUNTED, manifest.period, sentence)
            in_ranges = sum(one.batches for one in ranges)
            of_tenants = sum(account.batches for account in accounts)
            if in_ranges != of_tenants:
                sentence = f"has {in_ranges} batches in its ranges and {of_tenants} in its tenants' accounts"
                yield Finding(Fault.MISCOUNTED, manifest.period, sentence)


def _billed_twice(manifests: Iterable[Manifest]) -> Iterator[Finding]:
    spans: dict[str, list[Span]] = defaultdict(list)
    for manifest in manifests:
        spans[manifest.period] += [one.span for one in manifest.ranges]
        for adjustment in manifest.adjustments:
            spans[adjustment.period] += [one.span for one in adjustment.ranges]
    for period in sorted(spans):
        for span in common(spans[period]):
            yield Finding(Fault.BILLED_TWICE, period, f"{named(span)} is billed more than once for {period}")


def named(span: Span) -> str:
    """For an operator."""
    return f"{span.agent_id}/{span.epoch}/{span.first_seq}..{span.last_seq}"
