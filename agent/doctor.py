"""`weighbridge-agent doctor`: everything that can be wrong, one line each, with the fix."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc

from agent.config import Settings
from agent.errors import AgentError
from agent.loop import probes_of
from agent.meter.identity import role
from agent.meter.model import ClockState
from agent.read import host, plan
from agent.read.cgroupfs import CgroupReader
from agent.read.probes.pins import State
from agent.read.probes.reader import Probes
from agent.ship import export
from agent.ship.enrol import FILE_NAME as IDENTITY_FILE
from agent.ship.enrol import Identity
from agent.ship.spool_file import FILE_NAME
from wire.daemon.control import ControlError, ask
from wire.tls import CHANNEL_OPTIONS

CONNECT_SECONDS = 5.0
LOW_DISK_BYTES = 512 << 20
NO_ROOM = ("births", "tombstones", "network_skbs", "snapshot_rows")
"""What the probes lose when a map is full. Missed wakes and cut paths cost nothing that matters."""


class Finding(NamedTuple):
    """`level`: ok, warning (metering goes on with less) or failed (it does not)."""

    level: str
    check: str
    text: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check, in the order in which things depend on one another."""
    yield from _host(settings)
    yield _clock()
    yield from _state(settings)
    identity = None
    try:
        identity = Identity.load(settings.state_dir)
    except AgentError as error:
        yield Finding("failed", "identity", str(error))
    if identity is not None:
        yield _certificate(identity)
        for address in settings.ship.collectors or identity.collectors:
            yield _collector(address, identity)
    yield _daemon(settings)


def _host(settings: Settings) -> Iterator[Finding]:
    try:
        facts = host.probe(settings.read.cgroup_root, settings.read.proc_root)
        chosen = plan.make(facts, settings.read.hierarchy)
    except AgentError as error:
        yield Finding("failed", "cgroups", str(error))
        return
    probes = probes_of(settings, chosen)
    reader = CgroupReader(chosen, role, host.files_to_keep_open(settings.read.max_open_files), probes)
    try:
        begun = time.perf_counter()
        snapshot = reader.read()
        seconds = time.perf_counter() - begun
    finally:
        reader.close()
    text = f"{facts.mode} hierarchy, {len(snapshot.units)} units read in {seconds * 1e3:.1f} ms ({chosen.signature})"
    if snapshot.complete:
        yield Finding("ok", "cgroups", text)
    else:
        yield Finding(
            "warning", "cgroups", f"{text}; some could not be read: run as a user that may read {chosen.tree}"
        )
    yield _probes(probes)
    probes.close()
    for sentence in plan.unseen(facts, chosen, probes.without):
        yield Finding("warning", "coverage", sentence)


def _probes(probes: Probes) -> Finding:
    state, text = probes.standing
    if state is not State.ATTACHED:
        return Finding("warning", "probes", f"{state.value}: {text}")
    full = ", ".join(f"{name} {used} of {at_most}" for name, (used, at_most) in sorted(probes.sizes.items()))
    text = f"version {probes.version}, walk {probes.walk}; {full}"
    lost = ", ".join(f"{kind} {n}" for kind in NO_ROOM if (n := getattr(probes.overflow, kind)))
    if lost:
        return Finding(
            "warning",
            "probes",
            f"{text}; no room for: {lost}. Keep the agent running, or load with more --max-cgroups and --max-ended",
        )
    if probes.lacks:
        unseen = " and ".join(probes.lacks)
        return Finding(
            "warning",
            "probes",
            f"{text}; {unseen} not seen: the journal of the unit that loaded them says why",
        )
    return Finding("ok", "probes", text)


def _clock() -> Finding:
    state, error_ns = host.clock_state()
    if state is ClockState.SYNCHRONISED:
        return Finding("ok", "clock", f"synchronised, error at most {(error_ns or 0) / 1e6:.1f} ms")
    return Finding(
        "warning",
        "clock",
        f"{state.value}: batches are flagged, durations stay exact; run chronyd or systemd-timesyncd",
    )


def _state(settings: Settings) -> Iterator[Finding]:
    directory = settings.state_dir
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        yield Finding(
            "failed", "state", f"{directory} is no directory this user may write: make it, or set `state_dir`"
        )
        return
    stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    wanted = max(LOW_DISK_BYTES, settings.spool.max_bytes)
    yield Finding(
        "ok" if free >= wanted else "warning",
        "state",
        f"{directory}: {free / 2**30:.1f} GiB free"
        + ("" if free >= wanted else "; less than `spool.max_bytes`: free some, or lower it"),
    )
    yield from _strangers(directory)
    if not (directory / FILE_NAME).exists():
        return
    try:
        verdict = export.verify(directory)
    except AgentError as error:
        yield Finding("failed", "spool", str(error))
        return
    text = f"{verdict.batches} batches wait, {verdict.quarantined} in quarantine"
    if verdict.sound:
        yield Finding("ok", "spool", text)
    else:
        damage = [*verdict.damaged, *verdict.missing, *verdict.chain_breaks]
        yield Finding("failed", "spool", f"{text}; unsound: {', '.join(damage[:10])}: check the disk")
    aside = sorted(p.name for p in directory.glob("spool.corrupt-*.db"))
    if aside:
        yield Finding(
            "warning",
            "spool",
            f"{len(aside)} damaged spools set aside ({aside[-1]}): check the disk, then move them away",
        )


def _strangers(directory: Path) -> Iterator[Finding]:
    """Files of another user than the directory's, which is the daemon's: root sees no difference, the daemon does."""
    owner = directory.stat().st_uid
    for name in (IDENTITY_FILE, FILE_NAME):
        path = directory / name
        if path.exists() and (uid := path.stat().st_uid) != owner:
            fix = f"chown --reference={directory} {path}"
            yield Finding("failed", "state", f"{path} belongs to user {uid}, its directory to {owner}: {fix}")


def _certificate(identity: Identity) -> Finding:
    left = identity.not_after - time.time()
    if left < 0:
        return Finding(
            "failed", "identity", f"certificate of {identity.agent_id} has expired: enrol again with --force"
        )
    level = "warning" if left < (identity.not_after - identity.not_before) / 4 else "ok"
    hint = "; it should have been renewed: see the collector checks" if level == "warning" else ""
    return Finding(
        level, "identity", f"agent {identity.agent_id}, certificate good for {left / 3600:.1f} h{hint}"
    )


def _collector(address: str, identity: Identity) -> Finding:
    name, _, port = address.rpartition(":")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), CONNECT_SECONDS):
            pass
    except (OSError, ValueError) as error:
        return Finding(
            "failed",
            "collector",
            f"{address}: {error}: start the collector, open the firewall, or set `ship.collectors`",
        )
    with grpc.secure_channel(address, identity.credentials(), CHANNEL_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            return Finding(
                "failed",
                "collector",
                f"{address}: reachable, but no TLS: is it this CA's collector? Enrol again if not",
            )
    return Finding("ok", "collector", f"{address}: reachable, TLS good")


def _daemon(settings: Settings) -> Finding:
    path: Path = settings.control_socket
    try:
        answer = ask(path, {"command": "status"})
    except ControlError as error:
        return Finding("warning", "daemon", f"not running, or not for this user: {error}")
    if answer["ready"]:
        return Finding("warning", "daemon", "; ".join(f"{k}: {v}" for k, v in answer["ready"].items()))
    return Finding(
        "ok",
        "daemon",
        f"running, {answer['units']} units, last reading {answer['last_reading_seconds_ago']} s ago",
    )
