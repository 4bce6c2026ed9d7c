"""JSON lines on standard error, one per change of state; systemd's journal keeps them.

ASCII only, so that nothing hostile in a container's name reaches a terminal raw; bounded, so that nothing
floods; never raises, so that logging cannot stop metering.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from datetime import UTC, datetime

MAX_VALUE_CHARACTERS = 1_024
MAX_LINE_CHARACTERS = 16_384
MAX_DEPTH = 5
BURST = 20
"""Lines of one event in `BURST_SECONDS`; the rest is counted and said once."""
BURST_SECONDS = 10.0

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3}
_lock = threading.Lock()


class _State:
    threshold = 20
    priority_prefix = False


def configure(level: str) -> None:
    """Set the lowest level written (debug, info, warning, error) and route library logging here."""
    _State.threshold = _LEVELS[level]
    _State.priority_prefix = _stderr_is_journal()
    root = logging.getLogger()
    root.handlers = [_Bridge()]
    root.setLevel(logging.WARNING)


class Journal:
    """The events of one part of a daemon, named like its module: `Journal("agent.ship")`."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._recent: dict[str, tuple[float, int]] = {}

    def debug(self, event: str, **fields: object) -> None:
        self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, object]) -> None:
        if _LEVELS[level] < _State.threshold:
            return
        now = time.monotonic()
        since, count = self._recent.get(event, (now, 0))
        if now - since > BURST_SECONDS:
            if count > BURST:
                fields = {**fields, "suppressed": count - BURST}
            since, count = now, 0
        self._recent[event] = (since, count + 1)
        if len(self._recent) > 1_000:
            self._recent.clear()
        if count >= BURST:
            return
        line: dict[str, object] = {
            "ts": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": level,
            "part": self._part,
            "event": event,
        }
        for key, value in fields.items():
            line[key if key not in line else f"{key}_"] = _bounded(value)
        text = _json(line)
        if len(text) > MAX_LINE_CHARACTERS:
            text = _json({k: line[k] for k in ("ts", "level", "part", "event")} | {"cut": len(text)})
        prefix = f"<{_PRIORITY[level]}>" if _State.priority_prefix else ""
        with _lock, contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), f"{prefix}{text}\n".encode("ascii"))


def _json(line: dict[str, object]) -> str:
    """DEL is the one control character that JSON's ASCII form leaves as it is."""
    return json.dumps(line).replace("\x7f", "\\u007f")


def _bounded(value: object, depth: int = 0) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # Beyond 4300 digits Python refuses to write an int.
        return value if -(1 << 64) < value < 1 << 64 else _text(value)
    if depth > MAX_DEPTH:
        return "..."
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, BaseException):
        chain: list[dict[str, object]] = []
        error: BaseException | None = value
        while error is not None and len(chain) < 5:
            chain.append({"type": type(error).__name__, "message": _text(error)})
            error = error.__cause__ or error.__context__
        return chain[0] if len(chain) == 1 else {**chain[0], "because": chain[1:]}
    if isinstance(value, (list, tuple)):
        return [_bounded(item, depth + 1) for item in value[:50]]
    if isinstance(value, dict):
        return {_text(k): _bounded(v, depth + 1) for k, v in list(value.items())[:50]}
    return _text(value)


def _text(value: object) -> str:
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception:  # noqa: BLE001 - a value that cannot say what it is must not stop the daemon
        text = f"<{type(value).__name__}>"
    return text[:MAX_VALUE_CHARACTERS]


class _Bridge(logging.Handler):
    """Warnings of libraries, as events of the part that bears the logger's name."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._journal = Journal("library")

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        with contextlib.suppress(Exception):
            self._journal.warning(
                "library_warning", logger=record.name, text=record.getMessage(), error=error
            )


def _stderr_is_journal() -> bool:
    """systemd.exec(5), $JOURNAL_STREAM: the device and inode of the stream if it is the journal's."""
    try:
        device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
        stat = os.fstat(sys.stderr.fileno())
        return (stat.st_dev, stat.st_ino) == (int(device), int(inode))
    except (OSError, ValueError, AttributeError):
        return False
