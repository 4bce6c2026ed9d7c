"""Engine bcc's helper of this checkout, for tests: against the headers of the running kernel where the distribution has them.

Where it has not, the helper runs in a mount namespace of its own, in which other headers stand in their place, and is told to
accept them: it reads no struct of the kernel, so they need only compile.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.probe_set import LOADER, ProbeSet

HELPER = LOADER.parent.parent / "bcc"
MODULES = Path("/lib/modules")
READY_SECONDS = 60.0


def missing() -> str | None:
    """What the distribution has not installed, for a test to say."""
    have_bcc = subprocess.run(["/usr/bin/python3", "-c", "from bcc import BPF"], capture_output=True)
    if have_bcc.returncode:
        return "python3-bpfcc"
    return None if _any_headers() else "linux-headers of any kernel"


class Helper:
    """A running helper that has said READY."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path, notified: list[str]) -> None:
        self.process = process
        self._said = said
        self.notified = notified

    @property
    def said(self) -> str:
        return self._said.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(10)


def command(
    probes: ProbeSet,
    *arguments: str,
    do: str = "load",
    before: Sequence[str] = (),
    prefix: Sequence[str] = (),
) -> list[str]:
    """The loader with engine bcc, as a command; after the shell commands `before` in a mount namespace of its own."""
    make_mount_point(probes)
    words = [
        *prefix,
        str(LOADER),
        do,
        *("--engine", "bcc", "--bcc-helper", str(HELPER)),
        *("--directory", str(probes.directory), "--group", probes.group),
        *arguments,
    ]
    script = "\n".join(["set -e", *before, 'exec "$@"'])
    return ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script, "sh", *words]


def make_mount_point(probes: ProbeSet) -> None:
    """Outside of any namespace, for others to see what is pinned there."""
    probes.directory.mkdir(exist_ok=True)
    if not os.path.ismount(probes.directory):
        subprocess.run(["mount", "-t", "bpf", "bpf", str(probes.directory)], check=True)


def headers_in_place(release: str = "") -> list[str]:
    """Shell commands that put headers where those of the running kernel are looked for: those of `release` in name
    only, or what there is.
    """
    running = MODULES / platform.release()
    hide = [f"mount -t tmpfs tmpfs {MODULES}", f"mkdir {running}"]
    if release:
        generated = running / "build" / "include" / "generated"
        line = shlex.quote(f'#define UTS_RELEASE "{release}"')
        return [*hide, f"mkdir -p {generated}", f"echo {line} > {generated / 'utsrelease.h'}"]
    if (running / "build").exists():
        return []
    other = _any_headers()
    assert other is not None
    return hide + [
        f"ln -s {part.resolve()} {running / part.name}"
        for part in (other / "build", other / "source")
        if part.exists()
    ]


@contextlib.contextmanager
def helper(
    probes: ProbeSet, *arguments: str, do: str = "load", prefix: Sequence[str] = ()
) -> Iterator[Helper]:
    """Running and ready; ended afterwards, if it still runs."""
    before = headers_in_place()
    if before:
        arguments = (*arguments, "--for-tests-only-accept-foreign-headers")
    words = command(probes, *arguments, do=do, before=before, prefix=prefix)
    said = probes.directory.parent / "helper.log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, said.open("wb") as log:
        told.bind(f"\0weighbridge-test-{os.getpid()}-{id(told)}")
        told.settimeout(0.2)
        address = "@" + told.getsockname()[1:].decode()
        process = subprocess.Popen(words, stderr=log, env={**os.environ, "NOTIFY_SOCKET": address})
        try:
            notified = _until_ready(told, process, said)
            yield Helper(process, said, notified)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _until_ready(told: socket.socket, process: subprocess.Popen[bytes], said: Path) -> list[str]:
    for _ in range(int(READY_SECONDS / 0.2)):
        with contextlib.suppress(TimeoutError):
            return told.recv(4_096).decode().splitlines()
        if process.poll() is not None:
            break
    raise RuntimeError(f"the helper is not ready: {said.read_text()}")


def _any_headers() -> Path | None:
    found = sorted(MODULES.glob("*/build/include/generated/utsrelease.h"))
    return found[-1].parent.parent.parent.parent if found else None
