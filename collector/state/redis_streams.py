"""What streams have delivered, shared by several collectors in Redis: claims before, marks after.

A stream is one hash:

    w       watermark: all from b + 1 up to it are delivered
    b       of numbers up to it nothing is known here: they are granted, unverified, and leave no trace
    v       numbers below it may have been delivered before this knowledge began: they are granted unverified
    r       the server that wrote here last: another one may have lost the last writes
    SEQ     "D", digest                              delivered
            "0" or "1", owner, lease's end, digest   claimed; "1": another may have delivered it

Bounds. LIMIT numbers above the watermark, RING behind it, 16 bytes of each digest: a stream at rest takes 2 KiB,
and is forgotten LIFE_MS after its last word. Numbers beyond LIMIT are granted unverified; when all of a claim are,
the stream begins anew there. So nothing is DELIVERED that was not marked, and no gap stops a stream.

Failure model. Everything may be asked again: the same owner's claim is renewed, a mark tells a fact. A Redis that lost all,
or its last writes (a restart from a snapshot, a failover: `r` differs), makes those numbers unverified that an agent may
have had under way, and no more. A call is about one stream and its key has the stream as hash tag, so a cluster spreads them.

One thread asks, and whatever came together goes in one pipeline. While Redis is away claims are answered at once, with
nothing, and marks are kept for when it is back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisClusterException, RedisError
from redis.retry import Retry

from collector.decide.claims import MAX_SHARED_SEQ, Batches, Claimed, Numbered, StreamId, pack, read_reply
from collector.errors import CollectorError
from wire.daemon.journal import Journal
from wire.limits import WINDOW

ANSWER_SECONDS = 1.0
TROUBLE_SECONDS = 0.5
LIFE_MS = 30 * 86_400_000
RING = 64
LIMIT = 2 * WINDOW
MAX_QUESTIONS = 500
"""In one pipeline; the rest comes with the next."""
MAX_OWED = 1_000_000
"""Batches whose marks are kept while Redis is away, 50 bytes each."""

_AWAY = (RedisError, RedisClusterException, OSError)
BY_THE_SERVER = ("", "")
"""The time and the server's name, which only tests bring along."""

log = Journal("collector.shared")


def script(ring: int, limit: int, window: int) -> str:
    """The script with its bounds."""
    bounds = f"local RING, LIMIT, WINDOW, LIFE_MS = {ring}, {limit}, {window}, {LIFE_MS}\n"
    return bounds + Path(__file__).with_name("streams.lua").read_text()


SCRIPT = script(RING, LIMIT, WINDOW)

Answers = Mapping[tuple[StreamId, int], Claimed]
"""By stream and seq. What is missing is AWAY."""


class _Question(NamedTuple):
    """One call of the script."""

    stream: StreamId
    words: tuple[bytes | str | int, ...]
    batches: list[Numbered]

    @property
    def is_mark(self) -> bool:
        return self.words[0] == "mark"


class _Request(NamedTuple):
    questions: list[_Question]
    done: Callable[[list[Any]], object]
    """Told the answers in the same order; None for one that did not come."""


