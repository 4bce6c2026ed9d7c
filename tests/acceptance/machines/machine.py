"""A running machine as a test sees it: run a command, put files in, get files out."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from tests.acceptance.machines.qemu import FREIGHT_BYTES, MachineError, Qemu

HEADER = struct.Struct(">cI")
PIECE = 1 << 16
GRACE_SECONDS = 60
"""How much longer than the guest the host waits: the guest ends what is late by itself."""
MAX_OUTPUT_BYTES = 64 << 20


class CommandFailed(Exception):
    """A command in the machine ended with something else than 0."""


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    output: str
    errors: str


class Machine:
    """One request at a time. See guest/serve.py for what goes over the port."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu

    def run(
        self,
        command: str,
        *,
        seconds: int = 120,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> Done:
        """A bash command (-e, -u, pipefail) as root, in a cgroup of its own: what it starts ends with it,
        unless it is started by systemd. 124 is the exit status of what took longer than `seconds`."""
        request = {"command": command, "seconds": seconds, "environment": dict(environment or {})}
        said: dict[bytes, list[bytes]] = {b"O": [], b"S": []}
        code = self._request("run", request, seconds, said)
        done = Done(code, *(b"".join(said[kind]).decode(errors="replace") for kind in (b"O", b"S")))
        if check and code != 0:
            raise CommandFailed(
                f"exit status {code} of: {command}\n{done.output[-4_000:]}\n{done.errors[-4_000:]}"
            )
        return done

    def put(self, source: Path, target: str, *, seconds: int = 120) -> None:
        """A file, or a directory with all in it, to the absolute path `target`, owned by root."""
        to = PurePosixPath(target)
        with self._qemu.freight.open("r+b") as disk:
            with tarfile.open(fileobj=disk, mode="w", format=tarfile.GNU_FORMAT) as tar:
                tar.add(source, arcname=to.name)
            size = disk.tell()
        if size > FREIGHT_BYTES:
            raise MachineError(f"{source} has {size} bytes, and the disk that carries it {FREIGHT_BYTES}")
        request = {"directory": str(to.parent), "bytes": size}
        if self._request("put", request, seconds, {}) != 0:
            raise CommandFailed(f"could not put {source} to {target}")

    def get(self, source: str, directory: Path, *, seconds: int = 120) -> Path:
        """A file or directory of the machine into `directory`; returns where it lies."""
        pieces: dict[bytes, list[bytes]] = {b"D": []}
        if self._request("get", {"path": source}, seconds, pieces) != 0:
            raise CommandFailed(f"could not get {source} out of the machine")
        with tarfile.open(fileobj=io.BytesIO(b"".join(pieces[b"D"]))) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python has it from 3.11.4 on
            tar.extractall(directory)
        return directory / PurePosixPath(source).name

    def read(self, path: str) -> str:
        """The text of a file in the machine."""
        return self.run(f"cat '{path}'").output

    def wait_ready(self, seconds: float) -> dict[str, Any]:
        """Until a cold boot has ended; the guest's own words on it."""
        kind, payload = self._frame(time.monotonic() + seconds)
        if kind != b"R":
            raise MachineError(f"the guest said {kind!r} before it was ready")
        return cast("dict[str, Any]", json.loads(payload))

    def reboot(self, how: str = "systemctl reboot", *, seconds: float = 300) -> None:
        """Restart it and wait until it is up. `how`: the command; what it prints, if anything, is lost."""
        self._qemu.ask("set-action", reboot="reset")
        request = {"do": "run", "command": how, "seconds": 60, "environment": {}}
        self._send(b"J", _json(request), seconds)
        deadline = time.monotonic() + seconds
        while self._frame(deadline)[0] != b"R":
            pass

    def _request(
        self, do: str, request: dict[str, Any], seconds: float, keep: dict[bytes, list[bytes]]
    ) -> int:
        self._send(b"J", _json({"do": do, **request}), seconds)
        return self._answer(seconds, keep)

    def _answer(self, seconds: float, keep: dict[bytes, list[bytes]]) -> int:
        deadline = time.monotonic() + seconds + GRACE_SECONDS
        kept = 0
        while True:
            kind, payload = self._frame(deadline)
            if kind == b"X":
                return int(json.loads(payload)["code"])
            kept += len(payload)
            if kept > MAX_OUTPUT_BYTES:
                raise MachineError(f"more than {MAX_OUTPUT_BYTES} bytes came out of the machine")
            keep[kind].append(payload)

    def _frame(self, deadline: float) -> tuple[bytes, bytes]:
        kind, length = HEADER.unpack(b"".join(self._exactly(HEADER.size, deadline)))
        return kind, b"".join(self._exactly(length, deadline))

    def _exactly(self, count: int, deadline: float) -> Iterator[bytes]:
        port = self._qemu.port
        while count:
            port.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                piece = port.recv(min(count, PIECE))
            except TimeoutError:
                raise MachineError(f"no answer from the guest in time: {self._qemu.last_words()}") from None
            if not piece:
                raise MachineError(f"the machine has gone: {self._qemu.last_words()}")
            count -= len(piece)
            yield piece

    def _send(self, kind: bytes, payload: bytes, seconds: float) -> None:
        self._qemu.port.settimeout(seconds + GRACE_SECONDS)
        try:
            self._qemu.port.sendall(HEADER.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise MachineError(f"the guest takes nothing: {self._qemu.last_words()}") from error


def _json(request: dict[str, Any]) -> bytes:
    return json.dumps({**request, "now": time.time()}).encode()
