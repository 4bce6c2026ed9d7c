"""The spool's file as a whole: created, adopted, brought forward to this schema, set aside when damaged.

Strategy. A new spool is built beside its place and renamed into it, so that `spool.db` is whole whenever it is
there. A damaged one first gets a second name (a hard link) and is then replaced by a new one that already
owes the gap record of what was lost: a kill at any instruction leaves either the damaged file, known to be
one by its second name, or the new one with the gap in it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from agent.errors import AgentError
from agent.meter.usage import Gap
from wire.daemon.files import sync_directory
from wire.identity import AgentId
from wire.v1 import usage_pb2 as pb

SCHEMA_VERSION = 2
FILE_NAME = "spool.db"
MAX_SET_ASIDE = 3
QUICK_CHECK_BELOW_BYTES = 64 << 20
"""A larger spool is not checked as a whole at start, since metering must begin; its batches carry digests."""

_OWED_GAP = """
CREATE TABLE owed_gap (
    id INTEGER PRIMARY KEY, start_unix_ns INTEGER NOT NULL, end_unix_ns INTEGER NOT NULL,
    reason INTEGER NOT NULL, count INTEGER NOT NULL, detail TEXT NOT NULL
)"""
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE batch (
    epoch INTEGER NOT NULL, seq INTEGER NOT NULL, tenant TEXT NOT NULL, rows INTEGER NOT NULL,
    interval_end_unix_ns INTEGER NOT NULL, digest BLOB NOT NULL, body BLOB NOT NULL,
    interval_start_unix_ns INTEGER,
    PRIMARY KEY (epoch, seq)
);
CREATE TABLE quarantine (
    epoch INTEGER NOT NULL, seq INTEGER NOT NULL, reason TEXT NOT NULL, digest BLOB NOT NULL, body BLOB NOT NULL
);
{_OWED_GAP};
"""
_FORWARD: dict[int, tuple[str, ...]] = {
    # The column stays NULL in batches of version 1: filling it would write the whole spool anew.
    1: ("ALTER TABLE batch ADD COLUMN interval_start_unix_ns INTEGER", _OWED_GAP)
}
"""Version -> the statements that lead to the next one."""


class SpoolError(AgentError):
    """The spool cannot be used; the message names the fix."""


class SpoolUnavailable(SpoolError):
    """The disk refused for now. Nothing was changed; try again."""


class SpoolFull(SpoolError):
    """The batches would pass the size bound. Nothing was changed."""


class SpoolCorrupt(SpoolError):
    """The file is damaged, or could not be replaced when it was: `Spool.recover` sets it aside."""


class Opened(Enum):
    """How the spool was found."""

    FRESH = "fresh"
    ADOPTED = "adopted"
    SET_ASIDE = "set_aside"


class Found(NamedTuple):
    db: sqlite3.Connection
    opened: Opened
    set_aside_as: Path | None
    damage: str
    """Why the file was set aside, or empty."""


