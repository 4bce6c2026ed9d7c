"""The control socket: one JSON request a line, one JSON answer a line, for the daemon's own commands (`control`).

Who may open it is decided by the file's mode (0660) and its directory; requests and answers are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from wire.daemon.control import TIMEOUT_SECONDS, ControlError

MAX_REQUEST_BYTES = 64 << 10
MAX_CONNECTIONS = 16
CLOSE_SECONDS = 0.5

_UCRED = struct.Struct("3i")
"""pid, uid, gid."""

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Of a request, with the asking process's user as `peer_uid`."""


class ControlSocket:
    """Serves on the running event loop until `close`. `answer_seconds`: how long an answer may take."""

    def __init__(
        self,
        path: Path,
        answer: Answer,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        answer_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._path = path
        self._answer = answer
        self._max_request_bytes = max_request_bytes
        self._answer_seconds = answer_seconds
        self._server: asyncio.Server | None = None
        self._open = 0
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            # Whoever holds the daemon's state lock owns this name: what lies here is a leftover.
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            self._server = await asyncio.start_unix_server(
                self._serve, self._path, limit=self._max_request_bytes, backlog=MAX_CONNECTIONS
            )
            self._path.chmod(0o660)
        except OSError as error:
            raise ControlError(
                f"control socket {self._path}: {error.strerror or error}; set `run_dir` to a directory this user may write"
            ) from error

    async def close(self) -> None:
        """Whoever has asked and can be answered at once, is."""
        if self._server is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(OSError):
                self._path.unlink()
        if self._serving:
            await asyncio.wait(self._serving, timeout=CLOSE_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            if self._open > MAX_CONNECTIONS:
                return
            async with asyncio.timeout(TIMEOUT_SECONDS):
                request = json.loads(await reader.readline())
            if not isinstance(request, dict):
                raise ValueError("a request is one JSON object")  # noqa: TRY004 - a wrong request
            request["peer_uid"] = _peer_uid(writer)
            async with asyncio.timeout(self._answer_seconds):
                try:
                    answer = await self._answer(request)
                except Exception as error:  # noqa: BLE001 - one bad question must not end the daemon
                    answer = {"error": f"{type(error).__name__}: {error}"}
            async with asyncio.timeout(TIMEOUT_SECONDS):
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ValueError, RecursionError, OSError, TimeoutError):
            pass  # Whoever asks nonsense, or goes away, gets no answer.
        finally:
            self._open -= 1
            self._serving.discard(task)
            writer.close()


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    """Who asks, by the kernel's word: unix(7), SO_PEERCRED."""
    peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(peer)
    return int(uid)