class RedisStreams:
    """The streams of one installation and topic. Thread-safe."""

    def __init__(self, url: str, cluster: bool, topic: str, owner: bytes, lease_ms: int) -> None:
        """`topic`: what is delivered to one says nothing of another. `owner`: 16 bytes, the same after a restart."""
        kind: Any = RedisCluster if cluster else redis.Redis
        self._connect: Callable[[], Any] = lambda: kind.from_url(
            url,
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=ANSWER_SECONDS,
            # A connection that was closed while idle; but nobody is waited for twice.
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        )
        self._redis: Any = None
        if not cluster:
            # A cluster's client asks for its nodes at once, so it is made by the thread.
            self._redis = self._connected()
        self._prefix = f"weighbridge:dedup:{topic}"
        self._owner = owner
        self._lease_ms = lease_ms
        self._sha = ""
        self._wake = threading.Condition()
        self._waiting: list[_Request] = []
        self._owed: deque[_Question] = deque()
        self.owed = 0
        """Batches whose marks are kept until Redis is back."""
        self.not_kept = 0
        """Marks that found no room there."""
        self.failures = 0
        self.trouble = ""
        """Why nothing is asked at the moment, or empty."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="redis-streams", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def open(self, stream: StreamId, oldest_seq: int, next_seq: int) -> None:
        """An agent says where it stands. Told when it can be, and nobody waits."""
        if not self.trouble and 0 < oldest_seq <= next_seq < MAX_SHARED_SEQ:
            question = _Question(stream, ("open", *BY_THE_SERVER, oldest_seq, next_seq), [])
            self._ask(_Request([question], lambda _: None))

    def claim(self, batches: Batches, done: Callable[[Answers], object]) -> None:
        """`done` is told from another thread, in the order of the calls; while Redis is away at once, by this one."""
        questions = []
        for stream, numbered in batches.items():
            known = [batch for batch in numbered if batch[0] < MAX_SHARED_SEQ]
            if known:
                words = ("claim", *BY_THE_SERVER, self._owner, self._lease_ms, pack(known))
                questions.append(_Question(stream, words, known))
        if self.trouble or not questions:
            done({})
            return

        def answered(replies: list[Any]) -> None:
            done(
                {
                    (question.stream, seq): claimed
                    for question, reply in zip(questions, replies, strict=True)
                    if reply is not None
                    for (seq, _), claimed in zip(
                        question.batches, read_reply(question.batches, reply), strict=True
                    )
                }
            )

        self._ask(_Request(questions, answered))

    def claim_and_wait(self, batches: Batches) -> Answers:
        told: list[Answers] = []
        ready = threading.Event()

        def done(answers: Answers) -> None:
            told.append(answers)
            ready.set()

        self.claim(batches, done)
        ready.wait()
        return told[0]

    def mark_and_wait(self, batches: Batches) -> None:
        """These are delivered. Without an answer they are kept and told later."""
        questions = []
        for stream, numbered in batches.items():
            known = [batch for batch in numbered if batch[0] < MAX_SHARED_SEQ]
            if known:
                questions.append(_Question(stream, ("mark", *BY_THE_SERVER, pack(known)), known))
        if self.trouble:
            self._owe(questions)
        elif questions:
            ready = threading.Event()
            self._ask(_Request(questions, lambda _: ready.set()))
            ready.wait()

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        if self._redis is not None:
            self._redis.close()

    def _ask(self, request: _Request) -> None:
        with self._wake:
            self._waiting.append(request)
            self._wake.notify()

    def _owe(self, questions: Iterable[_Question]) -> None:
        with self._wake:
            for question in questions:
                if self.owed + len(question.batches) > MAX_OWED:
                    self.not_kept += len(question.batches)
                    continue
                self._owed.append(question)
                self.owed += len(question.batches)

    def _run(self) -> None:
        while True:
            with self._wake:
                if not (self._waiting or self._closing):
                    self._wake.wait(TROUBLE_SECONDS if self.trouble else None)
                requests, self._waiting = self._waiting, []
                closing = self._closing
            if self.trouble:
                self._try_again()
            self._serve(requests)
            if closing and not requests:
                return

    def _serve(self, requests: list[_Request]) -> None:
        """Ask everything that waits; everybody is told, also that there is no answer."""
        questions = [question for request in requests for question in request.questions]
        replies: list[Any] = []
        try:
            while not self.trouble and len(replies) < len(questions):
                replies += self._execute(questions[len(replies) : len(replies) + MAX_QUESTIONS])
        except _AWAY as error:
            self._in_trouble(error)
        self._owe(question for question in questions[len(replies) :] if question.is_mark)
        replies += [None] * (len(questions) - len(replies))
        for request in requests:
            count = len(request.questions)
            request.done(replies[:count])
            del replies[:count]

    def _try_again(self) -> None:
        """Tell what is owed, oldest first; then all is well."""
        try:
            while True:
                with self._wake:
                    some = list(self._owed)[:MAX_QUESTIONS]
                self._execute(some)
                with self._wake:
                    for question in some:
                        self._owed.popleft()
                        self.owed -= len(question.batches)
                    if not self._owed:
                        self.trouble = ""
                        break
        except _AWAY as error:
            self._in_trouble(error)
            return
        log.info("shared_streams_back")

    def _in_trouble(self, error: Exception) -> None:
        self.failures += 1
        text = f"{type(error).__name__}: {error}"
        if not self.trouble:
            log.error("shared_streams_away", code="METER-001", error=text)
        self.trouble = text

    def _execute(self, questions: list[_Question]) -> list[Any]:
        """One round trip: the replies. RedisError, OSError if any of them is missing."""
        client = self._connected()
        if not questions:
            # A server that is full, or only a replica, answers but takes nothing.
            client.set(f"{self._prefix}:probe", 1, px=1_000)
            return []
        if not self._sha:
            self._sha = client.script_load(SCRIPT)
        replies = self._call(client, questions)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            self._sha = client.script_load(SCRIPT)
            replies = self._call(client, questions)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _call(self, client: Any, questions: list[_Question]) -> list[Any]:
        pipeline: Any = client.pipeline(transaction=False)
        for question in questions:
            stream = question.stream
            key = f"{self._prefix}:{{{stream.agent_id}:{stream.epoch}}}"
            # Not `evalsha`, which the pipeline of a cluster does not have under that name.
            pipeline.execute_command("EVALSHA", self._sha, 1, key, *question.words)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies

    def _connected(self) -> Any:
        if self._redis is None:
            try:
                self._redis = self._connect()
            except ValueError as error:
                raise CollectorError(f"shared.redis: {error}") from None
        return self._redis
