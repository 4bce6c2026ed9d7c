"""The enrolment door: a join token, or an older certificate, buys a short-lived one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import NoReturn

import grpc
import grpc.aio

from collector.audit import AuditError
from collector.door.authenticate import Authenticator, NotAuthenticated
from collector.door.ca import CertificateAuthority, CsrRefused, acceptable_key
from collector.door.registry import TokenRefused
from wire.daemon.journal import Journal
from wire.identity import AgentId
from wire.statuses import Meter
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import EnrolmentServicer

REFUSAL_SECONDS = 0.5
"""Every refusal takes this long: guessing is slow."""
MAX_CALLS = 64
"""Enrolments and renewals under way, refusals that wait among them."""

log = Journal("collector.enrolment")

Context = grpc.aio.ServicerContext[object, object]


class EnrolmentService(EnrolmentServicer):
    def __init__(
        self,
        authority: CertificateAuthority,
        authenticator: Authenticator,
        collectors: Sequence[str],
        certificate_life: timedelta,
    ) -> None:
        self.collectors = list(collectors)
        self.certificate_life = certificate_life
        self._authority = authority
        self._authenticator = authenticator
        self._calls = 0

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolResponse:
        async with self._place(context):
            return await self._enrol(request, context)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        async with self._place(context):
            return await self._renew(request, context)

    @contextlib.asynccontextmanager
    async def _place(self, context: Context) -> AsyncIterator[None]:
        """One of the calls that may be under way."""
        if self._calls >= MAX_CALLS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"ERR_MAX_CONCURRENCY_REACHED: {MAX_CALLS} enrolments are under way; try again in a second",
            )
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def _enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolResponse:
        registry = self._authority.registry
        try:
            # The request first: one that cannot be signed must not use up the token.
            acceptable_key(request.csr_der)
            wanted = AgentId(request.agent_id) if request.agent_id else None
            record = await asyncio.to_thread(
                registry.spend, request.token, wanted, request.host, int(time.time())
            )
            chain = await asyncio.to_thread(
                self._authority.issue_agent, request.csr_der, record.agent_id, self.certificate_life
            )
        except TokenRefused as error:
            log.warning("enrolment_refused", peer=context.peer(), reason=str(error))
            await self._refuse(context, grpc.StatusCode.PERMISSION_DENIED, str(error))
        except CsrRefused as error:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except AuditError as error:
            await self._not_written_down(context, error)
        log.info("agent_enrolled", agent_id=record.agent_id, host=record.host)
        return pb.EnrolResponse(
            agent_id=record.agent_id,
            certificate_chain_pem=chain,
            ca_bundle_pem=self._authority.ca_pem,
            collectors=self.collectors,
        )

    async def _renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        try:
            peer = await asyncio.to_thread(self._authenticator.peer, context.auth_context())
            chain = await asyncio.to_thread(
                self._authority.issue_agent, request.csr_der, peer.agent_id, self.certificate_life
            )
        except NotAuthenticated as error:
            await self._refuse(context, grpc.StatusCode.UNAUTHENTICATED, str(error))
        except CsrRefused as error:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except AuditError as error:
            await self._not_written_down(context, error)
        log.info("certificate_renewed", agent_id=peer.agent_id)
        return pb.RenewResponse(certificate_chain_pem=chain, ca_bundle_pem=self._authority.ca_pem)

    async def _not_written_down(self, context: Context, error: AuditError) -> NoReturn:
        log.error("audit_unavailable", code=Meter.DATABASE_UNAVAILABLE, error=str(error))
        await context.abort(
            grpc.StatusCode.UNAVAILABLE,
            f"{Meter.DATABASE_UNAVAILABLE}: the collector's audit log cannot be written; try again later",
        )
        raise AssertionError("abort raises")

    async def _refuse(self, context: Context, code: grpc.StatusCode, text: str) -> None:
        await asyncio.sleep(REFUSAL_SECONDS)
        await context.abort(code, text)
