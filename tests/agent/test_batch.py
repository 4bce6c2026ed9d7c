"""Usage -> UsageBatch bytes: what the collector will accept, whatever the rows are."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import Settings
from agent.daemon import _catalogue
from agent.meter import batch, usage
from agent.meter.batch import Producer
from agent.meter.model import COUNTERS
from collector.decide.validate import Bounds, Validator
from tests.agent.readings import CADENCE, SECOND, everybody, reading, root, snapshot
from wire.containers import table_of
from wire.identity import AgentId, BatchId, digest
from wire.limits import MAX_BATCH_BYTES, MAX_BATCH_ROWS
from wire.measures import BIT, MEASURES
from wire.v1 import usage_pb2 as pb

AGENT = AgentId("11111111-2222-4333-8444-555555555555")


def producer() -> Producer:
    return Producer("host", "0", 4, 0xFF, "cpu.stat", False, _catalogue(Settings()).describe)


def sealed(outcome: usage.Outcome) -> list[bytes]:
    previous, out = b"", []
    for seq, draft in enumerate(batch.drafts(outcome, producer()), 1):
        body = draft.seal(BatchId(AGENT, 7, seq), previous)
        previous = digest(body)
        out.append(body)
    return out


def outcome_of(*units: object, host: int = 10**9) -> usage.Outcome:
    before = usage.begin(snapshot(100, root(0)), "t", everybody, [])
    return usage.step(before, snapshot(110, root(host), *units), everybody, CADENCE)  # type: ignore[arg-type]


def accepted(bodies: list[bytes]) -> int:
    """Rows, once the collector's own judge has found nothing wrong."""
    validator = Validator(Bounds(past_ns=10**19))
    rows = 0
    for seq, body in enumerate(bodies, 1):
        checked = validator.check(body, AGENT, 7, seq, None, time.time_ns())
        assert checked.refusal is None
        rows += checked.rows
    return rows


def test_a_measured_zero_and_an_unknown_are_told_apart() -> None:
    known = dict.fromkeys(COUNTERS[:3], 0) | {"oom_kills": 0}
    (body, _) = sealed(outcome_of(reading(7, 0, counters=known)))
    message = pb.UsageBatch.FromString(body)
    assert not message.cpu_usage_ns
    assert not message.oom_kills
    bits = message.known[0]
    assert bits >> BIT["cpu_usage_ns"] & 1
    assert bits >> BIT["oom_kills"] & 1
    assert not bits >> BIT["cpu_throttled_ns"] & 1
    assert not bits >> BIT["net_rx_external_bytes"] & 1


def test_the_same_rows_give_the_same_bytes() -> None:
    units = [reading(n, n * 1_000, io={"8:0": (n, n, n, n)}) for n in range(2, 30)]
    assert sealed(outcome_of(*units)) == sealed(outcome_of(*units))


def test_the_hosts_row_brings_the_totals_and_their_source() -> None:
    bodies = sealed(outcome_of(reading(7, 400_000_000)))
    found = [m for m in map(pb.UsageBatch.FromString, bodies) if m.HasField("host_totals")]
    (message,) = found
    assert message.host_totals.cpu_usage_ns == 10**9
    assert message.host_totals.cpu_source == "cpu.stat"
    total = sum(sum(pb.UsageBatch.FromString(b).cpu_usage_ns) for b in bodies)
    assert total == message.host_totals.cpu_usage_ns + message.host_totals.cpu_deficit_ns


def test_many_rows_with_hostile_names_are_split_into_batches_that_fit() -> None:
    hostile = "\x1b[2J\udcff" * 300
    units = [
        reading(n, 1_000, path=f"/system.slice/{hostile}{n}.service", io={"8:0": (1, 1, 1, 1)})
        for n in range(2, 3_002)
    ]
    bodies = sealed(outcome_of(*units))
    assert len(bodies) > 3
    assert max(map(len, bodies)) <= MAX_BATCH_BYTES
    assert all(len(table_of(pb.UsageBatch.FromString(b)).cgroup_id) <= MAX_BATCH_ROWS for b in bodies)
    assert accepted(bodies) == 3_001


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec=None, categories=None, exclude_categories=()), max_size=60),
            st.integers(0, SECOND),
            st.none() | st.integers(0, 1 << 40),
        ),
        max_size=20,
    )
)
@settings(max_examples=60)
def test_whatever_a_host_has_the_collector_accepts_every_row(
    units: list[tuple[str, int, int | None]],
) -> None:
    found = [
        reading(n, cpu, path=f"/{name}", memory_current_bytes=memory)
        for n, (name, cpu, memory) in enumerate(units, 2)
    ]
    assert accepted(sealed(outcome_of(*found, host=30 * SECOND))) == len(units) + 1


def test_every_column_of_the_contract_has_its_measure() -> None:
    for name in MEASURES:
        assert pb.UsageBatch.DESCRIPTOR.fields_by_name[name].number == BIT[name] + 32
