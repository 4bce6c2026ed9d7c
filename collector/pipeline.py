"""From a delivered item to its answer, in seven steps; the cheapest refusal comes first.

    authenticate   door/service.py, once per connection
    bound          is there room for what waits for the disk, and in its tenant's queue?
    identify       do the bytes fit their digest; was this identity here before?   decide/dedup.py
                   with other collectors beside this one: or there?                decide/claims.py
    validate       decode, and can it be true?                                     decide/validate.py
    admit          may this tenant go on now, or is it parked?                     decide/admission.py
    hand off       append to the durable log, many batches in one sync             handoff/log/
    acknowledge    only what is durable, in `_committed`; with Kafka, only what the brokers have, in `_confirmed`

Identity comes before validation, so that a batch that was accepted once is a duplicate for ever, also when
the settings have become stricter since.

Invariants. A stream is marked only in `_committed`, for what the log has synced; until then the identity is
claimed, so that a second copy on another connection waits for the first. With Kafka a duplicate, too, is answered
only when the brokers have confirmed the log up to where it ended when it came. A rejected batch is in the
log with its reason before its answer goes out, and uses its identity up; except one whose bytes are not
what was meant (DIGEST_MISMATCH) and one whose identity belongs to another (CONFLICT). RETRY leaves no mark.

One owner: the event loop. The log calls back from its thread through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from collector.decide import claims
from collector.decide.admission import Admission, Parked, Verdict, weight
from collector.decide.claims import Claimed, Numbered, StreamId
from collector.decide.dedup import Seen, StreamState
from collector.decide.validate import Refusal, Validator, check_bytes
from collector.door.authenticate import Peer
from collector.handoff.log import UNVERIFIED, DurableLog, Kind, frame
from collector.handoff.park_notes import parked_note
from collector.handoff.receipts import Receipts
from collector.job import Item, Job, Park
from collector.notices import Notices
from collector.state.memory import Streams
from collector.tally import Tally, TenantTotal
from wire.daemon.journal import Journal
from wire.identity import AgentId
from wire.identity import digest as digest_of
from wire.limits import MAX_VALUE
from wire.statuses import Meter, Reason, Status, meter_code
from wire.v1 import ingest_pb2 as pb
from wire.v1 import usage_pb2

if TYPE_CHECKING:
    # Loaded only where it is used.
    from collector.state.redis_streams import RedisStreams

RETRY_SOON_MS = 200
RETRY_HELD_MS = 1_000
RETRY_WHEN_REPAIRED_MS = 2_000
SLOW_COMMIT_SECONDS = 2.0

# Looked up once: the generated enums resolve a name in Python at every access.
_ACCEPTED, _DUPLICATE, _RETRY = Status.STATUS_ACCEPTED, Status.STATUS_DUPLICATE, Status.STATUS_RETRY
_NEW, _ADMITTED, _FULL, _KIND_ACCEPTED = Seen.NEW, Verdict.ADMITTED, Verdict.FULL, Kind.ACCEPTED

log = Journal("collector.pipeline")


class TooManyEpochs(Exception):
    """This agent opened more epochs than the collector keeps."""


class Opened(NamedTuple):
    """What a stream's Welcome says."""

    watermark: int
    latest_epoch: int


