"""The guest's end of the rig: does what the host asks over one virtio port, one request after another.

Both ways frames: kind (1 byte), length (4 bytes, big-endian), payload.

    host -> guest   J  a request as JSON: {"do": "run" | "put" | "get", "now": unix seconds, ...}
                    (put: the tar stream is at the beginning of the disk `freight`)
    guest -> host   R  ready, JSON facts of the boot        O, S  a piece of standard output, standard error
                    D  a piece of a tar stream (get)        X  end of the request, JSON {"code": exit status}
"""

import contextlib
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
TIMED_OUT = 124
OWN_CGROUP = Path("/sys/fs/cgroup/system.slice/weighbridge-rig.service")
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
    """A shell command in a cgroup of its own, so that its end is the end of all it started. A transient unit would do
    the same; but asking systemd for one takes an emulated machine longer than most commands."""
    group = OWN_CGROUP / f"command-{time.monotonic_ns()}"
    group.mkdir()

    def enter() -> None:
        (group / "cgroup.procs").write_text("0")
        Path("/proc/self/oom_score_adj").write_text("0")

    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", request["command"]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/root",
        # Its own and no more: where there is an invocation id podman takes itself for a service, and keeps its monitor
        # of a container here, where it would end.
        env={**ENVIRONMENT, **request["environment"]},
        preexec_fn=enter,
        # SIGPIPE stays ignored, as in a service: under `pipefail`, what `grep -q` has heard enough of has not failed.
        restore_signals=False,
        start_new_session=True,
    ) as process:
        in_time = _pass_on(port, process, group, request["seconds"])
    _remove(group)
    if not in_time:
        return TIMED_OUT
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _pass_on(port: Port, process: subprocess.Popen[bytes], group: Path, seconds: float) -> bool:
    """What is printed, until the command has ended and with it all in its group. False: that was because its time was up."""
    assert process.stdout
    assert process.stderr
    kinds = {process.stdout.fileno(): b"O", process.stderr.fileno(): b"S"}
    ended, deadline = os.pidfd_open(process.pid), time.monotonic() + seconds
    runs = in_time = True
    while kinds or runs:
        watched = [*kinds, ended] if runs else list(kinds)
        ready = select.select(watched, [], [], max(0.0, deadline - time.monotonic()) if runs else None)[0]
        if runs and (ended in ready or time.monotonic() >= deadline):
            runs, in_time = False, ended in ready
            (group / "cgroup.kill").write_text("1")
        for fd in kinds.keys() & ready:
            if piece := os.read(fd, PIECE):
                port.send(kinds[fd], piece)
            else:
                del kinds[fd]
    os.close(ended)
    return in_time


def _remove(group: Path) -> None:
    """What was killed leaves a moment later."""
    for _ in range(200):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.02)


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