def open_file(
    path: Path, agent_id: AgentId, now_unix_ns: int, suspect: bool = False, unusable: str = ""
) -> Found:
    """The spool at `path`, whatever has to be done to have one. SpoolError names what stands in the way.

    Nobody else may have it open: the caller holds the lock. One that is `suspect` is checked as a whole, and
    one that was found `unusable` (the reason) is set aside whatever a check would say.
    """
    try:
        if not path.exists():
            _create(path, agent_id, now_unix_ns, [])
            return Found(_connect(path), Opened.FRESH, None, "")
        damage = unusable
        if not damage and _second_name(path) is not None:
            damage = "it was being set aside when the agent ended"
        if not damage:
            try:
                return Found(_adopt(path, agent_id, suspect), Opened.ADOPTED, None, "")
            except SpoolCorrupt as error:
                damage = str(error)
        aside = _replace(path, agent_id, now_unix_ns)
        return Found(_connect(path), Opened.SET_ASIDE, aside, damage)
    except (sqlite3.Error, OSError) as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: sqlite3.Error | OSError) -> SpoolError:
    """SpoolUnavailable if this user may write there, so that only the disk can be at fault."""
    why = error.strerror if isinstance(error, OSError) else error
    places = [path, path.parent] if path.exists() else [next(p for p in path.parents if p.exists())]
    if places[-1].is_dir() and os.statvfs(places[-1]).f_flag & os.ST_RDONLY:
        return SpoolUnavailable(f"{path}: {why}; its disk is mounted read-only: mount it writable")
    if places[-1].is_dir() and all(os.access(place, os.R_OK | os.W_OK) for place in places):
        return SpoolUnavailable(f"{path}: {why}; free space on its disk")
    return SpoolError(
        f"{path}: {why}; make {path.parent} and what is in it writable for this user, or set `state_dir` to"
        " another directory"
    )


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is wrong, rather than the disk unwilling. SQLITE_ERROR is SQL that the file's
    schema does not know, since ours is fixed.
    """
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


def put(db: sqlite3.Connection, key: str, value: int | str | bytes) -> None:
    """Set one entry of `meta`."""
    db.execute(
        "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
    )


def begin_epoch(db: sqlite3.Connection, epoch: int) -> None:
    for key, value in (("epoch", epoch), ("next_seq", 1), ("last_digest", b"")):
        put(db, key, value)


def owe(db: sqlite3.Connection, gap: Gap) -> None:
    """Remember a gap until a batch that holds it is committed."""
    db.execute(
        "INSERT INTO owed_gap (start_unix_ns, end_unix_ns, reason, count, detail) VALUES (?,?,?,?,?)",
        (gap.start_unix_ns, gap.end_unix_ns, gap.reason, gap.count, gap.detail),
    )


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 16777216")
        db.execute("PRAGMA cache_size = -4096")
    except BaseException:
        db.close()
        raise
    return db


def _create(path: Path, agent_id: AgentId, now_unix_ns: int, owed: Sequence[Gap]) -> None:
    """Put an empty spool of a new epoch at `path`, in the place of what may be there."""
    building = Path(f"{path}.new")
    for leftover in (building, f"{building}-journal"):
        Path(leftover).unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(building, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
        put(db, "schema_version", SCHEMA_VERSION)
        put(db, "agent_id", agent_id)
        begin_epoch(db, now_unix_ns // 1_000)
        for gap in owed:
            owe(db, gap)
        db.execute("COMMIT")
    for suffix in ("-wal", "-shm"):
        # SQLite would take the log of another file for this one's.
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    building.replace(path)
    sync_directory(path.parent)


def _adopt(path: Path, agent_id: AgentId, suspect: bool) -> sqlite3.Connection:
    """Open the spool that is there and bring it forward. SpoolCorrupt if it is of no use."""
    db = None
    try:
        db = _connect(path)
        if suspect or path.stat().st_size <= QUICK_CHECK_BELOW_BYTES:
            check = "integrity_check" if suspect else "quick_check"
            verdict = db.execute(f"PRAGMA {check}(1)").fetchone()
            if verdict is None or verdict[0] != "ok":
                raise SpoolCorrupt(f"{path}: {verdict}")
        meta = dict(db.execute("SELECT key, value FROM meta WHERE key != 'baseline'"))
        try:
            version, owner = int(meta["schema_version"]), str(meta["agent_id"])
            int(meta["epoch"]), int(meta["next_seq"]), bytes(meta["last_digest"])
        except (KeyError, ValueError, TypeError) as error:
            raise SpoolCorrupt(f"{path}: no usable header ({error!r})") from error
        _bring_forward(db, path, version)
        if owner != agent_id:
            _refuse_to_mix(db, path, owner, agent_id)
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, sqlite3.Error) and is_damage(error):
            raise SpoolCorrupt(f"{path}: {error}") from error
        raise
    return db


def _bring_forward(db: sqlite3.Connection, path: Path, version: int) -> None:
    if not 1 <= version <= SCHEMA_VERSION:
        raise SpoolError(
            f"{path} is of schema {version}, this agent knows {SCHEMA_VERSION}: install its version"
        )
    for step in range(version, SCHEMA_VERSION):
        db.execute("BEGIN IMMEDIATE")
        for statement in _FORWARD[step]:
            db.execute(statement)
        put(db, "schema_version", step + 1)
        db.execute("COMMIT")


def _refuse_to_mix(db: sqlite3.Connection, path: Path, owner: str, agent_id: AgentId) -> None:
    (waiting,) = db.execute("SELECT count(*) FROM batch").fetchone()
    if waiting:
        raise SpoolError(
            f"{path} holds {waiting} undelivered batches of agent {owner}, this one is {agent_id}."
            f" Enrol again as that agent (weighbridge-collector token create --agent-id {owner}),"
            f" or move the file away after `weighbridge-agent spool export`"
        )
    raise SpoolCorrupt(f"{path} belongs to agent {owner}")


def _replace(path: Path, agent_id: AgentId, now_unix_ns: int) -> Path:
    """Set a damaged spool aside and put a new one into its place; returns the name it is kept under."""
    aside = _second_name(path)
    if aside is None:
        aside = _new_name(path, now_unix_ns)
        os.link(path, aside)
        sync_directory(path.parent)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    _create(path, agent_id, now_unix_ns, [_lost(aside, now_unix_ns)])
    return aside


def _second_name(path: Path) -> Path | None:
    """The name under which the file at `path` is already kept, if a kill came before it was replaced."""
    return next((aside for aside in _set_aside(path) if aside.samefile(path)), None)


def _new_name(path: Path, now_unix_ns: int) -> Path:
    earlier = _set_aside(path)
    if len(earlier) >= MAX_SET_ASIDE:
        raise SpoolError(
            f"{len(earlier)} damaged spools lie in {path.parent} already: check the disk, move them away, start again"
        )
    return path.parent / f"spool.corrupt-{now_unix_ns}.db"


def _set_aside(path: Path) -> list[Path]:
    return sorted(path.parent.glob("spool.corrupt-*.db"))


def _lost(aside: Path, now_unix_ns: int) -> Gap:
    """What a damaged spool held and nobody has: from its oldest batch on if that can be read, else from the
    last write to it.
    """
    since = min(aside.stat().st_mtime_ns, now_unix_ns)
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{aside}?mode=ro", uri=True)) as db,
    ):
        (oldest,) = db.execute(
            "SELECT min(coalesce(interval_start_unix_ns, interval_end_unix_ns)) FROM batch"
        ).fetchone()
        if isinstance(oldest, int):
            since = min(since, max(0, oldest))
    return Gap(since, now_unix_ns, int(pb.GAP_REASON_SPOOL_LOST), 0, f"damaged spool kept as {aside.name}")
