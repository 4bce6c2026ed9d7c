"""A manifest has one form of bytes, and says after parsing what it said before."""

from __future__ import annotations

import hashlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.periods.blockers import Blocker, Waived
from ledger.periods.manifest import (
    EXACT_IN_A_DOUBLE,
    Account,
    Adjustment,
    Manifest,
    ManifestError,
    Range,
    Recovered,
    parse,
)
from ledger.periods.unknown import Kind

UINT64 = st.integers(0, 2**64 - 1)
EDGES = st.sampled_from([2**53 - 1, 2**53, 2**53 + 1, -(2**53), -(2**53) - 1, 10**15, 10**16 - 1, 2**128])
SUMS = st.dictionaries(st.sampled_from(["cpu_usage_ns", "oom_kills"]), EDGES | st.integers(-(2**140), 2**140))
TEXT = st.text(max_size=20) | st.sampled_from(["9007199254740993", "12345678901234567890", "acme"])
RANGES = st.builds(Range, TEXT, UINT64, UINT64, UINT64, UINT64, st.binary(min_size=32, max_size=32))
ACCOUNTS = st.builds(Account, TEXT, UINT64, UINT64, SUMS)
BLOCKERS = st.builds(
    Blocker,
    *(st.text("0123456789abcdef", min_size=12, max_size=12), st.sampled_from(Kind), TEXT),
    *(UINT64, UINT64, UINT64, UINT64, UINT64, TEXT, TEXT),
)


def lists(of: st.SearchStrategy, key) -> st.SearchStrategy[tuple]:
    """What a manifest holds: one of each, sorted."""
    return st.lists(of, max_size=3, unique_by=key).map(lambda items: tuple(sorted(items, key=key)))


def by_tenant(item) -> str:
    return item.tenant


MANIFESTS = st.builds(
    Manifest,
    TEXT,
    st.binary(min_size=32, max_size=32) | st.just(b""),
    UINT64,
    TEXT,
    lists(RANGES, lambda r: (r.agent_id, r.epoch, r.first_seq)),
    lists(ACCOUNTS, by_tenant),
    lists(
        st.builds(Waived, BLOCKERS, TEXT, TEXT), lambda w: (w.blocker.agent_id, w.blocker.epoch, w.blocker.id)
    ),
    lists(
        st.builds(
            Adjustment,
            TEXT,
            lists(RANGES, lambda r: (r.agent_id, r.epoch, r.first_seq)),
            lists(ACCOUNTS, by_tenant),
        ),
        lambda a: a.period,
    ),
    lists(st.builds(Recovered, TEXT, SUMS), by_tenant),
)


@given(MANIFESTS)
def test_what_is_parsed_is_what_was_written(manifest: Manifest) -> None:
    data = manifest.canonical()
    assert parse(data) == manifest
    assert parse(data).canonical() == data
    assert manifest.digest() == hashlib.sha256(data).digest()


@given(MANIFESTS)
def test_the_bytes_are_what_any_reader_of_json_can_hold(manifest: Manifest) -> None:
    def exact(digits: str) -> int:
        assert abs(int(digits)) <= EXACT_IN_A_DOUBLE, digits
        return int(digits)

    data = manifest.canonical()
    found = json.loads(data.decode("ascii"), parse_int=exact, parse_float=pytest.fail)
    assert json.dumps(found, sort_keys=True, separators=(",", ":")).encode() == data


@given(MANIFESTS, st.randoms())
def test_the_order_in_which_it_was_put_together_changes_nothing(manifest: Manifest, random) -> None:
    shuffled = {
        name: tuple(random.sample(value, len(value)))
        for name, value in msgspec.structs.asdict(manifest).items()
        if isinstance(value, tuple)
    }
    assert msgspec.structs.replace(manifest, **shuffled).canonical() == manifest.canonical()


def test_the_first_bytes_ever_written_are_still_those() -> None:
    """Stored digests depend on it: a change here is another format."""
    manifest = Manifest(
        "2026-11",
        b"",
        1_796_083_200_000_000_000,
        "ops",
        (Range("a", 1_764_000_000_000_000, 1, 2, 2, b"\x01" * 32),),
        (Account("acmé", 2, 3, {"oom_kills": 2**53, "cpu_usage_ns": 2**53 + 1}),),
        recovered=(Recovered("acmé", {"cpu_usage_ns": -5}),),
    )
    assert manifest.canonical() == (
        b'{"accounts":[{"batches":2,"rows":3,"sums":{"cpu_usage_ns":"9007199254740993",'
        b'"oom_kills":9007199254740992},"tenant":"acm\\u00e9"}],"adjustments":[],"by":"ops",'
        b'"closed_at_unix_ns":"1796083200000000000","format":1,"period":"2026-11","previous_digest":"",'
        b'"ranges":[{"agent_id":"a","batches":2,"epoch":1764000000000000,"first_seq":1,"last_digest":"'
        + b"01" * 32
        + b'","last_seq":2}],"recovered":[{"sums":{"cpu_usage_ns":-5},"tenant":"acm\\u00e9"}],"waived":[]}'
    )


EMPTY = Manifest("2026-11", b"", 0, "ops", (), ()).canonical()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"period":1}',
        EMPTY.replace(b'"closed_at_unix_ns":0', b'"closed_at_unix_ns":0.5'),
        EMPTY.replace(b'digest":""', b'digest":"xy"'),
        EMPTY.replace(b'"format":1', b'"format":2'),
        EMPTY.replace(b'"format":1', b'"format":1,"more":1'),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    assert data != EMPTY
    with pytest.raises(ManifestError):
        parse(data)
