"""The guest's end of the rig: does what the host asks over one virtio port, one request after another.

Both ways frames: kind (1 byte), length (4 bytes, big-endian), payload.

    host -> guest   J  a request as JSON: {"do": "run" | "put" | "get", "now": unix seconds, ...}
                    (put: the tar stream is at the beginning of the disk `freight`)
    guest -> host   R  ready, JSON facts of the boot        O, S  a piece of standard output, standard error
                    D  a piece of a tar stream (get)        X  end of the request, JSON {"code": exit status}
"""

import json
import os
import select
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

HEADER = struct.Struct(">cI")
PIECE = 1 << 16
PORT_NAME = "weighbridge"
FREIGHT = "/dev/disk/by-id/virtio-freight"
FREIGHT_BLOCK_BYTES = 1 << 20
TAR_FILES_CHANGED = 1
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}


class Port:
    """Frames over the virtio port."""

    def __init__(self) -> None:
        self._fd = os.open(_device(), os.O_RDWR)

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        data = memoryview(HEADER.pack(kind, len(payload)) + payload)
        while data:
            data = data[os.write(self._fd, data) :]

    def say(self, kind: bytes, value: dict[str, Any]) -> None:
        self.send(kind, json.dumps(value).encode())

    def receive(self) -> tuple[bytes, bytes]:
        kind, length = HEADER.unpack(self._exactly(HEADER.size))
        return kind, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        pieces = []
        while count:
            piece = os.read(self._fd, min(count, PIECE))
            if not piece:
                time.sleep(0.05)  # the host's end is closed; it will be opened again after a restore
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)


def _device() -> str:
    for _ in range(600):
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            device = Path("/dev", name.parent.name)
            if name.read_text().strip() == PORT_NAME and device.exists():
                return str(device)
        time.sleep(0.1)
    raise SystemExit("no virtio port named " + PORT_NAME)


def run(port: Port, request: dict[str, Any]) -> int:
    """A shell command in a transient unit of its own, so that its end is the end of all it started."""
    unit = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--service-type=exec"]
    unit += ["--property=TimeoutStopSec=5s", "--working-directory=/root"]
    unit += [f"--setenv={name}={value}" for name, value in {**ENVIRONMENT, **request["environment"]}.items()]
    # As from a person's shell: where there is an invocation id podman takes itself for a service, and keeps its
    # monitor of a container in the unit that is about to end.
    command = ["env", "--unset=INVOCATION_ID", "timeout", "--kill-after=5", str(request["seconds"])]
    command += ["bash", "-euo", "pipefail", "-c", request["command"]]
    with subprocess.Popen(
        [*unit, "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        kinds = {process.stdout.fileno(): b"O", process.stderr.fileno(): b"S"}
        while kinds:
            for fd in select.select(list(kinds), [], [])[0]:
                piece = os.read(fd, PIECE)
                if piece:
                    port.send(kinds[fd], piece)
                else:
                    del kinds[fd]
    return process.returncode


def put(port: Port, request: dict[str, Any]) -> int:
    """Unpack what the host has written to the disk, below a directory. Past the cache: it may have another disk's blocks."""
    Path(request["directory"]).mkdir(parents=True, exist_ok=True)
    blocks = -(-request["bytes"] // FREIGHT_BLOCK_BYTES)
    read = [
        "dd",
        f"if={FREIGHT}",
        "iflag=direct",
        f"bs={FREIGHT_BLOCK_BYTES}",
        f"count={blocks}",
        "status=none",
    ]
    with subprocess.Popen(read, stdout=subprocess.PIPE) as disk:
        tar = ["tar", "-x", "--no-same-owner", "-C", request["directory"]]
        done = subprocess.run(tar, stdin=disk.stdout, check=False)
    return done.returncode


def get(port: Port, request: dict[str, Any]) -> int:
    """Pack one file or directory. Files that are written to meanwhile are as long as they were when tar came to them."""
    path = Path(request["path"])
    with subprocess.Popen(["tar", "-c", "-C", path.parent, path.name], stdout=subprocess.PIPE) as process:
        assert process.stdout
        while piece := process.stdout.read(PIECE):
            port.send(b"D", piece)
    return 0 if process.returncode == TAR_FILES_CHANGED else process.returncode


def main() -> None:
    port = Port()
    state = subprocess.run(["systemctl", "is-system-running", "--wait"], capture_output=True, text=True)
    port.say(b"R", {"state": state.stdout.strip(), "kernel": os.uname().release})
    do = {"run": run, "put": put, "get": get}
    while True:
        _, payload = port.receive()
        request = json.loads(payload)
        # A restored machine wakes at the time of its snapshot.
        time.clock_settime(time.CLOCK_REALTIME, request["now"])
        port.say(b"X", {"code": do[request["do"]](port, request)})


if __name__ == "__main__":
    main()
