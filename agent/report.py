"""What a running agent tells about itself: `status`, `top`, `explain`. Plain values for JSON."""

from __future__ import annotations

import time
from typing import Any

from agent import __version__
from agent.loop import MeterLoop
from agent.meter.hostile import visible
from agent.meter.identity import identify
from agent.meter.model import COUNTERS, NETWORK
from agent.meter.rows import ROOT_ID, Usage
from agent.read import plan
from agent.ship.enrol import Identity
from agent.ship.shipper import ShipperState
from agent.ship.spool import Fill, Spool
from wire.measures import BIT
from wire.v1 import usage_pb2 as pb

MAX_ROWS = 1_000
_CPU, _MEMORY, _READ, _WRITE = (
    BIT[name] for name in ("cpu_usage_ns", "memory_byte_seconds", "io_read_bytes", "io_write_bytes")
)


def status(
    identity: Identity,
    spool: Spool,
    fill: Fill | None,
    loop: MeterLoop,
    shipper: ShipperState,
    unready: dict[str, str],
    local_port: int,
) -> dict[str, Any]:
    """How the agent is. `fill` is None while there is no usable spool."""
    state = loop.state
    now = time.time()
    return {
        "version": __version__,
        "agent_id": identity.agent_id,
        "certificate_expires_in_seconds": int(identity.not_after - now),
        "ready": unready,
        "local_port": local_port,
        "epoch": spool.epoch,
        "next_seq": spool.next_seq,
        "units": state.units,
        "sources": loop.plan.signature,
        "unseen": list(plan.unseen(loop.facts, loop.plan, loop.probes.without)),
        "probes": loop.probes.standing.state.value,
        "probes_version": loop.probes.version,
        "probes_walk": loop.probes.walk,
        "probes_lost": {kind: n for kind, n in loop.probes.overflow._asdict().items() if n},
        "clock": state.clock.value,
        "last_reading_seconds_ago": round(now - state.last_reading_unix, 3)
        if state.last_reading_unix
        else None,
        "intervals_in_one": state.stretch,
        "spool_batches": fill and fill.batches,
        "spool_bytes": fill and fill.bytes_used,
        "spool_max_bytes": fill and fill.max_bytes,
        "oldest_batch_seconds": None
        if fill is None or fill.oldest_interval_end_unix_ns is None
        else round(now - fill.oldest_interval_end_unix_ns / 1e9, 3),
        "collector": shipper.collector,
        "connected": shipper.connected_since is not None,
        "in_flight": shipper.in_flight,
        "answers": dict(shipper.answers),
        "trouble": shipper.trouble,
    }


def top(loop: MeterLoop, limit: int) -> dict[str, Any]:
    """The rows of the last interval, busiest first."""
    duration_ns = loop.state.latest_duration_ns
    rows = sorted(loop.state.latest, key=lambda usage: -usage.values[_CPU])
    return {
        "duration_seconds": duration_ns / 1e9,
        "units": len(rows),
        "rows": [_top_row(loop, row, duration_ns) for row in rows[: min(limit, MAX_ROWS)]],
    }


def _top_row(loop: MeterLoop, usage: Usage, duration_ns: int) -> dict[str, Any]:
    described = loop.catalogue.describe(usage)
    known = usage.known

    def rate(bit: int) -> float | None:
        return usage.values[bit] / duration_ns if known >> bit & 1 else None

    memory = rate(_MEMORY)
    return {
        "tenant": usage.tenant,
        "kind": pb.UnitKind.Name(pb.UnitKind.ValueType(described.kind)).removeprefix("UNIT_KIND_").lower(),
        "path": described.path,
        "name": described.name,
        "cpu_cores": rate(_CPU),
        "memory_bytes": None if memory is None else memory * 1e9,
        "read_bytes_per_second": None if (r := rate(_READ)) is None else r * 1e9,
        "write_bytes_per_second": None if (w := rate(_WRITE)) is None else w * 1e9,
    }


def explain(loop: MeterLoop, container: str) -> dict[str, Any]:
    """Who a container is to the agent, who pays for it and why, and what is read of it."""
    if not container:
        return {
            "error": "name a container: its id, the beginning of one, its name, or a part of its cgroup path"
        }
    found = []
    traffic = loop.baseline.network.entries if loop.baseline.network is not None else None
    for state in (loop.baseline.root, *loop.baseline.units.values()):
        reading = state.reading
        identity = identify(reading.path)
        labels = loop.catalogue.labels.get(identity.container_id)
        names = (identity.container_id or "", labels.name or "", identity.unit or "")
        if not (reading.path == container or any(n.startswith(container) for n in names if n)) and (
            container not in reading.path
        ):
            continue
        found.append(
            {
                "path": visible(reading.path, 4_096),
                "cgroup_id": reading.cgroup_id,
                "runtime": identity.runtime,
                "container_id": visible(identity.container_id or "", 256) or None,
                "pod_uid": identity.pod_uid,
                "unit": visible(identity.unit or "", 256) or None,
                "kind": identity.kind,
                "name": labels.name,
                "tenant": state.tenant,
                "because": ["this is the host's own row: `owners.host`"]
                if reading.cgroup_id == ROOT_ID
                else loop.catalogue.owners.explain(identity, labels),
                "nested_in": next(
                    (
                        visible(s.reading.path, 4_096)
                        for s in loop.baseline.units.values()
                        if s.reading.cgroup_id == reading.enclosing_id
                    ),
                    "/",
                ),
                "counters": {
                    name: value
                    for name, value in zip(COUNTERS, reading.counters, strict=False)
                    if value is not None
                },
                "unknown": [
                    name
                    for index, name in enumerate(COUNTERS)
                    if index >= len(reading.counters) or reading.counters[index] is None
                ]
                + ([] if traffic is not None else list(NETWORK)),
                "traffic": {
                    name: value
                    for name, value in zip(NETWORK, (traffic or {}).get(reading.cgroup_id, ()), strict=False)
                    if value
                },
                "memory_current_bytes": reading.memory_current_bytes,
            }
        )
        if len(found) >= 20:
            break
    if not found:
        return {
            "error": f"nothing metered is called {visible(container, 200)}; try `weighbridge-agent top`, or"
            " `weighbridge-agent identify` for a path that is not running"
        }
    return {"found": found}
