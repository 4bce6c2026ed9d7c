"""`./dev bench ledger`: what the ledger costs, as a real process on the log of a collector.

rows_per_cpu_s_booked_10rows    rows from the log into the table, in batches of 10 rows, per second of the ledger's CPU:
rows_per_cpu_s_booked_100rows   read, verified, digested, decoded, validated, compared with what is booked, synced to the disk
rows_per_cpu_s_rolled_up        rows added up into minutes and hours, those batches of 100
ms_usage_month                  a question: what every tenant used in a month, by tenant; median
rss_mib                         resident memory after that
bytes_per_row                   on disk, of table `batches`, 100 rows a batch
ratio_to_plain_insert           rows_per_cpu_s_booked_100rows / the same bytes through ClickHouse's own
                                `INSERT ... SELECT ... FROM file(Protobuf) ARRAY JOIN`, with a view by tenant and hour beside it:
                                no log, no digest, no validation, no duplicates, no names but the container's, nothing synced

Values are random below 2**30 in 13 measures, so they compress worse than most; names are those of containers. The month has
one interval in each hour, so its hours have as many units as rows: the worst there is for the question.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import yaml

from bench.agent import rss_mib
from bench.fleet import SECOND_NS, Stream
from bench.site import Site, SiteError
from collector.handoff.log import DurableLog, Kind, frame
from ledger.store.client import Store
from wire.delimited import delimit
from wire.identity import new_agent_id
from wire.measures import MEASURES
from wire.v1 import ingest_pb2 as pb

AGENTS = 8
TENANTS = 4
HOUR_NS, DAY_NS = 3_600 * SECOND_NS, 86_400 * SECOND_NS
MONTH_START_UNIX_NS = 1_790_812_800 * SECOND_NS
"""2026-10-01."""
MEASURED = MEASURES[:13]
QUESTIONS = 7
MOST_SECONDS = 600.0
"""Of one ledger."""
GROUP = 500
"""Batches that are synced at once."""


class Load(NamedTuple):
    """Batches in a log of their own, not yet where a ledger looks."""

    log: Path
    batches: int
    rows: int
    delimited: Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./dev bench ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the batches: noisier")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    share = 5 if args.quick else 1
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as name:
        result = _measure(Path(name), share, args.json)
    print(json.dumps(result))
    return 0


def _measure(directory: Path, share: int, quiet: bool) -> dict[str, float]:
    ten = make_load(directory / "ten", 20_000 // share, 10, 10 * SECOND_NS)
    hundred = make_load(directory / "hundred", 6_000 // share, 100, 10 * SECOND_NS)
    month = make_load(directory / "month", 31 * 24 * AGENTS // share, 100, 10 * SECOND_NS, HOUR_NS * share)
    plain = plain_insert(hundred, directory / "plain")
    with Bench(directory / "ten.site") as bench:
        booked_10 = bench.book(ten)
    with Bench(directory / "hundred.site") as bench:
        booked_100 = bench.book(hundred)
        rolled_up = bench.roll_up(hundred.rows)
        bytes_per_row = bench.table_bytes() / hundred.rows
    with Bench(directory / "month.site") as bench:
        bench.book(month)
        bench.roll_up(month.rows)
        question_ms = bench.ask_for_the_month()
        resident = rss_mib(bench.pid)
    if not quiet:
        loads = (ten, hundred, month)
        print(
            f"{sum(load.rows for load in loads)} rows in {sum(load.batches for load in loads)} batches of"
            f" {AGENTS} agents and {TENANTS} tenants; plain insert {plain:.0f} rows per CPU-second;"
            f" on {platform.release()}, {os.cpu_count()} CPUs (load {os.getloadavg()[0]:.1f}), Python {platform.python_version()}"
        )
    return {
        "rows_per_cpu_s_booked_10rows": round(booked_10),
        "rows_per_cpu_s_booked_100rows": round(booked_100),
        "rows_per_cpu_s_rolled_up": round(rolled_up),
        "ms_usage_month": round(question_ms, 1),
        "rss_mib": round(resident, 1),
        "bytes_per_row": round(bytes_per_row, 1),
        "ratio_to_plain_insert": round(booked_100 / plain, 3),
    }


def make_load(directory: Path, batches: int, rows: int, interval_ns: int, every_ns: int = 0) -> Load:
    """A collector's log of so many batches, one interval of all agents after the other from the start of the month; they
    follow upon one another, or come every so many nanoseconds."""
    rng = random.Random(batches)
    streams = [
        Stream(
            new_agent_id(), 1, rows, f"tenant-{number % TENANTS}", 0, b"", MONTH_START_UNIX_NS, interval_ns
        )
        for number in range(AGENTS)
    ]
    log = DurableLog(directory, 1 << 40, 0)
    delimited = directory.with_suffix(".delimited")
    with delimited.open("wb") as file:
        for start in range(0, batches, GROUP):
            pieces: list[bytes] = []
            for number in range(start, min(start + GROUP, batches)):
                stream = streams[number % AGENTS]
                item = _next(stream, rng)
                stream.start_unix_ns += max(0, every_ns - interval_ns)
                agent = bytes.fromhex(stream.agent_id.replace("-", ""))
                now = time.time_ns()
                pieces += frame(Kind.ACCEPTED, now, agent, 1, item.seq, item.digest, b"", item.batch)
                file.write(delimit(item.batch))
            if log.append_and_wait(pieces) is None:
                raise OSError("the log could not be written")
    log.close()
    return Load(directory, batches, batches * rows, delimited)


def _next(stream: Stream, rng: random.Random) -> pb.Item:
    batch = stream.message()
    for name in MEASURED:
        column = getattr(batch, name)
        column[:] = [rng.getrandbits(30) for _ in range(stream.rows)]
    return stream.seal(batch)


class Bench:
    """A ledger that runs beside an empty log."""

    def __init__(self, directory: Path) -> None:
        self._site = Site(directory)
        self._settings: dict[str, Any] = {
            "state_dir": str(directory / "ledger"),
            "source": {"log_directory": str(directory / "log")},
            "rollup": {"settle": "100000h", "every": "1h"},
            "local_port": {"port": 0},
            "journal_level": "error",
        }
        (directory / "log").mkdir(parents=True)
        self._directory = directory
        self._end = time.monotonic() + MOST_SECONDS

    def __enter__(self) -> Self:
        self._write_settings()
        self._site.start_ledger()
        try:
            while not (self._directory / "ledger/endpoints.json").exists() or self._opening():
                self._check()
                time.sleep(0.05)
        except BaseException:
            self._site.close()
            raise
        return self

    def _check(self) -> None:
        """Nothing may be wrong but that there is no log yet, nor anything take minutes."""
        ledger, journal = self._site.ledger, self._site.journal("ledger")
        if (
            ledger is None
            or ledger.poll() is not None
            or "failing" in journal
            or time.monotonic() > self._end
        ):
            raise SiteError(f"the ledger is not at work:\n{journal}")

    def _opening(self) -> bool:
        # That there is no log yet is as it should be.
        return "opening" in self._site.ask("ledger", "status")["ready"]

    def __exit__(self, *_: object) -> None:
        self._site.close()

    @property
    def pid(self) -> int:
        assert self._site.ledger is not None
        return self._site.ledger.pid

    def _cpu_seconds(self) -> float:
        """Of all threads, also of those that have ended."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def book(self, load: Load) -> float:
        """Rows per CPU-second."""
        before = self._cpu_seconds()
        for segment in load.log.glob("*.log"):
            segment.rename(self._directory / "log" / segment.name)
        self._until("booked_batches_total", load.batches)
        assert self._metric("booked_rows_total") == load.rows
        return load.rows / (self._cpu_seconds() - before)

    def roll_up(self, rows: int) -> float:
        """Rows per CPU-second, until no hour is left to be added up."""
        self._site.ask("ledger", "usage", start_unix_ns=0, end_unix_ns=1, by="tenant")
        self._settings["rollup"] = {"settle": "0s", "every": "1s"}
        self._write_settings()
        before = self._cpu_seconds()
        self._site.command("ledger", "reload")
        while not self._metric("rollup_built_total") or self._metric("rollup_dirty_hours"):
            self._check()
            time.sleep(0.1)
        return rows / (self._cpu_seconds() - before)

    def ask_for_the_month(self) -> float:
        """Milliseconds, in the median."""
        times = []
        for _ in range(QUESTIONS):
            begun = time.perf_counter()
            end = MONTH_START_UNIX_NS + 31 * DAY_NS
            answer = self._site.ask(
                "ledger", "usage", 120, start_unix_ns=MONTH_START_UNIX_NS, end_unix_ns=end, by="tenant"
            )
            times.append((time.perf_counter() - begun) * 1e3)
            assert len(answer["rows"]) == TENANTS
        return statistics.median(times)

    def table_bytes(self) -> int:
        """Of table `batches`, merged as far as it is by now. The ledger is down afterwards."""
        assert self._site.stop("ledger") == 0, self._site.journal("ledger")
        store = Store(self._directory / "ledger/db", "", "", "weighbridge", 1 << 30)
        with contextlib.closing(store):
            ((size,),) = store.query(
                "SELECT sum(bytes_on_disk) FROM system.parts WHERE active AND database = 'weighbridge' AND table = 'batches'"
            )
        return int(size)

    def _write_settings(self) -> None:
        self._site.ledger_file.write_text(yaml.safe_dump(self._settings))

    def _until(self, metric: str, value: float) -> None:
        while self._metric(metric) < value:
            self._check()
            time.sleep(0.05)

    def _metric(self, name: str) -> float:
        port = json.loads((self._directory / "ledger/endpoints.json").read_text())["local"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                if line.startswith(f"weighbridge_ledger_{name} "):
                    return float(line.split()[1])
        raise KeyError(name)


def plain_insert(load: Load, directory: Path) -> float:
    """Rows per CPU-second of ClickHouse alone, in a process of its own."""
    proto = Path(__file__).parents[1] / "proto/weighbridge/v1/usage.proto"
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers.plain_insert", directory, load.delimited, proto, *MEASURED],
        capture_output=True,
        text=True,
        check=False,
        timeout=MOST_SECONDS,
    )
    if done.returncode:
        sys.exit(done.stderr[-2_000:])
    rate, rows = done.stdout.split()
    assert int(rows) == load.rows
    return float(rate)


if __name__ == "__main__":
    sys.exit(main())
