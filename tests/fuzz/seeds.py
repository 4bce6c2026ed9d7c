"""The first inputs of each target: what the agent's own encoder makes of hosts with few and with many containers.

python -m tests.fuzz.seeds      writes them into the kept corpus
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf import json_format

from agent.config import Settings
from agent.daemon import _catalogue
from agent.meter import batch, usage
from agent.meter.batch import Producer
from agent.meter.model import COUNTERS, Reading, Snapshot
from tests.agent.readings import CADENCE, reading, root, snapshot
from tests.fuzz.delivery import AGENT
from wire.delimited import delimit
from wire.identity import BatchId, digest
from wire.v1 import ingest_pb2
from wire.v1 import usage_pb2 as pb

CORPUS = Path(__file__).with_name("corpus")
EPOCH = 7
INTERVALS = 4


def bodies(containers: int) -> list[bytes]:
    """A stream from its first batch on: a gap, so many containers, and all but one of them end."""
    producer = Producer("host", "0", 4, 0xFF, "cpu.stat", False, _catalogue(Settings()).describe)
    gaps = [usage.Gap(1, 2, int(pb.GAP_REASON_REBOOT), 0, "nobody was there")]
    baseline = usage.begin(_host(0, 0), "t", _tenant, gaps)
    out: list[bytes] = []
    for number in range(1, INTERVALS + 1):
        outcome = usage.step(
            baseline, _host(number, 1 if number == INTERVALS else containers), _tenant, CADENCE
        )
        baseline = outcome.baseline
        for draft in batch.drafts(outcome, producer):
            previous = digest(out[-1]) if out else b""
            out.append(draft.seal(BatchId(AGENT, EPOCH, len(out) + 1), previous))
    return out


def _host(interval: int, containers: int) -> Snapshot:
    used = interval * 10**9
    units = [_container(1_000 + number, used // 10 + number) for number in range(containers)]
    return snapshot(100 + 10 * interval, root(2 * used), *units)


def _container(cgroup_id: int, used: int) -> Reading:
    counters = {name: used // (slot + 1) for slot, name in enumerate(COUNTERS)}
    return reading(
        cgroup_id,
        used,
        path=f"/system.slice/docker-{cgroup_id:064x}.scope",
        counters=counters,
        io={"8:0": (used, used // 2, used // 4_096, 1)},
        memory_current_bytes=used // 2,
        memory_inactive_file_bytes=used // 8,
        memory_peak_bytes=used,
        pids_current=3,
        pids_peak=7,
    )


def _tenant(unit: Reading) -> str:
    return ("host", "acme", "globex")[unit.cgroup_id % 2 + 1 if unit.cgroup_id > 1 else 0]


def _tenant_in(body: bytes) -> str:
    return pb.UsageBatch.FromString(body).tenant


def delivery_of(batches: list[bytes]) -> bytes:
    items = []
    for body in batches:
        said = pb.UsageBatch.FromString(body)
        items.append(ingest_pb2.Item(epoch=said.epoch, seq=said.seq, digest=digest(body), batch=body))
    return ingest_pb2.Delivery(items=items).SerializeToString(deterministic=True)


def json_of(batches: list[bytes]) -> bytes:
    """As a writer who leaves the chain to the importer."""
    lines = []
    for body in batches:
        said = pb.UsageBatch.FromString(body)
        said.ClearField("previous_digest")
        lines.append(
            json_format.MessageToJson(said, indent=None, preserving_proto_field_name=len(lines) % 2 > 0)
        )
    return "".join(f"{line}\n" for line in lines).encode()


def seeds() -> dict[str, dict[str, bytes]]:
    """Target -> name -> input."""
    made: dict[str, dict[str, bytes]] = {"delivery": {}, "delimited": {}, "json": {}}
    for containers in (0, 1, 4):
        stream = bodies(containers)
        mine = [body for body in stream if _tenant_in(body) != "globex"]
        name = f"seed-{containers}-containers"
        made["delivery"][name] = delivery_of(mine[:3])
        made["delivery"][f"{name}-host"] = delivery_of(
            [body for body in mine if _tenant_in(body) == "host"][:3]
        )
        made["delivery"][f"{name}-acme"] = delivery_of(
            [body for body in mine if _tenant_in(body) == "acme"][:3]
        )
        made["delimited"][name] = b"".join(map(delimit, stream[:2]))
        made["json"][name] = json_of(stream[:2])
    return made


def main() -> None:
    from tests.fuzz.likeness import followers  # which is taught by what is made here

    made = seeds() | {"likeness": {f"seed-{n}": body for n, body in enumerate(followers())}}
    for target, inputs in made.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (CORPUS / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
