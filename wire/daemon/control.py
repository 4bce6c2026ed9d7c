"""Questions to a running daemon through its control socket, of its own commands. Loads next to nothing."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

MAX_ANSWER_BYTES = 64 << 20
TIMEOUT_SECONDS = 10.0
"""For a request to come, and for its answer unless somebody says that it may take longer."""


class ControlError(Exception):
    """The socket cannot be opened or asked; the message names the fix."""


class NotRunning(ControlError):
    """Nobody listens there."""


def ask(path: Path, request: dict[str, Any], answer_seconds: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """One question to a running daemon, which may take `answer_seconds`. NotRunning when nobody is there to answer,
    ControlError when it does not, or with the words of its refusal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_SECONDS)
        try:
            connection.connect(os.fspath(path))
            connection.settimeout(answer_seconds)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as file:
                line = file.readline(MAX_ANSWER_BYTES)
        except OSError as error:
            nobody = isinstance(error, (FileNotFoundError, ConnectionRefusedError))
            raise (NotRunning if nobody else ControlError)(
                f"{path}: {error.strerror or error}; is the daemon running, and may this user ask it?"
                " (name its settings with --config)"
            ) from error
    try:
        answer = json.loads(line)
    except ValueError:
        raise ControlError(f"{path}: no answer; look at the daemon's journal") from None
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return dict(answer)
