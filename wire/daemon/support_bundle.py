"""A support bundle: one tar.gz of what somebody far away needs to understand an installation, and nothing else.

Each part is made by itself: one that fails says so in its place, and the others are there. Everything is text, bounded, and
goes through the scrubber. The file is made anew, readable for its owner only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import stat
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from wire.daemon.redaction import Scrubber

MAX_PART_BYTES = 4 << 20
MAX_FILES_LISTED = 2_000
JOURNAL_LINES = 2_000
COMMAND_SECONDS = 20.0
HTTP_SECONDS = 5.0
_UNIT_PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,Result,ExecMainStatus,NRestarts,StatusText,ActiveEnterTimestamp,"
    "MemoryCurrent,MemoryPeak,CPUUsageNSec,TasksCurrent,LimitNOFILE,User,Group"
)
"""Not Environment: what a unit is given may be a secret."""

Part = tuple[str, Callable[[], str]]
"""File name, and what makes its content."""


class BundleError(Exception):
    """The file cannot be made; the message names the fix."""


def write(file: Path, parts: Iterable[Part], scrubber: Scrubber) -> list[str]:
    """Make the bundle; returns the names in it. A bundle that could not be finished is not left behind."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BundleError(f"{file}: {error.strerror}; name a new file with --output") from error
    names = []
    try:
        with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as tar:
            for name, make in parts:
                _add(tar, f"{file.name.removesuffix('.tar.gz')}/{name}", scrubber.text(_made(make)))
                names.append(name)
    except BaseException as error:
        with contextlib.suppress(OSError):
            file.unlink()
        if isinstance(error, OSError):
            raise BundleError(f"{file}: {error.strerror}; name a place with room with --output") from error
        raise
    return names


def _made(make: Callable[[], str]) -> str:
    try:
        text = make()
    except Exception as error:  # noqa: BLE001 - a part that cannot be had is itself a finding
        return f"could not be had: {type(error).__name__}: {error}\n"
    return text if len(text) <= MAX_PART_BYTES else f"[only the end]\n{text[-MAX_PART_BYTES:]}"


def _add(tar: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode(errors="backslashreplace")
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
    tar.addfile(entry, io.BytesIO(data))


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, default=str) + "\n"


def versions(program: str, version: str) -> str:
    """This program, what it runs on, and its libraries."""
    release = Path("/etc/os-release")
    libraries = {}
    for name in (
        "cryptography",
        "grpcio",
        "msgspec",
        "protobuf",
        "pyyaml",
        "confluent-kafka",
        "redis",
        "chdb-core",
        "clickhouse-connect",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            libraries[name] = metadata.version(name)
    return as_json(
        {
            program: version,
            "python": platform.python_version(),
            "libraries": libraries,
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "distribution": release.read_text().splitlines() if release.exists() else [],
            "cpus": os.cpu_count(),
            "now": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "user_id": os.geteuid(),
            # Names only: what a proxy's URL holds is nobody's business, that there is one is.
            "environment": sorted(
                n for n in os.environ if n.lower().endswith("_proxy") or n.startswith("GRPC_")
            ),
        }
    )


def units(*names: str) -> str:
    """What systemd knows of our own units."""
    return command("systemctl", "show", "--no-pager", "--property", _UNIT_PROPERTIES, *names)


def journal(file: Path | None, *names: str) -> str:
    """The last lines of our own units; of `file` where the daemon's standard error goes to one."""
    if file is not None:
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - MAX_PART_BYTES))
            return "\n".join(handle.read().decode(errors="replace").splitlines()[-JOURNAL_LINES:]) + "\n"
    chosen = [word for name in names for word in ("--unit", name)]
    return command("journalctl", "--no-pager", "--output=short-iso", "--lines", str(JOURNAL_LINES), *chosen)


def command(*words: str) -> str:
    """What a command says, or that it cannot be asked."""
    path = shutil.which(words[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        return f"{words[0]} is not installed\n"
    done = subprocess.run(  # noqa: S603 - our own words, no shell
        [path, *words[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=COMMAND_SECONDS,
        check=False,
    )
    return f"{done.stdout}{done.stderr}" + (f"exit code {done.returncode}\n" if done.returncode else "")


def page(address: str, port: int, path: str) -> str:
    """A page of the local port; a refusal (503) has a body, too."""
    host = address.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - asked, not bound
    url = f"http://[{host}]:{port}{path}" if ":" in host else f"http://{host}:{port}{path}"
    # Straight there, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=HTTP_SECONDS) as answer:
            return str(answer.read(MAX_PART_BYTES).decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return f"status {error.code}\n{error.read(MAX_PART_BYTES).decode(errors='replace')}"


def without_usage(metrics: str, families: tuple[str, ...]) -> str:
    """Metrics without the series that tell how much anybody used."""
    return "".join(line for line in metrics.splitlines(keepends=True) if not line.startswith(families))


def files(*directories: Path) -> str:
    """Names, sizes, modes and ages of what lies there; never a content. Each is listed once."""
    tops = [d for d in directories if not any(d.is_relative_to(other) for other in directories if other != d)]
    return "\n".join(line for directory in tops for line in _listed(directory)) + "\n"


def _listed(directory: Path) -> Iterator[str]:
    disk = shutil.disk_usage(directory) if directory.exists() else None
    free = "is not there" if disk is None else f"{disk.free >> 20} of {disk.total >> 20} MiB free"
    yield f"{directory}: {free}"
    found = sorted(directory.rglob("*"))
    for path in found[:MAX_FILES_LISTED]:
        try:
            status = path.lstat()
        except OSError as error:
            yield f"  {path.name}: {error.strerror}"
            continue
        changed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(status.st_mtime))
        yield (
            f"  {stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid} {status.st_size:>12} {changed}"
            f" {path.relative_to(directory)}"
        )
    if len(found) > MAX_FILES_LISTED:
        yield f"  and {len(found) - MAX_FILES_LISTED} more"
