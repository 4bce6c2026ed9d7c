"""What a close writes down, for ever: which batches were billed, what they sum up to, and over what it was closed. Pure.

Canonical bytes, so that a manifest has one digest: JSON in ASCII, keys sorted, no whitespace, digests in hex, and
every integer beyond ±2**53 as a string of its decimal digits, since a reader that holds numbers as doubles would
round it; any other integer is a number. Lists are sorted by what they are about. The digest is the SHA-256 of the
bytes, and the next manifest has it: a manifest stands for all before it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ledger.errors import LedgerError
from ledger.periods.blockers import Waived
from ledger.periods.streams import Span

EXACT_IN_A_DOUBLE = 2**53
FORMAT = 1
_DIGESTS = frozenset({"previous_digest", "last_digest"})
_TEXTS = frozenset({"agent_id", "by", "id", "kind", "period", "reason", "tenant"})
"""What stays a text even if it is all digits: a tenant may be called so."""
_DECIMAL = re.compile(r"-?[1-9][0-9]{15,59}")
"""At most 60 digits: a sum of 2**64 values of 64 bits has 39."""


class ManifestError(LedgerError):
    """Bytes that are no manifest; the message says where."""


class Range(msgspec.Struct, frozen=True, order=True, forbid_unknown_fields=True):
    """Batches of one stream, both ends included. The hash chain makes the last one's digest stand for all before it."""

    agent_id: str
    epoch: int
    first_seq: int
    last_seq: int
    batches: int
    last_digest: bytes

    @property
    def span(self) -> Span:
        return Span(self.agent_id, self.epoch, self.first_seq, self.last_seq)


class Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tenant's part. `sums`: measure -> value in the measure's own unit, unbounded; where a measure is a maximum
    (`wire.measures.MAXIMA`) it is that, and no sum.
    """

    tenant: str
    batches: int
    rows: int
    sums: Mapping[str, int]


class Adjustment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Usage of a period that was closed before it came; it is billed with this close."""

    period: str
    """In which the usage lies."""
    ranges: tuple[Range, ...]
    accounts: tuple[Account, ...]


class Recovered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What openings say no batch carried (or, negative, two did): measure -> value, signed."""

    tenant: str
    sums: Mapping[str, int]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One close of one period. `previous_digest` is that of the period before, b"" for the first that was closed."""

    period: str
    previous_digest: bytes
    closed_at_unix_ns: int
    by: str
    ranges: tuple[Range, ...]
    accounts: tuple[Account, ...]
    waived: tuple[Waived, ...] = ()
    adjustments: tuple[Adjustment, ...] = ()
    recovered: tuple[Recovered, ...] = ()
    format: int = FORMAT

    def canonical(self) -> bytes:
        """The bytes to store; equal for equal content, whatever the order in which it was put together."""
        plain = _written(msgspec.to_builtins(_sorted(self), builtin_types=(bytes,)))
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes."""
        return hashlib.sha256(self.canonical()).digest()


def parse(data: bytes) -> Manifest:
    """The manifest that these bytes say. It need not be canonical (`chain.verify_chain` looks), but of this format."""
    try:
        found = msgspec.convert(_read(json.loads(data)), Manifest, strict=True, builtin_types=(bytes,))
    except (
        ValueError,
        RecursionError,
    ) as error:  # msgspec.ValidationError is one, and so is a wrong encoding.
        raise ManifestError(f"this is no manifest: {error}") from error
    if found.format != FORMAT:
        raise ManifestError(
            f"this manifest has format {found.format}, and this release reads {FORMAT}: upgrade"
        )
    return found


def _sorted(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(
        manifest,
        ranges=tuple(sorted(manifest.ranges)),
        accounts=tuple(sorted(manifest.accounts, key=lambda a: a.tenant)),
        waived=tuple(
            sorted(manifest.waived, key=lambda w: (w.blocker.agent_id, w.blocker.epoch, w.blocker.id))
        ),
        adjustments=tuple(
            msgspec.structs.replace(
                adjustment,
                ranges=tuple(sorted(adjustment.ranges)),
                accounts=tuple(sorted(adjustment.accounts, key=lambda a: a.tenant)),
            )
            for adjustment in sorted(manifest.adjustments, key=lambda a: a.period)
        ),
        recovered=tuple(sorted(manifest.recovered, key=lambda r: r.tenant)),
    )


def _written(value: Any) -> Any:
    match value:
        case dict():
            return {key: _written(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_written(inner) for inner in value]
        case bytes():
            return value.hex()
        case int() if abs(value) > EXACT_IN_A_DOUBLE:
            return str(value)
    return value


def _read(value: Any, key: str = "") -> Any:
    """The way back, by the name under which something stands. What is not as it should be is left to `convert`."""
    match value:
        case dict():
            return {name: _read(inner, name) for name, inner in value.items()}
        case list():
            return [_read(inner, key) for inner in value]
        case str() if key in _DIGESTS:
            return bytes.fromhex(value)
        case str() if key not in _TEXTS and _DECIMAL.fullmatch(value):
            return int(value)
    return value
