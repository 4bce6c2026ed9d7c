"""Who may come in: agents, their certificates, tenants and join tokens, in one SQLite file.

Every change is one transaction with synchronous=FULL. What is changed on purpose is told to the witness within the
transaction, just before the commit: without a line in the audit log nothing happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from collector.audit import Witness, unseen
from collector.errors import CollectorError
from wire.identity import AgentId, new_agent_id

MAX_TOKEN_SECONDS = 3_600
MAX_TENANTS_TOLD = 64
"""Of a longer list the audit log names the first; the registry has all."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS agent (
    agent_id TEXT PRIMARY KEY, host TEXT NOT NULL, tenants TEXT, enrolled_at INTEGER NOT NULL, revoked_at INTEGER
);
CREATE TABLE IF NOT EXISTS certificate (
    serial TEXT PRIMARY KEY, agent_id TEXT NOT NULL, not_before INTEGER NOT NULL, not_after INTEGER NOT NULL,
    revoked_at INTEGER
);
CREATE TABLE IF NOT EXISTS token (
    hash BLOB PRIMARY KEY, agent_id TEXT, tenants TEXT, expires_at INTEGER NOT NULL, used_at INTEGER
);
"""


class TokenRefused(Exception):
    """The secret buys nothing; the message says why and what to do."""


class AgentRecord(NamedTuple):
    agent_id: AgentId
    host: str
    tenants: frozenset[str] | None
    """None: any tenant."""
    enrolled_at: int
    revoked_at: int | None


class CertificateRecord(NamedTuple):
    serial: str
    agent_id: AgentId
    not_before: int
    not_after: int
    revoked_at: int | None


class Registry:
    """Thread-safe. Times are unix seconds."""

    def __init__(self, path: Path, witness: Witness = unseen) -> None:
        self._path = path
        self._witness = witness
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise CollectorError(f"{path}: {error}; run as the user that owns the CA directory") from error

    def close(self) -> None:
        self._db.close()

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever somebody wrote, here or in another process."""
        with self._lock:
            return int(self._db.execute("PRAGMA data_version").fetchone()[0]), self._db.total_changes

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def add_token(self, tenants: frozenset[str] | None, agent_id: AgentId | None, ttl_seconds: int) -> str:
        """A fresh secret; only its hash is kept."""
        if not 0 < ttl_seconds <= MAX_TOKEN_SECONDS:
            raise CollectorError(
                f"a join token lives at most {MAX_TOKEN_SECONDS} s; make one when it is needed"
            )
        secret = secrets.token_urlsafe(24)
        now = int(time.time())
        with self._transaction():
            self._db.execute("DELETE FROM token WHERE expires_at < ?", (now - 86_400,))
            self._db.execute(
                "INSERT INTO token VALUES (?, ?, ?, ?, NULL)",
                (_hash(secret), agent_id, _pack(tenants), now + ttl_seconds),
            )
            self._witness(
                "token_created",
                token=_name(secret),
                agent_id=agent_id,
                tenants=_listed(tenants),
                ttl_seconds=ttl_seconds,
            )
        return secret

    def spend(self, secret: str, wanted: AgentId | None, host: str, now: int) -> AgentRecord:
        """Use a token up and enrol the agent it was made for. TokenRefused if it cannot be used."""
        with self._transaction():
            row = self._db.execute(
                "SELECT hash, agent_id, tenants, expires_at, used_at FROM token WHERE hash = ?",
                (_hash(secret),),
            ).fetchone()
            if row is None or not hmac.compare_digest(bytes(row[0]), _hash(secret)):
                raise TokenRefused(
                    "this join token is not known here: make one with `weighbridge-collector token create`"
                )
            if row[4] is not None:
                raise TokenRefused("this join token was used already: make a new one")
            if row[3] < now:
                raise TokenRefused("this join token has expired: make a new one")
            if wanted is not None and row[1] != wanted:
                raise TokenRefused(
                    f"this join token is not for agent {wanted}: make one with `token create --agent-id {wanted}`"
                )
            agent_id = AgentId(row[1]) if row[1] else new_agent_id()
            self._db.execute("UPDATE token SET used_at = ? WHERE hash = ?", (now, row[0]))
            self._put_agent(agent_id, host, row[2], now)
            self._witness(
                "token_used",
                token=_name(secret),
                agent_id=agent_id,
                host=host[:256],
                tenants=_listed(_unpack(row[2])),
            )
        return AgentRecord(agent_id, host, _unpack(row[2]), now, None)

    def add_agent(self, agent_id: AgentId, host: str, tenants: frozenset[str] | None) -> None:
        with self._transaction():
            self._put_agent(agent_id, host, _pack(tenants), int(time.time()))
            self._witness("agent_admitted", agent_id=agent_id, host=host[:256], tenants=_listed(tenants))

    def _put_agent(self, agent_id: AgentId, host: str, tenants: str | None, now: int) -> None:
        self._db.execute(
            "INSERT INTO agent VALUES (?, ?, ?, ?, NULL) ON CONFLICT (agent_id) DO UPDATE SET"
            " host = excluded.host, tenants = excluded.tenants, enrolled_at = excluded.enrolled_at, revoked_at = NULL",
            (agent_id, host[:256], tenants, now),
        )

    def add_certificate(self, record: CertificateRecord) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM certificate WHERE not_after < ?", (int(time.time()) - 30 * 86_400,))
            self._db.execute("INSERT INTO certificate VALUES (?, ?, ?, ?, ?)", record)
            self._witness(
                "certificate_issued",
                agent_id=record.agent_id,
                serial=record.serial,
                not_after=record.not_after,
            )

    def revoke(self, agent_or_serial: str) -> int:
        """Revoke an agent with all its certificates, or one certificate; returns how many were hit."""
        now = int(time.time())
        with self._transaction():
            hit = self._db.execute(
                "UPDATE certificate SET revoked_at = ? WHERE revoked_at IS NULL AND (agent_id = ? OR serial = ?)",
                (now, agent_or_serial, agent_or_serial.lower()),
            ).rowcount
            hit += self._db.execute(
                "UPDATE agent SET revoked_at = ? WHERE revoked_at IS NULL AND agent_id = ?",
                (now, agent_or_serial),
            ).rowcount
            if hit:
                self._witness("revoked", agent_or_serial=agent_or_serial, records=hit)
        return hit

    def permit(self, agent_id: AgentId, tenants: frozenset[str] | None) -> bool:
        """Which tenants an agent may report from now on; False if it is not enrolled."""
        with self._transaction():
            hit = self._db.execute(
                "UPDATE agent SET tenants = ? WHERE agent_id = ?", (_pack(tenants), agent_id)
            ).rowcount
            if hit:
                self._witness("tenants_permitted", agent_id=agent_id, tenants=_listed(tenants))
        return bool(hit)

    def agent(self, agent_id: AgentId) -> AgentRecord | None:
        with self._lock:
            row = self._db.execute("SELECT * FROM agent WHERE agent_id = ?", (agent_id,)).fetchone()
        return None if row is None else AgentRecord(row[0], row[1], _unpack(row[2]), row[3], row[4])

    def revoked(self, serial: str, agent_id: AgentId) -> bool:
        with self._lock:
            row = self._db.execute(
                "SELECT 1 FROM certificate WHERE serial = ? AND revoked_at IS NOT NULL"
                " UNION SELECT 1 FROM agent WHERE agent_id = ? AND revoked_at IS NOT NULL",
                (serial, agent_id),
            ).fetchone()
        return row is not None

    def certificates(self) -> list[CertificateRecord]:
        with self._lock:
            rows = self._db.execute("SELECT * FROM certificate ORDER BY not_before").fetchall()
        return [CertificateRecord(*row) for row in rows]


def _hash(secret: str) -> bytes:
    """The secret has 192 random bits, so a plain hash cannot be guessed back."""
    return hashlib.sha256(secret.encode()).digest()


def _name(secret: str) -> str:
    """Enough of the hash to find a token's creation and its use again."""
    return _hash(secret).hex()[:16]


def _listed(tenants: frozenset[str] | None) -> list[str] | None:
    return None if tenants is None else sorted(tenants)[:MAX_TENANTS_TOLD]


def _pack(tenants: frozenset[str] | None) -> str | None:
    return None if tenants is None else json.dumps(sorted(tenants))


def _unpack(text: str | None) -> frozenset[str] | None:
    return None if text is None else frozenset(json.loads(text))
