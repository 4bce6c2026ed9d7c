"""What is judged by comparison is judged as the whole batch would be."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fleet import SECOND_NS, Stream
from collector.decide import validate
from collector.decide.familiar import Familiars, lay_out
from collector.decide.validate import Bounds, Checked, Validator
from wire.containers import put_table, table_of
from wire.identity import new_agent_id
from wire.limits import MAX_VALUE
from wire.measures import MEASURES
from wire.statuses import Reason
from wire.v1 import usage_pb2 as pb

AGENT = new_agent_id()
NOW = time.time_ns()
ROWS = 3


def acquainted(rows: int = ROWS, tenant: str = "acme") -> tuple[Validator, Stream]:
    """A validator that has judged two batches of a stream, and the stream."""
    validator, stream = Validator(Bounds()), Stream(AGENT, 5, rows, tenant)
    for seq in (1, 2):
        checked = validator.check(stream.next().batch, AGENT, 5, seq, None, NOW)
        assert checked.refusal is None
    return validator, stream


def verdict(checked: Checked) -> tuple[object, ...]:
    return (checked.refusal, checked.tenant, checked.rows, checked.cpu_usage_ns, checked.previous_digest,
            list(checked.gaps))  # fmt: skip


def both(body: bytes, epoch: int = 5, seq: int = 3, **more: Any) -> tuple[Checked, Checked]:
    """(judged by one that knows the stream, judged by one that knows nothing)"""
    validator, _ = acquainted()
    bounds, permitted = more.get("bounds", Bounds()), more.get("permitted")
    validator.bounds = bounds
    known = validator.check(body, AGENT, epoch, seq, permitted, NOW)
    with patch.object(validate, "lay_out", lambda *_: None):  # number by number
        return known, Validator(bounds).check(body, AGENT, epoch, seq, permitted, NOW)


def recognised(message: pb.UsageBatch, rows: int = ROWS) -> bool:
    """Whether a batch with seq 3 that follows two ordinary ones is judged without decoding it whole."""
    validator, stream = acquainted(rows)
    stream.seq = message.seq - 1
    return validator._familiars.news(stream.seal(message).batch, AGENT, 5, message.seq) is not None


@pytest.mark.parametrize("rows", [1, 10, 100, 1_000])
def test_an_ordinary_batch_is_recognised(rows: int) -> None:
    _, stream = acquainted(rows)
    assert recognised(stream.message(), rows), "every batch would be decoded whole"


def test_devices_and_host_totals_do_not_make_a_batch_strange() -> None:
    _, stream = acquainted()
    message = stream.message()
    for name in pb.UsageBatch.DESCRIPTOR.fields_by_name:
        if name.startswith("device_"):
            getattr(message, name).extend([2, 0])
    message.host_totals.cpu_usage_ns = 7 * SECOND_NS
    assert recognised(message)
    assert both(message.SerializeToString(deterministic=True))[0].refusal is None


@pytest.mark.parametrize("source", ["\x1b[2J", "x" * 300, "é"])
def test_a_text_that_is_not_plain_is_looked_at_closely(source: str) -> None:
    message = acquainted()[1].message()
    message.host_totals.cpu_source = source
    assert not recognised(message)
    known, unknown = both(message.SerializeToString(deterministic=True))
    assert verdict(known) == verdict(unknown)
    assert (known.refusal is None) == (source == "é")


def test_the_tenants_of_an_agent_are_told_apart() -> None:
    validator, stream = acquainted()
    for tenant, rows in (("globex", 2), ("a", 4), ("acme", 3), ("globex", 2), ("a", 4)):
        stream.tenant, stream.rows = tenant, rows
        item = stream.next()
        checked = validator.check(item.batch, AGENT, 5, item.seq, None, NOW)
        assert (checked.refusal, checked.tenant, checked.rows) == (None, tenant, rows)


def test_gaps_and_openings_are_looked_at_closely() -> None:
    _, stream = acquainted()
    message = stream.message()
    message.gaps.add(start_unix_ns=1, end_unix_ns=2, count=3)
    assert not recognised(message)
    known, unknown = both(message.SerializeToString(deterministic=True))
    assert verdict(known) == verdict(unknown)
    assert known.gaps[0].count == 3


def test_a_device_of_no_row_is_refused() -> None:
    _, stream = acquainted()
    message = stream.message()
    for name in pb.UsageBatch.DESCRIPTOR.fields_by_name:
        if name.startswith("device_"):
            getattr(message, name).append(ROWS)
    refusal = both(message.SerializeToString(deterministic=True))[0].refusal
    assert refusal is not None
    assert refusal.detail == f"device_row: row {ROWS} of {ROWS}"


def test_a_number_cut_off_by_the_end_of_its_column_is_refused() -> None:
    _, stream = acquainted()
    body = (
        stream.next().batch + b"\xfa\x02\x04\x01\x01\x01\x80"
    )  # pids_peak: three numbers, and half a fourth
    assert reason_of(body) == Reason.REASON_MALFORMED


def test_nothing_hides_between_the_parts_that_are_known() -> None:
    _, stream = acquainted()
    message = stream.message()
    message.interval_duration_ns = 100_000
    body = message.SerializeToString(deterministic=True)
    # Three digits instead of five leave room for two bytes: another schema version.
    at = body.index(b"\x48" + b"\xa0\x8d\x06") + 4
    assert reason_of(body[:at] + b"\x08\x02" + body[at:]) == Reason.REASON_UNKNOWN_SCHEMA_VERSION
    # A digest that ends like the tenant's field, where that should stand; the real one is no name.
    tenant, digest = b"2\x04acme", b"d" * 26 + b"2\x04acme"
    ordinary = stream.message().SerializeToString(deterministic=True)
    begin = ordinary.index(b"\x20\x03*\x20")
    forged = ordinary[:begin] + b"\x20\x032\x04e\x07il*\x20" + digest + ordinary[begin + 36 + len(tenant) :]
    assert pb.UsageBatch.FromString(forged).tenant == "e\x07il"
    assert len(forged) == len(ordinary)
    assert reason_of(forged) == Reason.REASON_OUT_OF_BOUNDS


def reason_of(body: bytes) -> Reason:
    known, unknown = both(body)
    assert verdict(known) == verdict(unknown)
    assert known.refusal is not None
    return known.refusal.reason


def test_what_is_remembered_is_bounded() -> None:
    _, stream = acquainted()
    body = stream.next().batch
    batch = pb.UsageBatch.FromString(body)
    layout = lay_out(batch, body)
    assert layout is not None
    one = Familiars(1 << 20)
    one.learn(batch, AGENT, layout)
    assert one.news(body, AGENT, 5, 3) is not None
    none = Familiars(100)
    none.learn(batch, AGENT, layout)
    assert none.news(body, AGENT, 5, 3) is None


def test_an_identity_inside_that_is_not_the_one_outside_is_refused_also_of_a_known_stream() -> None:
    _, stream = acquainted()
    body = stream.next().batch
    for epoch, seq in ((5, 4), (6, 3), (5, 2)):
        refusal = both(body, epoch, seq)[0].refusal
        assert refusal is not None
        assert refusal.reason == Reason.REASON_IDENTITY_MISMATCH
    first = stream.message()
    first.seq = 1
    refusal = both(first.SerializeToString(deterministic=True), 5, 1)[0].refusal
    assert refusal is not None
    assert refusal.reason == Reason.REASON_CHAIN_BROKEN


def test_settings_that_became_stricter_hold_for_known_streams_too() -> None:
    _, stream = acquainted()
    body = stream.next().batch
    for more in (
        {"bounds": Bounds(tenants=frozenset({"globex"}))},
        {"permitted": frozenset({"globex"})},
        {"bounds": Bounds(past_ns=SECOND_NS)},
    ):
        known, unknown = both(body, **more)
        assert known.refusal is not None
        assert verdict(known) == verdict(unknown)


numbers = st.one_of(
    st.integers(0, 300),
    st.sampled_from(
        [0, 127, 128, 2**14 - 1, 2**35, 2**49, 2**56 - 1, 2**56, MAX_VALUE, MAX_VALUE + 1, 2**63, 2**64 - 1]
    ),
)
full = st.lists(numbers, min_size=ROWS, max_size=ROWS)
odd = st.lists(numbers, max_size=5)
some_columns = st.dictionaries(
    st.sampled_from((*MEASURES, "known", "row_flags")), st.one_of(full, full, odd), max_size=8
)
some_devices = st.dictionaries(
    st.sampled_from([n for n in pb.UsageBatch.DESCRIPTOR.fields_by_name if n.startswith("device_")]),
    st.lists(st.one_of(st.integers(0, 4), numbers), min_size=1, max_size=2),
    max_size=7,
)
some_header = st.dictionaries(
    st.sampled_from(("seq", "epoch", "interval_start_unix_ns", "interval_end_unix_ns", "interval_duration_ns",
                     "cpus", "flags", "schema_version")),
    numbers, max_size=2,
)  # fmt: skip


def message_of(
    header: dict[str, int], columns: dict[str, list[int]], devices: dict[str, list[int]]
) -> pb.UsageBatch:
    message = acquainted()[1].message()
    for name, value in header.items():
        wide = (
            pb.UsageBatch.DESCRIPTOR.fields_by_name[name].type
            == pb.UsageBatch.DESCRIPTOR.fields_by_name["seq"].type
        )
        setattr(message, name, value if wide else value & 0xFFFF)
    for name, values in {**columns, **devices}.items():
        narrow = name in ("row_flags", "device_row", "device_major", "device_minor")
        message.ClearField(name)  # type: ignore[arg-type]
        getattr(message, name).extend([v & 0xFFFFFFFF for v in values] if narrow else values)
    return message


@given(some_header, some_columns, some_devices, st.booleans())
def test_any_numbers_are_judged_as_one_by_one(
    header: dict[str, int], columns: dict[str, list[int]], devices: dict[str, list[int]], new_table: bool
) -> None:
    message = message_of(header, columns, devices)
    if new_table:
        table = table_of(message)
        table.name[0] = "another"
        put_table(message, table)
    known, unknown = both(message.SerializeToString(deterministic=True))
    assert verdict(known) == verdict(unknown)


@given(some_columns, st.data())
def test_any_encoding_is_judged_as_the_whole_is_number_by_number(
    columns: dict[str, list[int]], data: st.DataObject
) -> None:
    """Fields twice, out of order, unpacked, unknown, cut, or overwritten with noise."""
    message = message_of({}, columns, {})
    body = message.SerializeToString(deterministic=True)
    other = message_of(data.draw(some_header), data.draw(some_columns), {})
    kept = data.draw(st.sets(st.sampled_from([f.name for f, _ in other.ListFields()])))
    for field, _ in other.ListFields():
        if field.name not in kept:
            other.ClearField(field.name)  # type: ignore[arg-type]
    extra = data.draw(st.one_of(
        st.just(other.SerializeToString(deterministic=True)),
        st.binary(max_size=12),
        st.sampled_from([b"\xd8\x02\x05" * ROWS, b"\xfa\x07\x02hi", b"\x82\x82\x00\x03\x01\x01\x01", b"\x20\x03",
                         b"\x82\x02\x83\x00\x01\x01\x01", b"\xba\x04\x02\x80\x01"]),
    ))  # fmt: skip
    at = data.draw(st.one_of(st.integers(0, len(body)), st.sampled_from([0, len(body), 42, 43, 78, 84])))
    to = data.draw(st.sampled_from([at, at, min(len(body), at + len(extra)), len(body)]))
    known, unknown = both(body[:at] + extra + body[to:])
    assert verdict(known) == verdict(unknown)
