"""The doors agents come in by: opened, replaced while they are in use, and shut.

An address that changes gets its new listener before the old one goes, and all of a reload's doors open or none does. What
was received by an old listener is answered before its streams end; agents connect again by themselves.
"""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio

from collector.config import Connections, Settings, split_address
from collector.decide.occupancy import Occupancy, Room
from collector.door.authenticate import Authenticator
from collector.door.ca import CertificateAuthority
from collector.door.enrolment import EnrolmentService
from collector.door.noise import Noise
from collector.door.pressure import Pressure
from collector.door.service import IngestService
from collector.errors import CollectorError
from collector.pipeline import Pipeline
from wire.daemon.journal import Journal
from wire.statuses import Meter
from wire.tls import SERVER_OPTIONS, PemPair, server_credentials
from wire.v1.ingest_pb2_grpc import add_EnrolmentServicer_to_server

RECHECK_SECONDS = 2.0
"""How often the standing of connected agents is looked at; a revoked one is cut off within 5 s."""
DRAIN_SECONDS = 20.0
LAST_WORDS_SECONDS = 30.0
"""Of a connection that has reached its age."""
ENROLMENT_AGE_SECONDS = 60.0
"""Whoever enrols makes one call."""
ENROLMENT_LAST_WORDS_SECONDS = 5.0
INGEST, ENROLMENT = "ingest", "enrolment"
ENROLMENT_CONNECTIONS = 64
OWN_FILES = 256
"""Descriptors for the log, the databases and what else is no agent."""

log = Journal("collector.listeners")


class _Door(NamedTuple):
    """One listener."""

    key: str
    address: str
    port: int
    server: grpc.aio.Server
    service: IngestService | None

    def listens_on(self, address: str) -> bool:
        """Also if it was told to take any port, and took this one."""
        host, port = split_address(address)
        return address == self.address or (host, port) == (split_address(self.address)[0], self.port)

    async def close(self, seconds: float) -> None:
        """Answer what was received, then end all streams."""
        if self.service is not None:
            self.service.say_goodbye()
        await self.server.stop(seconds)


class Listeners:
    """`authority` is None with an external CA: then nobody can enrol here."""

    def __init__(
        self,
        settings: Settings,
        pipeline: Pipeline,
        authority: CertificateAuthority | None,
        pressure: Pressure,
    ) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._pressure = pressure
        trust_domain = authority.trust_domain if authority else settings.tls.trust_domain
        self._authenticator = Authenticator(trust_domain, authority.registry if authority else None)
        self._pair, self._client_ca = _key_material(settings, authority)
        self.occupancy = Occupancy(_room(settings))
        self._noise = Noise(pipeline.tally)
        self._enrolment: EnrolmentService | None = None
        if authority is not None:
            life = timedelta(seconds=settings.tls.certificate_life)
            self._enrolment = EnrolmentService(authority, self._authenticator, [], life)
        self._doors: dict[str, _Door] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """CollectorError names the address that cannot be opened."""
        await self.replace(self._settings)

    @property
    def ports(self) -> dict[str, int]:
        """Of ingest and, where it is open, enrolment."""
        return {key: door.port for key, door in self._doors.items()}

    async def replace(self, settings: Settings) -> None:
        """Listen where `settings` say. CollectorError: one address cannot be opened, and nothing has changed."""
        wanted = dict(_addresses(settings, self._enrolment is not None))
        fresh: dict[str, _Door] = {}
        try:
            for key, address in wanted.items():
                if key not in self._doors or not self._doors[key].listens_on(address):
                    fresh[key] = await self._listen(key, address, settings.connections)
        except BaseException:
            for door in fresh.values():
                await door.close(0)
            raise
        gone = [door for key, door in self._doors.items() if key in fresh or key not in wanted]
        self._doors = {key: fresh.get(key) or self._doors[key] for key in wanted}
        self.occupancy.room = _room(settings)
        self._settings = settings
        if self._enrolment is not None:
            self._enrolment.collectors = settings.listen.advertise or [f":{self.ports[INGEST]}"]
        for door in gone:
            log.info("listener_closed", key=f"listen.{door.key}", address=door.address)
            leaving = asyncio.create_task(door.close(DRAIN_SECONDS))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def watch(self) -> None:
        """Cut the streams of agents that are no longer welcome. Runs until cancelled."""
        seen: tuple[int, int] | None = None
        while True:
            await asyncio.sleep(RECHECK_SECONDS)
            self.occupancy.sweep(time.monotonic_ns())
            services = [door.service for door in self._doors.values() if door.service is not None]
            for service in services:
                service.cut_expired()
            try:
                # Read before the standings are: what is written meanwhile is seen the next time.
                now = await asyncio.to_thread(lambda: self._authenticator.version)
                if now != seen:
                    for service in services:
                        await service.recheck()
                    seen = now
            except sqlite3.Error as error:
                log.error("standings_unknown", code=Meter.DATABASE_UNAVAILABLE, error=error)

    async def end_noise(self) -> None:
        """Shut down connections that send what is no message. Runs until cancelled."""
        # An agent may send its first delivery before anybody read its Hello; who enrols has no stream.
        await self._noise.watch(lambda: {port: int(key == INGEST) for key, port in self.ports.items()})

    async def close(self, seconds: float = DRAIN_SECONDS) -> None:
        """Take nobody in any more; what was received is answered within so many seconds."""
        await asyncio.gather(*(door.close(seconds) for door in self._doors.values()), *self._leaving)

    async def _listen(self, key: str, address: str, connections: Connections) -> _Door:
        split_address(address)
        service: IngestService | None = None
        if key == INGEST:
            service = IngestService(
                self._pipeline,
                self._authenticator,
                self.occupancy,
                self._pressure,
                self._noise,
                lambda: self._settings.limits.in_flight,
            )
            server = grpc.aio.server(
                options=_options(
                    connections, affordable(connections.most), connections.age, LAST_WORDS_SECONDS
                )
            )
            server.add_generic_rpc_handlers((service.handler(),))
        else:
            age = min(connections.age, ENROLMENT_AGE_SECONDS)
            server = grpc.aio.server(
                options=_options(connections, ENROLMENT_CONNECTIONS, age, ENROLMENT_LAST_WORDS_SECONDS)
            )
        if self._enrolment is not None:
            add_EnrolmentServicer_to_server(self._enrolment, server)
        try:
            credentials = server_credentials(self._pair, self._client_ca if key == INGEST else None)
            port = server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise CollectorError(
                f"{address} cannot be opened: it is in use, or not of this host; set `listen.{key}` to another"
            )
        await server.start()
        return _Door(key, address, port, server, service)


