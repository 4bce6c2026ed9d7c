"""What is booked is what was encoded, to the bit; and what no collector wrote is refused with its reason."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from collector.decide.validate import Bounds, Validator
from ledger.book.rows import COLUMNS, UNNAMED, Unreadable, encode, read
from ledger.consume.arrival import Kind
from ledger.store.client import Store
from tests.ledger.site import T0, agent, arrival, batch
from wire.identity import AgentId
from wire.limits import MAX_BATCH_BYTES, MAX_VALUE
from wire.measures import MEASURES
from wire.v1 import usage_pb2 as pb

U64 = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
U32 = st.integers(0, 2**32 - 1)
TEXT = st.text(max_size=30) | st.sampled_from(
    ["", "ü" * 500, "漢字/🚚", "a" * 70_000, "\0'\\\n", "x" * 127, "x" * 128]
)
DEVICE_COLUMNS = [name for name in pb.UsageBatch.DESCRIPTOR.fields_by_name if name.startswith("device_")]
OPENING = [field.name for field in pb.Opening.DESCRIPTOR.fields]


def column(rows: int, values: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
    return st.just([]) | st.lists(values, min_size=rows, max_size=rows)


@st.composite
def batches(draw: st.DrawFn) -> pb.UsageBatch:
    rows = draw(st.integers(0, 4) | st.just(150))
    of_rows = {"min_size": rows, "max_size": rows}
    start = draw(st.integers(1, MAX_VALUE - 2))
    seq = draw(st.integers(1, 2**64 - 1))
    out = pb.UsageBatch(
        schema_version=1,
        agent_id=str(draw(st.uuids())),
        epoch=draw(U64),
        seq=seq,
        previous_digest=draw(st.binary(min_size=32, max_size=32)) if seq > 1 else b"",
        tenant=draw(TEXT),
        interval_start_unix_ns=start,
        interval_end_unix_ns=draw(st.integers(start + 1, MAX_VALUE - 1)),
        interval_duration_ns=draw(U64),
        boot_id=draw(TEXT),
        host=draw(TEXT),
        producer=draw(TEXT),
        flags=draw(U32),
        coverage=draw(U32),
        cpus=draw(U32),
        row_flags=draw(column(rows, U32)),
        known=draw(st.lists(U64, **of_rows)),
        containers=pb.ContainerTable(
            cgroup_id=draw(st.lists(U64, **of_rows)),
            cgroup_path=draw(st.lists(TEXT, **of_rows)),
            kind=draw(st.lists(st.integers(0, UNNAMED - 1), **of_rows)),
        ),
    )
    for name in ("runtime", "container_id", "pod_uid", "name"):
        getattr(out.containers, name).extend(draw(st.just([]) | st.lists(TEXT, **of_rows)))
    for name in draw(st.sets(st.sampled_from(MEASURES), max_size=6)):
        getattr(out, name).extend(draw(column(rows, U64)))
    if rows:
        devices = draw(st.integers(0, 3))
        for name in DEVICE_COLUMNS:
            values = (
                st.integers(0, rows - 1)
                if name == "device_row"
                else U32
                if name in ("device_major", "device_minor")
                else U64
            )
            getattr(out, name).extend(draw(st.lists(values, min_size=devices, max_size=devices)))
        for _ in range(draw(st.integers(0, 2))):
            opening = out.openings.add(row=draw(st.integers(0, rows - 1)))
            for name in OPENING[1:]:
                setattr(opening, name, draw(U64))
    for _ in range(draw(st.integers(0, 2))):
        out.gaps.add(
            start_unix_ns=draw(U64),
            end_unix_ns=draw(U64),
            reason=draw(st.integers(0, UNNAMED - 1)),  # type: ignore[arg-type]
            count=draw(U64),
            detail=draw(TEXT),
        )
    if draw(st.booleans()):
        out.host_totals.cpu_usage_ns, out.host_totals.cpu_deficit_ns = draw(U64), draw(U64)
        out.host_totals.cpu_source = draw(TEXT)
    return out


def filled(what: pb.UsageBatch) -> pb.UsageBatch:
    """With what is absent written out, as the contract reads it."""
    out = pb.UsageBatch()
    out.CopyFrom(what)
    rows = len(out.known)
    for name in (*MEASURES, "row_flags"):
        if not getattr(out, name):
            getattr(out, name).extend([0] * rows)
    for name in ("runtime", "container_id", "pod_uid", "name"):
        if not getattr(out.containers, name):
            getattr(out.containers, name).extend([""] * rows)
    out.previous_digest = out.previous_digest or bytes(32)
    return out


def of_table(row: tuple[object, ...]) -> pb.UsageBatch:
    """The batch that a row of table `batches` says."""
    got = dict(zip(COLUMNS, row, strict=True))

    def listed(name: str) -> list[object]:
        value = got[name]
        assert isinstance(value, list | tuple)
        return list(value)

    out = pb.UsageBatch()
    plain = (
        "epoch",
        "seq",
        "previous_digest",
        "schema_version",
        "tenant",
        "interval_duration_ns",
        "boot_id",
        "host",
    )
    for name in (*plain, "producer", "flags", "coverage", "cpus"):
        setattr(out, name, got[name])
    out.agent_id = str(got["agent_id"])
    out.interval_start_unix_ns, out.interval_end_unix_ns = got["interval_start_ns"], got["interval_end_ns"]  # type: ignore[assignment]
    out.containers.SetInParent()
    for field in out.containers.DESCRIPTOR.fields:
        getattr(out.containers, field.name).extend(listed(f"units.{field.name}"))
    for name in (*MEASURES, "row_flags", "known"):
        getattr(out, name).extend(listed(f"units.{name}"))
    for name in DEVICE_COLUMNS:
        getattr(out, name).extend(listed(f"devices.{name.removeprefix('device_')}"))
    for values in zip(*(listed(f"openings.{name}") for name in OPENING), strict=True):
        out.openings.add(**dict(zip(OPENING, values, strict=True)))
    gaps = ("start", "end", "reason", "count", "detail")
    for start, end, reason, count, detail in zip(
        *(listed(f"gaps.{n}{'_ns' if n in ('start', 'end') else ''}") for n in gaps), strict=True
    ):
        out.gaps.add(start_unix_ns=start, end_unix_ns=end, reason=reason, count=count, detail=detail)  # type: ignore[arg-type]
    if got["has_host_totals"]:
        out.host_totals.cpu_usage_ns, out.host_totals.cpu_deficit_ns = (
            got["host_cpu_usage_ns"],
            got["host_cpu_deficit_ns"],
        )  # type: ignore[assignment]
        out.host_totals.cpu_source = got["host_cpu_source"]  # type: ignore[assignment]
    return out


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(found=st.lists(batches(), min_size=1, max_size=4))
def test_a_batch_comes_back_from_the_table_as_it_was_encoded(
    store: Store, found: list[pb.UsageBatch]
) -> None:
    store.command("TRUNCATE TABLE batches")
    arrivals = [arrival(what) for what in found]
    store.insert_binary("batches", COLUMNS, b"".join(encode(a, read(a)) for a in arrivals))
    columns = ", ".join(f"hex({n})" if n.endswith("digest") else f"`{n}`" for n in COLUMNS)
    back = {}
    for row in store.query(f"SELECT {columns} FROM batches FINAL"):
        raw = tuple(
            bytes.fromhex(v) if n.endswith("digest") else v for n, v in zip(COLUMNS, row, strict=True)
        )
        digest = raw[COLUMNS.index("digest")]
        assert raw[COLUMNS.index("received_at_ns")] == 5
        back[digest] = of_table(raw)
    for one, what in zip(arrivals, found, strict=True):
        assert as_written(back[one.digest]) == as_written(filled(what))


def as_written(what: Message) -> bytes:
    return what.SerializeToString(deterministic=True)


def test_what_is_encoded_is_the_tables_columns_in_order(store: Store) -> None:
    in_table = [
        name
        for (name,) in store.query(
            "SELECT name FROM system.columns WHERE database = currentDatabase() AND table = 'batches' ORDER BY position"
        )
    ]
    assert tuple(in_table) == COLUMNS


@pytest.mark.parametrize(
    "table", ["usage_minutes", "usage_hours", "usage_rows", "usage_by_hour", "usage_by_minute"]
)
def test_every_table_of_usage_has_the_measures_of_the_contract_in_order(store: Store, table: str) -> None:
    in_table = [
        name
        for (name,) in store.query(
            f"SELECT name FROM system.columns WHERE database = currentDatabase() AND table = '{table}' ORDER BY position"
        )
    ]
    assert tuple(in_table[-len(MEASURES) :]) == MEASURES


def good() -> pb.UsageBatch:
    out = batch(agent(1), 2, T0, T0 + 10, [{"cpu_usage_ns": 1}, {"cpu_usage_ns": 2}])
    out.openings.add(row=1)
    for name in DEVICE_COLUMNS:
        getattr(out, name).append(0)
    return out


def changed(change: Callable[[pb.UsageBatch], object]) -> pb.UsageBatch:
    out = good()
    change(out)
    return out


WRONG: dict[str, tuple[Callable[[pb.UsageBatch], object], str]] = {
    "a measure of another length": (lambda b: b.cpu_user_ns.append(1), "one length"),
    "a path too few": (lambda b: b.containers.cgroup_path.pop(), "one length"),
    "no paths": (lambda b: b.containers.ClearField("cgroup_path"), "one length"),
    "a name too many": (lambda b: b.containers.name.extend("abc"), "one length"),
    "a table that is none": (lambda b: setattr(b, "containers_zlib", b"x"), "cannot be opened"),
    "a flag too few": (lambda b: b.row_flags.append(1), "one length"),
    "a device too few": (lambda b: b.device_row.pop(), "device columns"),
    "a device of no row": (lambda b: b.device_row.__setitem__(0, 2), "a row that it does not have"),
    "an opening of no row": (lambda b: b.openings.add(row=2), "a row that it does not have"),
    "an empty interval": (lambda b: setattr(b, "interval_end_unix_ns", T0), "empty"),
    "an interval that ends before": (lambda b: setattr(b, "interval_end_unix_ns", T0 - 1), "empty"),
    "an interval of no time": (lambda b: setattr(b, "interval_end_unix_ns", 2**63), "no time"),
    "an interval from nowhere": (lambda b: setattr(b, "interval_start_unix_ns", 0), "no time"),
    "another schema": (lambda b: setattr(b, "schema_version", 2), "schema version is 2"),
    "a short previous digest": (lambda b: setattr(b, "previous_digest", b"x"), "previous digest"),
    "no previous digest": (lambda b: b.ClearField("previous_digest"), "previous digest"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_malformed_batch_is_refused_with_a_reason(what: str) -> None:
    change, reason = WRONG[what]
    with pytest.raises(Unreadable, match=reason):
        read(arrival(changed(change)))


def test_a_good_one_is_not() -> None:
    assert read(arrival(good())) == good()


def test_bytes_that_are_no_batch_are_refused() -> None:
    with pytest.raises(Unreadable, match="no UsageBatch"):
        read(arrival(good())._replace(body=b"\xff"))


@pytest.mark.parametrize("other", [{"agent_id": AgentId(agent(2))}, {"epoch": 9}, {"seq": 3}])
def test_a_batch_under_another_identity_is_refused(other: dict[str, object]) -> None:
    with pytest.raises(Unreadable, match="another identity"):
        read(arrival(good())._replace(**other))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "agent_id",
    [
        "",
        "x",
        agent(1).upper(),
        agent(1).replace("-", ""),
        f"{{{agent(1)}}}",
        f"{agent(1)}\n",
        "a'), (1,1,1)) --",
    ],
)
def test_an_agent_is_a_lower_case_uuid_or_none(agent_id: str) -> None:
    with pytest.raises(Unreadable, match="lower-case UUID"):
        read(arrival(changed(lambda b: setattr(b, "agent_id", agent_id))))


def test_a_batch_number_zero_is_refused() -> None:
    with pytest.raises(Unreadable, match="count from 1"):
        read(arrival(changed(lambda b: setattr(b, "seq", 0))))


@pytest.mark.parametrize("reason", [-(2**31), -1, UNNAMED, 256, 2**31 - 1])
def test_a_reason_that_no_release_has_named_keeps_its_gap(store: Store, reason: int) -> None:
    what = changed(lambda b: b.gaps.add(start_unix_ns=1, end_unix_ns=2, reason=reason))
    store.insert_binary("batches", COLUMNS, encode(arrival(what), read(arrival(what))))
    assert store.query("SELECT `gaps.reason` FROM batches")[0][0] in ([UNNAMED], (UNNAMED,))


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(what=batches())
def test_what_a_collector_takes_in_can_be_booked(what: pb.UsageBatch) -> None:
    what.tenant, what.boot_id, what.cpus, what.cpu_usage_ns[:] = "acme", str(uuid.UUID(int=1)), 4, []
    what.interval_start_unix_ns, what.interval_end_unix_ns, what.interval_duration_ns = T0, T0 + 10, 10
    one = arrival(what)
    checked = Validator(Bounds()).check(one.body, one.agent_id, one.epoch, one.seq, None, T0 + 20)
    if checked.refusal is None:
        assert read(one) == what
        assert encode(one, what)


@given(what=batches())
def test_a_packed_table_gives_the_same_row(what: pb.UsageBatch) -> None:
    one, packed = arrival(what), pb.UsageBatch()
    packed.CopyFrom(what)
    plain = what.containers.SerializeToString()
    assume(len(plain) <= MAX_BATCH_BYTES)
    packed.containers_zlib = zlib.compress(plain, 0)
    assert read(arrival(packed)) == packed
    assert encode(one, packed) == encode(one, what)


def test_what_a_collector_lets_be_absent_is_booked() -> None:
    bare = batch(agent(1), 1, T0, T0 + 10)
    bare.boot_id = str(uuid.UUID(int=1))
    one = arrival(bare)
    assert not bare.row_flags
    assert not bare.containers.runtime
    assert Validator(Bounds()).check(one.body, one.agent_id, 1, 1, None, T0 + 20).refusal is None
    assert read(one) == bare
    assert one.kind is Kind.BOOKABLE
