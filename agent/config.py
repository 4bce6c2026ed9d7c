"""The agent's settings. Every key has its default here; an empty file is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.meter.owners import LabelsSettings, Owners, OwnersError, OwnersSettings
from wire.daemon.settings import Bytes, Seconds, SettingsError, load

DEFAULT_FILE = Path("/etc/weighbridge/agent.yaml")
DEFAULT_STATE_DIR = Path("/var/lib/weighbridge")
DEFAULT_RUN_DIR = Path("/run/weighbridge")

D = msgspec.Meta


class Read(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How the host is read."""

    cgroup_root: Annotated[Path, D(description="where the cgroup hierarchies are mounted")] = Path(
        "/sys/fs/cgroup"
    )
    proc_root: Annotated[Path, D(description="where the host's /proc is mounted")] = Path("/proc")
    hierarchy: Annotated[
        Literal["auto", "v1", "v2"], D(description="which hierarchy gives the tree of units on a hybrid host")
    ] = "auto"
    probes: Annotated[
        Literal["auto", "off"], D(description="whether to read the kernel probes where they are loaded")
    ] = "auto"
    probes_dir: Annotated[Path, D(description="where `weighbridge-probes` pins them, a bpffs of its own")] = (
        Path("/run/weighbridge/bpf")
    )
    max_open_files: Annotated[
        int,
        D(description="descriptors kept open; files beyond are opened for each reading", ge=64, le=1_000_000),
    ] = 60_000


class Meter(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How often."""

    interval: Annotated[
        Seconds, D(description="length of a usage row; rows end at its multiples of wall clock, 1s to 1h")
    ] = Seconds(10)
    memory_sample: Annotated[
        Seconds, D(description="how often memory is sampled within an interval, for its byte-seconds")
    ] = Seconds(2)


class SpoolSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The durable queue."""

    max_bytes: Annotated[
        Bytes, D(description="bound on batches nobody took yet; near it intervals grow, nothing is dropped")
    ] = Bytes(1 << 30)


class Ship(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Delivery."""

    collectors: Annotated[
        list[str], D(description="HOST:PORT of collectors instead of those the enrolment named")
    ] = []


class Metrics(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What /metrics says beyond the agent's own state."""

    per_container: Annotated[
        bool, D(description="a series per running container; off, since it multiplies a fleet's series")
    ] = False
    max_containers: Annotated[
        int, D(description="containers with a series; those beyond are counted only", ge=1, le=10_000)
    ] = 500


class Port(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """/metrics, /livez, /readyz."""

    address: Annotated[str, D(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, D(description="0 takes a free one", ge=0, le=65_535)] = 9465


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    state_dir: Annotated[Path, D(description="where identity and spool live")] = DEFAULT_STATE_DIR
    run_dir: Annotated[Path, D(description="where the control socket lives")] = DEFAULT_RUN_DIR
    host_name: Annotated[str, D(description="name in batches; empty: the kernel's node name")] = ""
    read: Read = Read()
    meter: Meter = Meter()
    owners: OwnersSettings = OwnersSettings()
    labels: LabelsSettings = LabelsSettings()
    spool: SpoolSettings = SpoolSettings()
    ship: Ship = Ship()
    metrics: Metrics = Metrics()
    local_port: Port = Port()
    journal_level: Annotated[
        Literal["debug", "info", "warning", "error"], D(description="lowest level written to the journal")
    ] = "info"

    @property
    def control_socket(self) -> Path:
        return self.run_dir / "agent.sock"


def read(path: Path | None) -> Settings:
    """Settings of a file and its drop-ins; if none is named, the default one need not be there."""
    required = path is not None
    path = path or DEFAULT_FILE
    settings = load(path, Settings, required)
    meter = settings.meter
    if not 1 <= meter.interval <= 3_600:
        raise SettingsError(f"{path}: meter.interval: {meter.interval:g} s; between 1s and 1h is possible")
    if not 0.1 <= meter.memory_sample <= meter.interval:
        raise SettingsError(
            f"{path}: meter.memory_sample: {meter.memory_sample:g} s; between 100ms and `meter.interval`"
        )
    if settings.spool.max_bytes < 16 << 20:
        raise SettingsError(f"{path}: spool.max_bytes: at least 16MiB are needed")
    try:
        Owners(settings.owners)
    except OwnersError as error:
        raise SettingsError(f"{path}: {error}") from None
    return settings
