"""A real redis-server of our own: below one directory, on a socket of its own, ended by its pid."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

from bench.ports import free_port


class RedisServer:
    """Keeps nothing on disk, so a restart has lost all. `cluster`: one node that owns every slot."""

    def __init__(self, directory: Path, cluster: bool = False) -> None:
        self.directory = directory
        self._cluster = cluster
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port() if cluster else 0
        """A cluster's nodes know one another by ports; else only the socket is open."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}" if self._cluster else f"unix://{self._socket}"

    @property
    def _socket(self) -> Path:
        return self.directory / "redis.sock"

    def start(self, seconds: float = 20.0) -> None:
        """Start and wait until it answers."""
        assert self.process is None
        self.directory.mkdir(parents=True, exist_ok=True)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir"]
        command += [str(self.directory), "--unixsocket", str(self._socket), "--loglevel", "warning"]
        if self._cluster:
            command += ["--cluster-enabled", "yes"]
        with (self.directory / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + seconds
        while self.command("PING") != "PONG":
            assert self.process.poll() is None, (self.directory / "redis.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if self._cluster:
            self.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            while "cluster_state:ok" not in self.command("CLUSTER", "INFO"):
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def command(self, *words: str) -> str:
        """What redis-cli answers."""
        done = subprocess.run(
            ["redis-cli", "-s", str(self._socket), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        return done.stdout.strip()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def installed() -> bool:
    return shutil.which("redis-server") is not None