class Pipeline:
    def __init__(
        self,
        streams: Streams,
        durable_log: DurableLog,
        judge: Admission,
        validator: Validator,
        tally: Tally,
        max_queued_bytes: int,
        receipts: Receipts | None = None,
        shared: RedisStreams | None = None,
    ) -> None:
        """`receipts`: who behind the log has to confirm a batch before it is acknowledged; None: nobody. `shared`: what
        other collectors have delivered; None: there are none.
        """
        self.validator = validator
        self.tally = tally
        self.covered = durable_log.end
        """Offset up to which the log's records are marked in the streams."""
        self._streams = streams
        self._log = durable_log
        self._admission = judge
        self.max_queued_bytes = max_queued_bytes
        self._receipts = receipts
        self._shared = shared
        self.notices = Notices()
        self._waiting_bytes = 0
        self._loop = asyncio.get_running_loop()

    def open(self, agent_id: AgentId, hello: pb.Hello) -> Opened:
        """A stream begins. Where this collector knows less than the agent was answered, it goes on there."""
        held = [(hello.epoch, hello.oldest_seq), *((old.epoch, old.oldest_seq) for old in hello.older)]
        for epoch, oldest_seq in held:
            state = self._stream(agent_id, epoch)
            if state.watermark + 1 < oldest_seq < MAX_VALUE and not state.claims:
                log.warning(
                    "stream_adopted",
                    agent_id=agent_id,
                    epoch=epoch,
                    watermark=state.watermark,
                    oldest_seq=oldest_seq,
                )
                self.tally.adopted_streams += 1
                state.adopt(oldest_seq)
                record = frame(
                    Kind.ADOPTED,
                    time.time_ns(),
                    uuid.UUID(agent_id).bytes,
                    epoch,
                    oldest_seq,
                    digest_of(b""),
                    b"",
                    b"",
                )
                self._log.append([*record], lambda _end: None)
        if self._shared is not None:
            self._shared.open(StreamId(agent_id, hello.epoch), hello.oldest_seq, hello.next_seq)
        current = self._stream(agent_id, hello.epoch)
        return Opened(current.watermark, self._streams.latest_epoch(agent_id))

    def put_off(self, items: Sequence[Item], reason: Reason) -> asyncio.Future[list[pb.Answer]]:
        """RETRY to all of them, for a reason that will not pass at once."""
        done: asyncio.Future[list[pb.Answer]] = self._loop.create_future()
        done.set_result([self._retry(item, reason, RETRY_WHEN_REPAIRED_MS) for item in items])
        return done

    def deliver(self, peer: Peer, items: Sequence[Item]) -> asyncio.Future[list[pb.Answer]]:
        """Judge items now; the future has one answer per item, in order, once they are durable."""
        job = Job(peer, self._loop.create_future())
        receipts = self._receipts
        if receipts is not None and not receipts.take_more:
            reason = Reason.REASON_STORAGE_UNAVAILABLE if receipts.trouble else Reason.REASON_OVERLOADED
            wait_ms = RETRY_WHEN_REPAIRED_MS if receipts.trouble else RETRY_SOON_MS
            job.answers = [self._retry(item, reason, wait_ms) for item in items]
        elif self._waiting_bytes > self.max_queued_bytes:
            job.answers = [self._retry(item, Reason.REASON_OVERLOADED, RETRY_SOON_MS) for item in items]
        elif self._shared is not None:
            self._claim(self._shared, job, items)
            return job.done
        else:
            judge = self._judge
            job.answers = [judge(job, item) for item in items]
        self._hand_off(job)
        return job.done

    def _claim(self, shared: RedisStreams, job: Job, items: Sequence[Item]) -> None:
        """Ask what the other collectors know of all that is new here, in one go; then judge."""
        found = [self._identify(job, item) for item in items]
        new: dict[StreamId, list[Numbered]] = {}
        for item, one in zip(items, found, strict=True):
            if isinstance(one, StreamState):
                new.setdefault(StreamId(job.peer.agent_id, item.epoch), []).append((item.seq, item.digest))
        waiting = sum(len(item.batch) for item in items)
        self._waiting_bytes += waiting
        loop = self._loop

        def done(answers: Mapping[tuple[StreamId, int], Claimed]) -> None:
            loop.call_soon_threadsafe(self._claimed, job, items, found, answers, waiting)

        shared.claim(new, done)

    def _claimed(
        self,
        job: Job,
        items: Sequence[Item],
        found: Sequence[StreamState | pb.Answer],
        answers: Mapping[tuple[StreamId, int], Claimed],
        waiting: int,
    ) -> None:
        self._waiting_bytes -= waiting
        for item, one in zip(items, found, strict=True):
            if isinstance(one, StreamState):
                claimed = answers.get((StreamId(job.peer.agent_id, item.epoch), item.seq), claims.AWAY)
                one = self._judge_claimed(job, item, one, claimed)
            job.answers.append(one)
        self._hand_off(job)

    def _hand_off(self, job: Job) -> None:
        if not job.claims_durable:
            self._finish(job)
            return
        queued = sum(map(len, job.frames))
        self._waiting_bytes += queued
        loop = self._loop
        # An empty group is a barrier: a duplicate of what is still on its way is answered after it.
        self._log.append(job.frames, lambda end: loop.call_soon_threadsafe(self._committed, job, queued, end))

    def _judge(self, job: Job, item: Item) -> pb.Answer:
        found = self._identify(job, item)
        return self._take_in(job, item, found) if isinstance(found, StreamState) else found

    def _judge_claimed(self, job: Job, item: Item, state: StreamState, claimed: Claimed) -> pb.Answer:
        """Judge what was new here, and may have come in here meanwhile."""
        seen = state.judge(item.seq, item.digest)
        if seen is not _NEW:
            return self._seen(job, item, seen)
        if claimed.verdict is claims.Verdict.HELD:
            self.tally.held_elsewhere += 1
            return self._retry(item, Reason.REASON_HELD_ELSEWHERE, min(claimed.retry_after_ms, RETRY_HELD_MS))
        if claimed.verdict is claims.Verdict.DELIVERED:
            return self._elsewhere(job, item, state)
        if claimed.verdict is claims.Verdict.CONFLICT:
            detail = (
                f"{item.epoch}/{item.seq} is known to another collector with a digest that begins"
                f" {claimed.known.hex()}, not {item.digest.hex()}"
            )
            return self._reject(job, item, None, Refusal(Reason.REASON_IDENTITY_CONFLICT, detail))
        return self._take_in(job, item, state, 0 if claimed.verdict is claims.Verdict.GRANTED else UNVERIFIED)

    def _identify(self, job: Job, item: Item) -> StreamState | pb.Answer:
        """Its stream, if the item is new here; or its answer."""
        epoch, seq, digest, body = item
        self.tally.bytes_received += len(body)
        state = job.streams.get(epoch)
        if state is None or not 0 < seq < MAX_VALUE:
            if not 0 < seq < MAX_VALUE or not 0 < epoch < MAX_VALUE:
                nameless = Refusal(Reason.REASON_OUT_OF_BOUNDS, f"{epoch}/{seq}: epoch and seq count from 1")
                return self._reject(job, item, None, nameless)
            try:
                state = job.streams[epoch] = self._stream(job.peer.agent_id, epoch)
            except TooManyEpochs:
                return self._retry(item, Reason.REASON_OVERLOADED, RETRY_WHEN_REPAIRED_MS)

        if self._admission.full and state.judge(seq, digest) is _NEW:
            # RETRY leaves no mark, so whether it is in order may be found out when there is room for it.
            tenant, permitted = _tenant(body), job.peer.tenants
            mine = permitted is None or tenant in permitted
            if mine and self._admission.turns_away(tenant, len(body), time.monotonic_ns()):
                return self._turn_away(item, tenant, weight(len(body), 0))
        refusal = check_bytes(body, digest)
        if refusal is not None:
            meant = refusal.reason != Reason.REASON_DIGEST_MISMATCH
            # Nobody is asked about it now; the publisher does.
            flags = UNVERIFIED if self._shared is not None else 0
            return self._reject(job, item, state if meant else None, refusal, flags)
        seen = state.judge(seq, digest)
        return state if seen is _NEW else self._seen(job, item, seen)

    def _take_in(self, job: Job, item: Item, state: StreamState, flags: int = 0) -> pb.Answer:
        """Validate and admit what is new."""
        epoch, seq, digest, body = item
        peer = job.peer
        checked = self.validator.check(body, peer.agent_id, epoch, seq, peer.tenants, job.received_at_unix_ns)
        refusal = checked.refusal or _chain(state, epoch, seq, checked.previous_digest)
        if refusal is not None:
            return self._reject(job, item, state, refusal, flags)

        tenant, rows, cpu_usage_ns = checked.tenant, checked.rows, checked.cpu_usage_ns
        charge = weight(len(body), rows)
        verdict = self._admission.judge(tenant, charge, len(body), time.monotonic_ns())
        if verdict is _FULL:
            return self._turn_away(item, tenant, charge)
        if verdict is _ADMITTED:
            kind, note, status = _KIND_ACCEPTED, b"", _ACCEPTED
            job.charges[tenant] = job.charges.get(tenant, 0) + charge
            total = job.accepted.get(tenant)
            if total is None:
                total = job.accepted[tenant] = TenantTotal()
            total.add(1, rows, cpu_usage_ns)
        else:
            kind, note, status = Kind.PARKED, parked_note(tenant, rows, cpu_usage_ns), Status.STATUS_PARKED
            self.notices.quota(tenant, "parked")
            job.parks.append(Park(tenant, charge, len(body), sum(map(len, job.frames))))
        job.frames.extend(
            frame(kind, job.received_at_unix_ns, job.agent, epoch, seq, digest, note, body, flags)
        )
        job.claims_durable = True
        state.claim(seq, digest)
        job.marks.append((state, seq, digest))
        for gap in checked.gaps:
            name = usage_pb2.GapReason.Name(gap.reason) if gap.reason in _GAP_REASONS else "unknown"
            name = name.removeprefix("GAP_REASON_").lower()
            self.tally.gaps[name] += 1
            self.notices.gap(peer.agent_id, tenant, item, name, gap.detail)
        return pb.Answer(epoch=epoch, seq=seq, status=status)

    def _turn_away(self, item: Item, tenant: str, charge: int) -> pb.Answer:
        """Its tenant's queue is full; the agent keeps it."""
        self.notices.quota(tenant, "park_full")
        return self._retry(item, Reason.REASON_PARK_FULL, self._admission.retry_after_ms(tenant, charge))

    def _seen(self, job: Job, item: Item, seen: Seen) -> pb.Answer:
        """Answer an item whose identity says enough."""
        if seen is Seen.OUT_OF_WINDOW:
            return self._retry(item, Reason.REASON_OUT_OF_WINDOW, RETRY_SOON_MS)
        if seen is Seen.CONFLICT:
            detail = f"{item.epoch}/{item.seq} is known with another digest than {item.digest.hex()}"
            return self._reject(job, item, None, Refusal(Reason.REASON_IDENTITY_CONFLICT, detail))
        job.claims_durable = True
        self.tally.answers["duplicate"] += 1
        return pb.Answer(epoch=item.epoch, seq=item.seq, status=_DUPLICATE)

    def _elsewhere(self, job: Job, item: Item, state: StreamState) -> pb.Answer:
        """Another collector has delivered it. The log says so, and from now on it is a duplicate here, too."""
        self.tally.delivered_elsewhere += 1
        record = frame(
            Kind.ELSEWHERE,
            job.received_at_unix_ns,
            job.agent,
            item.epoch,
            item.seq,
            digest_of(b""),
            item.digest,
            b"",
        )
        job.frames.extend(record)
        state.claim(item.seq, item.digest)
        job.marks.append((state, item.seq, item.digest))
        return self._seen(job, item, Seen.DUPLICATE)

    def _stream(self, agent_id: AgentId, epoch: int) -> StreamState:
        state = self._streams.get(agent_id, epoch)
        if state is None:
            if not self._streams.may_open(agent_id):
                raise TooManyEpochs
            log.info("stream_opened", agent_id=agent_id, epoch=epoch)
            state = StreamState()
            self._streams.put(agent_id, epoch, state)
        return state

    def _reject(
        self, job: Job, item: Item, state: StreamState | None, refusal: Refusal, flags: int = 0
    ) -> pb.Answer:
        """Keep an item with its reason. With `state` its identity is used up; None leaves it open."""
        actual = digest_of(item.batch)
        if state is not None:
            seen = state.judge(item.seq, actual)
            if seen is Seen.OUT_OF_WINDOW or seen is Seen.DUPLICATE:
                return self._seen(job, item, seen)
            if seen is Seen.CONFLICT:
                state = None  # the identity is another batch's already: evidence, no mark
            else:
                state.claim(item.seq, actual)
                job.marks.append((state, item.seq, actual))
        reason = Reason.Name(refusal.reason)
        code = meter_code(refusal.reason) or Meter.INVALID_BATCH
        self.tally.refusals[code, reason.removeprefix("REASON_").lower()] += 1
        log.error(
            "batch_rejected",
            code=code,
            agent_id=job.peer.agent_id,
            epoch=item.epoch,
            seq=item.seq,
            digest=item.digest.hex()[:64],
            reason=reason,
            detail=refusal.detail,
        )
        self.notices.rejected(job.peer.agent_id, item, refusal.reason, refusal.detail)
        note = f"{reason} {refusal.detail}".encode()
        kind = Kind.REFUSED if state is None else Kind.REJECTED
        job.frames.extend(
            frame(
                kind,
                job.received_at_unix_ns,
                job.agent,
                item.epoch,
                item.seq,
                actual,
                note,
                item.batch,
                flags,
            )
        )
        job.claims_durable = True
        job.rejected += 1
        return pb.Answer(
            epoch=item.epoch,
            seq=item.seq,
            status=Status.STATUS_REJECTED,
            reason=refusal.reason,
            detail=refusal.detail,
        )

    def _retry(self, item: Item | pb.Answer, reason: Reason, after_ms: int) -> pb.Answer:
        self.tally.answers["retry"] += 1
        code = meter_code(reason)
        if code is not None:
            self.tally.refusals[code, Reason.Name(reason).removeprefix("REASON_").lower()] += 1
        return pb.Answer(
            epoch=item.epoch,
            seq=item.seq,
            status=_RETRY,
            reason=reason,
            retry_after_ms=after_ms,
        )

    def _committed(self, job: Job, queued: int, end: int | None) -> None:
        self._waiting_bytes -= queued
        if end is None:
            self._give_back(job)
            self.tally.failed_commits += 1
            for state, seq, _ in job.marks:
                state.release(seq)
            self._take_back(job)
        else:
            self.tally.commits += 1
            self.covers(end)
            for park in job.parks:
                offset = end - queued + park.start
                batch = Parked(offset, park.size, park.weight, job.received_at_unix_ns)
                self._admission.parked(park.tenant, batch)
            self.tally.answers["parked"] += len(job.parks)
            for state, seq, digest in job.marks:
                state.mark(seq, digest)
            for tenant, total in job.accepted.items():
                self.tally.accepted(tenant, total)
            self.tally.answers["rejected"] += job.rejected
            if self._receipts is not None:
                job.frames = []  # what waits for the brokers waits on disk
                self._receipts.wait(end, partial(self._confirmed, job))
                return
        self._finish(job)

    def _confirmed(self, job: Job, confirmed: bool) -> None:
        """The brokers have it. Or they do not answer: it is in the log and will be published, and when the agent sends
        it again it is a duplicate.
        """
        if not confirmed:
            self._take_back(job)
        self._finish(job)

    def _take_back(self, job: Job) -> None:
        """What was to be acknowledged cannot be."""
        job.answers = [
            self._retry(answer, Reason.REASON_STORAGE_UNAVAILABLE, RETRY_WHEN_REPAIRED_MS)
            if answer.status != _RETRY
            else answer
            for answer in job.answers
        ]

    def covers(self, end: int) -> None:
        """Everything in the log up to `end` is marked, in streams and queues."""
        self.covered = max(self.covered, end)
        if self._receipts is not None:
            self._receipts.durable(self.covered)

    def _give_back(self, job: Job) -> None:
        """RETRY leaves no mark: nobody is charged for what the disk refused."""
        for park in job.parks:
            self._admission.unpark(park.tenant, park.weight, park.size)
        for tenant, charged in job.charges.items():
            self._admission.refund(tenant, charged)

    def _finish(self, job: Job) -> None:
        seconds = time.monotonic() - job.begun
        self.tally.answered_after(seconds, len(job.answers))
        if seconds > SLOW_COMMIT_SECONDS:
            log.warning(
                "commit_slow", code=Meter.HIGH_LATENCY, agent_id=job.peer.agent_id, seconds=round(seconds, 3)
            )
        if not job.done.done():
            job.done.set_result(job.answers)


def _chain(state: StreamState, epoch: int, seq: int, previous_digest: bytes) -> Refusal | None:
    """Does the batch name the one before it? Unknown when that one was answered elsewhere or is not here yet."""
    if seq == 1:
        return None
    known = state.digest_of(seq - 1)
    if known is None or known == previous_digest:
        return None
    return Refusal(Reason.REASON_CHAIN_BROKEN, f"previous_digest is not the digest of {epoch}/{seq - 1}")


def _tenant(body: bytes) -> str:
    """Whose a batch says it is; empty if that cannot be read."""
    try:
        return usage_pb2.UsageHead.FromString(body).tenant
    except DecodeError:
        return ""


_GAP_REASONS = frozenset(usage_pb2.GapReason.values())
