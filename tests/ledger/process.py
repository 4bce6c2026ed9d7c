"""The ledger as a process of its own: around a fake of its core, for those who only look at it from outside, or the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.waiting import until


class LedgerProcess:
    """Started by `with`, killed at its end; all it has lies below `directory`. `log`: read with the real core."""

    def __init__(self, directory: Path, log: Path | None = None) -> None:
        directory.mkdir()
        self.module = "tests.ledger.fake_books" if log is None else "ledger"
        self.state = directory / "state"
        self.file = directory / "ledger.yaml"
        self.journal = directory / "journal"
        settings = {"state_dir": str(self.state), "local_port": {"port": 0}}
        source = {} if log is None else {"source": {"log_directory": str(log)}}
        self.file.write_text(json.dumps(settings | source))
        self.state.mkdir()

    def __enter__(self) -> Self:
        (self.state / "endpoints.json").unlink(missing_ok=True)
        with self.journal.open("ab") as journal:
            self.process = subprocess.Popen(self._words("run"), stderr=journal)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of it to its end."""
        return subprocess.run(self._words(*words), capture_output=True, text=True, timeout=60, check=False)

    def _words(self, *words: str) -> list[str]:
        return [sys.executable, "-m", self.module, "--config", str(self.file), *words]

    @property
    def port(self) -> int:
        """Its local port, as soon as it is open."""
        endpoints = self.state / "endpoints.json"
        until(lambda: endpoints.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.journal.read_text()
        return int(json.loads(endpoints.read_bytes())["local"])
