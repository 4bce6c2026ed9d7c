"""Usage -> UsageBatch bytes. The only place that encodes a batch; the bytes are the record from here on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from agent.meter.hostile import visible
from agent.meter.model import COUNTER_BITS
from agent.meter.rows import FOLDED_ID, ROOT_ID, Usage
from agent.meter.usage import Gap, Outcome, Stretch
from wire.containers import put_table
from wire.identity import BatchId
from wire.limits import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ROWS,
    MAX_DETAIL_BYTES,
    MAX_DEVICES_PER_BATCH,
    MAX_GAPS_PER_BATCH,
    MAX_NAME_BYTES,
    MAX_PATH_BYTES,
    SCHEMA_VERSION,
)
from wire.measures import BIT, MEASURES
from wire.v1 import usage_pb2 as pb

_ROW_BYTES_AT_MOST = MAX_PATH_BYTES + 4 * MAX_NAME_BYTES + len(MEASURES) * 10 + 256
_ROWS_ALWAYS_FIT = MAX_BATCH_BYTES // 2 // _ROW_BYTES_AT_MOST
_DEVICE_BYTES_AT_MOST = 3 * 5 + 4 * 10

_MEASURE_OF_FIELD = tuple(enumerate(MEASURES))
_OPENING_FIELDS = tuple(
    (slot, bit, MEASURES[bit])
    for slot, bit in enumerate(COUNTER_BITS)
    if MEASURES[bit] in pb.Opening.DESCRIPTOR.fields_by_name
)
_IO_MEASURES = ("io_read_bytes", "io_write_bytes", "io_read_ops", "io_write_ops")


@dataclass(frozen=True, slots=True)
class Described:
    """What the container table says of a unit, bounded and made visible."""

    kind: int
    path: str
    runtime: str = ""
    container_id: str = ""
    pod_uid: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Producer:
    """What every batch of this host says in its header."""

    host: str
    version: str
    cpus: int
    coverage: int
    cpu_source: str
    clock_unsynchronised: bool
    describe: Callable[[Usage], Described]


@dataclass(frozen=True, slots=True)
class Draft:
    """A batch without its place in the stream. `seal` gives the bytes once the spool has assigned that."""

    tenant: str
    rows: int
    interval_start_unix_ns: int
    interval_end_unix_ns: int
    seal: Callable[[BatchId, bytes], bytes]


def drafts(outcome: Outcome, producer: Producer, extra_flags: int = 0) -> list[Draft]:
    """One draft per tenant of the interval, more where a tenant's rows pass the bounds of a batch.

    The host's own row brings the interval's gaps and the host's totals with it.
    """
    out = []
    for stretch in outcome.stretches:
        by_tenant: dict[str, list[Usage]] = {}
        for usage in stretch.usages:
            by_tenant.setdefault(usage.tenant, []).append(usage)
        flags = stretch.interval.flags | extra_flags
        if producer.clock_unsynchronised:
            flags |= pb.BATCH_FLAG_CLOCK_UNSYNCHRONISED
        gaps = outcome.gaps if stretch is outcome.stretches[-1] else []
        for tenant in sorted(by_tenant):
            for part in _parts(by_tenant[tenant]):
                message = _message(stretch, gaps, producer, tenant, part)
                message.flags = flags
                interval = stretch.interval
                seal = _sealer(message)
                out.append(Draft(tenant, len(part), interval.start_unix_ns, interval.end_unix_ns, seal))
    return out


def _sealer(message: pb.UsageBatch) -> Callable[[BatchId, bytes], bytes]:
    def seal(identity: BatchId, previous_digest: bytes) -> bytes:
        message.agent_id, message.epoch, message.seq = identity
        message.previous_digest = previous_digest
        return message.SerializeToString(deterministic=True)

    return seal


def _parts(usages: Sequence[Usage]) -> Iterator[Sequence[Usage]]:
    """Runs of rows that certainly fit one batch, whatever their names are."""
    if len(usages) <= _ROWS_ALWAYS_FIT and sum(len(u.devices) for u in usages) <= MAX_DEVICES_PER_BATCH // 2:
        yield usages
        return
    start = size = devices = 0
    for index, usage in enumerate(usages):
        row = 4 * len(usage.path) + 4 * MAX_NAME_BYTES + len(MEASURES) * 10 + 256
        row += len(usage.devices) * _DEVICE_BYTES_AT_MOST
        if index > start and (
            size + row > MAX_BATCH_BYTES * 9 // 10
            or index - start >= MAX_BATCH_ROWS
            or devices + len(usage.devices) > MAX_DEVICES_PER_BATCH
        ):
            yield usages[start:index]
            start, size, devices = index, 0, 0
        size += row
        devices += len(usage.devices)
    yield usages[start:]


def _message(
    stretch: Stretch, gaps: Sequence[Gap], producer: Producer, tenant: str, usages: Sequence[Usage]
) -> pb.UsageBatch:
    interval = stretch.interval
    message = pb.UsageBatch(
        schema_version=SCHEMA_VERSION,
        tenant=tenant,
        interval_start_unix_ns=interval.start_unix_ns,
        interval_end_unix_ns=interval.end_unix_ns,
        interval_duration_ns=interval.duration_ns,
        boot_id=stretch.boot_id,
        host=visible(producer.host, MAX_NAME_BYTES),
        producer=f"weighbridge-agent/{producer.version}",
        coverage=producer.coverage | stretch.coverage,
        cpus=producer.cpus,
        row_flags=[usage.flags for usage in usages],
        known=[usage.known for usage in usages],
    )
    described = [producer.describe(usage) for usage in usages]
    table = pb.ContainerTable(
        cgroup_id=[usage.cgroup_id for usage in usages],
        cgroup_path=[d.path for d in described],
        kind=[d.kind for d in described],
        runtime=[d.runtime for d in described],
        container_id=[d.container_id for d in described],
        pod_uid=[d.pod_uid for d in described],
        name=[d.name for d in described],
    )
    put_table(message, table)
    for bit, column in enumerate(zip(*(usage.values for usage in usages), strict=True)):
        if any(column):
            getattr(message, MEASURES[bit]).extend(column)
    for row, usage in enumerate(usages):
        if usage.devices:
            _add_devices(message, row, usage)
        if usage.opens:
            _add_opening(message.openings.add(row=row), usage)
        if usage.cgroup_id == ROOT_ID:
            message.host_totals.cpu_usage_ns = stretch.host_cpu_usage_ns
            message.host_totals.cpu_deficit_ns = stretch.cpu_deficit_ns
            message.host_totals.cpu_source = producer.cpu_source
            assert len(gaps) <= MAX_GAPS_PER_BATCH
            for gap in gaps:
                _add_gap(message, gap)
    return message


def _add_devices(message: pb.UsageBatch, row: int, usage: Usage) -> None:
    for device, delta in usage.devices.items():
        major, _, minor = device.partition(":")
        message.device_row.append(row)
        message.device_major.append(int(major))
        message.device_minor.append(int(minor))
        message.device_read_bytes.append(delta[0])
        message.device_write_bytes.append(delta[1])
        message.device_read_ops.append(delta[2])
        message.device_write_ops.append(delta[3])


def _add_opening(message: pb.Opening, usage: Usage) -> None:
    known = 0
    counters = usage.counters_before
    for slot, bit, name in _OPENING_FIELDS:
        value = counters[slot] if slot < len(counters) else None
        if value is not None:
            known |= 1 << bit
            if value:
                setattr(message, name, value)
    if usage.io_before is not None:
        for slot, name in enumerate(_IO_MEASURES):
            known |= 1 << BIT[name]
            setattr(message, name, sum(device[slot] for device in usage.io_before.values()))
    message.known = known


def _add_gap(message: pb.UsageBatch, gap: Gap) -> None:
    message.gaps.add(
        start_unix_ns=gap.start_unix_ns,
        end_unix_ns=gap.end_unix_ns,
        reason=pb.GapReason.ValueType(gap.reason),
        count=gap.count,
        detail=visible(gap.detail, MAX_DETAIL_BYTES),
    )


def kind_of_special(cgroup_id: int) -> int | None:
    """The kind of a row that stands for no cgroup of its own."""
    return _SPECIAL.get(cgroup_id)


_SPECIAL = {ROOT_ID: int(pb.UNIT_KIND_HOST), FOLDED_ID: int(pb.UNIT_KIND_FOLDED)}