def _addresses(settings: Settings, enrols: bool) -> Iterator[tuple[str, str]]:
    yield INGEST, settings.listen.ingest
    if enrols and settings.listen.enrolment:
        yield ENROLMENT, settings.listen.enrolment


def _room(settings: Settings) -> Room:
    limits = settings.limits
    return Room(
        limits.streams,
        limits.streams_per_agent,
        limits.streams_per_address,
        limits.bytes_per_second,
        limits.burst,
    )


def _options(
    connections: Connections, most: int, age_seconds: float, last_words_seconds: float
) -> list[tuple[str, Any]]:
    return [
        *SERVER_OPTIONS,
        ("grpc.max_allowed_incoming_connections", most),
        ("grpc.server_handshake_timeout_ms", round(connections.handshake * 1_000)),
        ("grpc.max_connection_idle_ms", round(connections.idle * 1_000)),
        ("grpc.max_connection_age_ms", round(age_seconds * 1_000)),
        ("grpc.max_connection_age_grace_ms", round(last_words_seconds * 1_000)),
    ]


def affordable(most: int) -> int:
    """How many connections the limit of open files leaves room for; the soft one is raised as far as it may be."""
    # RLIM_INFINITY is -1; the kernel's own bound (fs.nr_open) keeps it from ever being needed.
    soft, hard = (sys.maxsize if limit < 0 else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    needed = most + ENROLMENT_CONNECTIONS + OWN_FILES
    if soft < needed and soft < hard:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard if hard < sys.maxsize else -1))
    if soft >= needed:
        return most
    fit = max(1, soft - ENROLMENT_CONNECTIONS - OWN_FILES)
    log.warning("open_files_limited", limit=soft, connections=fit, wanted=most)
    return fit


def _key_material(
    settings: Settings, authority: CertificateAuthority | None
) -> tuple[Callable[[], PemPair], Callable[[], bytes]]:
    """(current key and chain, current client CA), both asked at each handshake."""
    tls = settings.tls
    if authority is not None:
        return authority.server_pair, lambda: authority.ca_pem
    certificate, key, client_ca = tls.certificate_file, tls.key_file, tls.client_ca_file
    assert certificate is not None
    assert key is not None
    assert client_ca is not None

    def read_file(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise CollectorError(f"{path}: {error.strerror}; make it readable for this user") from error

    def pair() -> PemPair:
        return read_file(key), read_file(certificate)

    return pair, lambda: read_file(client_ca)
