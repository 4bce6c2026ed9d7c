"""Validation: every refusal named, and the quick way says what the careful way says."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fleet import SECOND_NS, Stream
from collector.decide.validate import Bounds, Checked, Validator, check_bytes
from collector.log_commands import field_of
from wire.containers import put_table, table_of
from wire.identity import digest, new_agent_id
from wire.limits import MAX_BATCH_BYTES
from wire.statuses import Reason
from wire.v1 import usage_pb2 as pb

AGENT = new_agent_id()


def judged(
    spoil: Callable[[pb.UsageBatch], object] = lambda b: None,
    *,
    rows: int = 3,
    bounds: Bounds | None = None,
    permitted: frozenset[str] | None = None,
) -> Checked:
    """The verdict, which is the same whether the table came packed or not."""
    batch = Stream(AGENT, 5, rows).plain_message()
    spoil(batch)
    plain = batch.SerializeToString(deterministic=True)
    packed = pb.UsageBatch.FromString(plain)
    packed.containers_zlib = zlib.compress(batch.containers.SerializeToString(deterministic=True), 0)
    now = time.time_ns()
    verdicts = [
        Validator(bounds or Bounds()).check(body, AGENT, 5, 1, permitted, now)
        for body in (plain, packed.SerializeToString(deterministic=True))
    ]
    assert verdicts[0] == verdicts[1]
    return verdicts[0]


def test_a_good_batch_is_good() -> None:
    checked = judged()
    assert checked.refusal is None
    assert (checked.tenant, checked.rows) == ("acme", 3)
    assert checked.cpu_usage_ns == sum(1_000_003 + 1 + row for row in range(3))


SPOILED: list[tuple[str, Callable[[pb.UsageBatch], object], Reason]] = [
    ("another schema version", lambda b: setattr(b, "schema_version", 9), Reason.REASON_UNKNOWN_SCHEMA_VERSION),
    ("another agent", lambda b: setattr(b, "agent_id", new_agent_id()), Reason.REASON_FOREIGN_AGENT),
    ("another epoch", lambda b: setattr(b, "epoch", 6), Reason.REASON_IDENTITY_MISMATCH),
    ("another seq", lambda b: setattr(b, "seq", 2), Reason.REASON_IDENTITY_MISMATCH),
    ("no tenant", lambda b: setattr(b, "tenant", ""), Reason.REASON_OUT_OF_BOUNDS),
    ("a path as tenant", lambda b: setattr(b, "tenant", "../../etc"), Reason.REASON_OUT_OF_BOUNDS),
    ("an empty interval", lambda b: setattr(b, "interval_end_unix_ns", b.interval_start_unix_ns), Reason.REASON_OUT_OF_BOUNDS),
    ("no duration", lambda b: setattr(b, "interval_duration_ns", 0), Reason.REASON_OUT_OF_BOUNDS),
    ("a clock a year ahead", lambda b: _shift(b, 365 * 86_400), Reason.REASON_CLOCK_SKEW),
    ("a clock two years behind", lambda b: _shift(b, -730 * 86_400), Reason.REASON_CLOCK_SKEW),
    ("no boot id", lambda b: setattr(b, "boot_id", "\x1b[31m"), Reason.REASON_OUT_OF_BOUNDS),
    ("no CPUs", lambda b: setattr(b, "cpus", 0), Reason.REASON_OUT_OF_BOUNDS),
    ("a digest too many", lambda b: setattr(b, "previous_digest", b"x" * 32), Reason.REASON_CHAIN_BROKEN),
    ("a column too short", lambda b: b.cpu_user_ns.pop(), Reason.REASON_TABLE_SHAPE),
    ("a column too long", lambda b: b.cpu_user_ns.append(1), Reason.REASON_TABLE_SHAPE),
    ("a CPU column too long", lambda b: b.cpu_usage_ns.append(1), Reason.REASON_TABLE_SHAPE),
    ("row flags too short", lambda b: b.row_flags.pop(), Reason.REASON_TABLE_SHAPE),
    ("nothing known", lambda b: b.ClearField("known"), Reason.REASON_TABLE_SHAPE),
    ("a table column too short", lambda b: b.containers.name.pop(), Reason.REASON_TABLE_SHAPE),
    ("no paths", lambda b: b.containers.ClearField("cgroup_path"), Reason.REASON_TABLE_SHAPE),
    ("a kind that is none", lambda b: b.containers.kind.__setitem__(0, 99), Reason.REASON_OUT_OF_BOUNDS),
    ("a negative counter", lambda b: b.cpu_user_ns.__setitem__(1, 2**64 - 5), Reason.REASON_OUT_OF_BOUNDS),
    ("negative CPU time", lambda b: b.cpu_usage_ns.__setitem__(1, 2**64 - 5), Reason.REASON_OUT_OF_BOUNDS),
    ("more CPU than there is", lambda b: b.cpu_usage_ns.__setitem__(0, 1_000 * SECOND_NS), Reason.REASON_IMPLAUSIBLE),
    ("more memory than exists", lambda b: b.memory_byte_seconds.__setitem__(0, 2**60), Reason.REASON_IMPLAUSIBLE),
    ("a terminal escape in a name", lambda b: b.containers.name.__setitem__(0, "\x1b[2J"), Reason.REASON_OUT_OF_BOUNDS),
    ("a newline in a path", lambda b: b.containers.cgroup_path.__setitem__(2, "/a\nb"), Reason.REASON_OUT_OF_BOUNDS),
    ("a name of 64 KiB", lambda b: b.containers.name.__setitem__(0, "x" * 65_536), Reason.REASON_OUT_OF_BOUNDS),
    ("a device of no row", lambda b: _device(b, 7), Reason.REASON_TABLE_SHAPE),
    ("half a device", lambda b: b.device_major.append(8), Reason.REASON_TABLE_SHAPE),
    ("an opening of no row", lambda b: b.openings.add(row=3), Reason.REASON_TABLE_SHAPE),
    ("a gap that ends before it starts", lambda b: b.gaps.add(start_unix_ns=2, end_unix_ns=1), Reason.REASON_OUT_OF_BOUNDS),
    ("a gap told at length in bytes", lambda b: b.gaps.add(detail="é" * 200), Reason.REASON_OUT_OF_BOUNDS),
    ("a terminal escape in a gap", lambda b: b.gaps.add(detail="\x1b[2J"), Reason.REASON_OUT_OF_BOUNDS),
    ("a terminal escape as host", lambda b: setattr(b, "host", "\x1b[2J"), Reason.REASON_OUT_OF_BOUNDS),
    ("a producer of 64 KiB", lambda b: setattr(b, "producer", "x" * 65_536), Reason.REASON_OUT_OF_BOUNDS),
    ("host totals from a newline", lambda b: setattr(b.host_totals, "cpu_source", "a\nb"), Reason.REASON_OUT_OF_BOUNDS),
    ("negative host totals", lambda b: setattr(b.host_totals, "cpu_deficit_ns", 2**64 - 5), Reason.REASON_OUT_OF_BOUNDS),
    ("a negative opening", lambda b: b.openings.add(row=1, io_read_ops=2**64 - 5), Reason.REASON_OUT_OF_BOUNDS),
    ("rows without end", lambda b: b.known.extend([1] * 1_000), Reason.REASON_TOO_LARGE),
    ("a table without end", lambda b: b.containers.cgroup_id.extend(range(1, 2_000)), Reason.REASON_TABLE_SHAPE),
    ("no table", lambda b: b.ClearField("containers"), Reason.REASON_TABLE_SHAPE),
    ("gaps without end", lambda b: [b.gaps.add() for _ in range(65)], Reason.REASON_TOO_LARGE),
]  # fmt: skip


@pytest.mark.parametrize(("more_ns", "believed"), [(0, True), (1, False)])
def test_each_cpu_may_account_ten_seconds_late(more_ns: int, believed: bool) -> None:
    def starved(batch: pb.UsageBatch) -> None:
        batch.cpus = 2
        batch.interval_duration_ns = 2 * SECOND_NS
        batch.cpu_usage_ns[:] = [2 * (2_100_000_000 + 10 * SECOND_NS) + more_ns, 0, 0]

    assert (judged(starved).refusal is None) == believed


def _shift(batch: pb.UsageBatch, seconds: int) -> None:
    batch.interval_start_unix_ns += seconds * SECOND_NS
    batch.interval_end_unix_ns += seconds * SECOND_NS


def _device(batch: pb.UsageBatch, row: int) -> None:
    for name in pb.UsageBatch.DESCRIPTOR.fields_by_name:
        if name.startswith("device_"):
            getattr(batch, name).append(row)


@pytest.mark.parametrize(("what", "spoil", "reason"), SPOILED, ids=[s[0] for s in SPOILED])
def test_what_is_wrong_is_refused_by_name(
    what: str, spoil: Callable[[pb.UsageBatch], object], reason: Reason
) -> None:
    refusal = judged(spoil).refusal
    assert refusal is not None, what
    assert Reason.Name(refusal.reason) == Reason.Name(reason), refusal.detail
    assert 0 < len(refusal.detail) <= 256
    assert refusal.detail.isprintable()
    assert field_of(Reason.Name(refusal.reason), refusal.detail), refusal.detail


def test_path_traversal_in_a_name_is_only_text() -> None:
    assert judged(lambda b: b.containers.name.__setitem__(0, "../../../etc/passwd")).refusal is None


def test_a_tenant_must_be_known_and_permitted() -> None:
    unknown = judged(bounds=Bounds(tenants=frozenset({"other"}))).refusal
    assert unknown is not None
    assert unknown.reason == Reason.REASON_UNKNOWN_TENANT
    foreign = judged(permitted=frozenset({"other"})).refusal
    assert foreign is not None
    assert foreign.reason == Reason.REASON_TENANT_NOT_PERMITTED
    assert judged(permitted=frozenset({"acme"}), bounds=Bounds(tenants=frozenset({"acme"}))).refusal is None


def test_bytes_that_are_not_what_was_meant_are_refused_before_anything_is_decoded() -> None:
    item = Stream(AGENT, 5).next()
    assert check_bytes(item.batch, item.digest) is None
    wrong = check_bytes(item.batch + b"x", item.digest)
    assert wrong is not None
    assert wrong.reason == Reason.REASON_DIGEST_MISMATCH
    large = check_bytes(b"x" * (MAX_BATCH_BYTES + 1), b"")
    assert large is not None
    assert large.reason == Reason.REASON_TOO_LARGE


@given(st.binary(max_size=300), st.integers(0, 2_600))
def test_no_bytes_make_the_validator_raise(noise: bytes, cut: int) -> None:
    body = Stream(AGENT, 5).next().batch
    validator = Validator(Bounds())
    for spoiled in (noise, body[:cut] + noise, body[:cut] + noise + body[cut:], body[:cut]):
        checked = validator.check(spoiled, AGENT, 5, 1, None, time.time_ns())
        assert checked.refusal is None or checked.refusal.detail


def test_a_column_hidden_in_an_odd_encoding_is_judged_on_the_whole_message() -> None:
    good = Stream(AGENT, 5).message()
    bad = pb.UsageBatch(io_read_bytes=[2**64 - 1] * 3)
    # The field twice: readers join the two.
    good.ClearField("io_read_bytes")
    twice = (
        bad.SerializeToString()
        + good.SerializeToString()
        + pb.UsageBatch(io_read_bytes=[]).SerializeToString()
    )
    assert judged_bytes(twice) == Reason.REASON_OUT_OF_BOUNDS
    # Not packed: one tag a value. Field 43 as varints.
    unpacked = b"".join(b"\xd8\x02" + b"\xff" * 9 + b"\x01" for _ in range(3))
    assert pb.UsageBatch.FromString(unpacked).io_read_bytes == [2**64 - 1] * 3
    assert judged_bytes(good.SerializeToString() + unpacked) == Reason.REASON_OUT_OF_BOUNDS
    # A varint that goes on behind the end of its column.
    cut = good.SerializeToString() + b"\xda\x02\x03\x01\x01\x80"
    assert judged_bytes(cut) in (Reason.REASON_MALFORMED, Reason.REASON_TABLE_SHAPE)


def judged_bytes(body: bytes) -> Reason | None:
    refusal = Validator(Bounds()).check(body, AGENT, 5, 1, None, time.time_ns()).refusal
    return None if refusal is None else refusal.reason


def test_a_table_is_looked_into_again_when_a_byte_of_it_changed() -> None:
    validator = Validator(Bounds())
    stream = Stream(AGENT, 5, 3)
    assert validator.check(stream.next().batch, AGENT, 5, 1, None, time.time_ns()).refusal is None
    second = stream.message()
    table = table_of(second)
    table.name[1] = "container-\x07"
    put_table(second, table)
    item = stream.seal(second)
    refused = validator.check(item.batch, AGENT, 5, 2, None, time.time_ns()).refusal
    assert refused is not None
    assert digest(item.batch) == item.digest
