"""A fake of `ledger.ledger.Ledger` for its edges: answers what a test puts in, and remembers what it was asked.

`python -m tests.ledger.fake_books …` is weighbridge-ledger with it.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import ledger.cli
from ledger.config import Settings
from ledger.desk import By
from ledger.errors import LedgerError
from ledger.tally import Tally

HOSTILE = "ac\x1b[2Jme"
BIG = str(2**70)


class FakeBooks:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.trouble: dict[str, str] = {}
        now = time.time_ns()
        self.tally = Tally(
            agents=12, watermark_unix_ns=now, source_lag={("log", "bytes"): 7}, reconcile_success_unix_ns=now
        )
        self.calls: list[tuple[Any, ...]] = []
        self.blockers: list[dict[str, Any]] = []
        self.lines = [
            {"tenant": HOSTILE, "rows": 3, "cpu_usage_ns": BIG, "memory_byte_seconds": 3_600 << 30},
            {"tenant": "=1+1", "rows": 4, "cpu_usage_ns": None, "memory_byte_seconds": -5},
        ]
        self.threads: set[int] = set()
        self.fail_consume: Exception | None = None
        self.hold = threading.Event()
        """Commands wait for it."""
        self.hold.set()
        self.closed = False

    def _called(self, *call: Any) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append(call)
        if call[0] not in ("consume", "roll_up", "recorded"):
            assert self.hold.wait(30)

    def consume(self, wait_seconds: float) -> int:
        self._called("consume")
        if self.fail_consume is not None:
            raise self.fail_consume
        time.sleep(min(wait_seconds, 0.02))
        return 0

    def roll_up(self) -> int:
        self._called("roll_up")
        return 0

    def take_up(self, settings: Settings) -> None:
        self._called("take_up", settings.rollup.settle)

    def recorded(self) -> Tally:
        return self.tally

    def status(self) -> dict[str, Any]:
        self._called("status")
        return {"agents": 12, "latest_tenant": HOSTILE}

    def reconcile(self) -> dict[str, Any]:
        self._called("reconcile")
        return {"ok": False, "findings": [{"kind": "missing", "text": "a/1/7", "count": 1}]}

    def verify(self) -> dict[str, Any]:
        self._called("verify")
        return {"ok": True, "findings": []}

    def usage(
        self, start_unix_ns: int, end_unix_ns: int, by: By, tenant: str | None, limit: int
    ) -> list[dict[str, Any]]:
        self._called("usage", start_unix_ns, end_unix_ns, by, tenant, limit)
        return self.lines[:limit]

    def periods(self) -> list[dict[str, Any]]:
        return [{"name": "2026-10", "state": "open", "start_unix_ns": 0, "blockers": self.blockers}]

    def close_period(self, name: str, by: str) -> dict[str, Any]:
        self._called("close", name, by)
        if name == "1999-01":
            raise LedgerError("1999-01: no such period; `weighbridge-ledger periods` lists them")
        if self.blockers:
            return {"closed": False, "blockers": self.blockers}
        self.tally.period, self.tally.period_end_unix_ns = "", None
        return {"closed": True, "period": name, "by": by, "digest": "ab12"}

    def waive(self, period: str, blockers: list[str], reason: str, by: str) -> dict[str, Any]:
        self._called("waive", period, blockers, reason, by)
        return {"waived": [{"id": one, "sentence": f"{one} is not here"} for one in blockers]}

    def retire(self, agent_id: str, at_unix_ns: int, reason: str, by: str) -> dict[str, Any]:
        self._called("retire", agent_id, at_unix_ns, reason, by)
        return {"retired": agent_id}

    def manifest(self, name: str) -> dict[str, Any]:
        return {"manifest": f'{{"period":"{name}"}}', "digest": "ab12"}

    def export(self, name: str) -> list[dict[str, Any]]:
        self._called("export", name)
        return self.lines

    def reread(self) -> None:
        self._called("reread")

    def close(self) -> None:
        self._called("end")
        self.closed = True


def main() -> int:
    ledger.cli.open_books = FakeBooks  # type: ignore[assignment]
    return ledger.cli.main()


if __name__ == "__main__":
    sys.exit(main())
