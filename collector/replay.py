"""`usage-replay`: send batches again that were exported, or that a log or Kafka has, all of them or those of a time.

They go to the running collector that `--config` names, by the way of `weighbridge-collector import`. Each has its
identity from birth, so a collector that has them answers DUPLICATE, and nothing changes behind it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from collector import config
from collector.errors import CollectorError
from collector.import_commands import Report
from collector.resend.batches import Found, Source
from collector.resend.files import BatchFiles
from collector.resend.log_range import begins_at_unix_ns, extent_of, log_batches
from collector.resend.progress import Progress
from collector.resend.sender import Sender
from collector.timestamps import iso
from wire.daemon.command_line import run_command

_NS = 1_000_000_000


def main() -> int:
    """See `run_command` for the exit codes."""
    return run_command(_parser(), CollectorError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="usage-replay",
        description="Sends batches again, from exports, a log or Kafka, to a running collector; what it has stays as it is.",
    )
    parser.add_argument(
        "--config", type=Path, help=f"settings of the collector to send to (default {config.DEFAULT_FILE})"
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="of `weighbridge-agent spool export`, or JSON lines",
    )
    parser.add_argument(
        "--log",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="DIRECTORY",
        help="a collector's log, or a copy of one; without a name that of the settings",
    )
    parser.add_argument(
        "--kafka",
        action="store_true",
        help="the topics of the settings: what was accepted, parked or rejected",
    )
    parser.add_argument(
        "--from", dest="start", type=_unix_ns, metavar="TIME", help="usage of this time on: 2026-07-01T00:00Z"
    )
    parser.add_argument("--to", dest="stop", type=_unix_ns, metavar="TIME", help="usage before this time")
    parser.add_argument("--tenant", help="only this tenant's")
    parser.add_argument("--agent-id", help="only this agent's")
    parser.add_argument("--rate", type=_rate, metavar="N", help="batches a second at most")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be sent; no collector is asked"
    )
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(handler=_replay)
    return parser


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError("more than 0 batches a second")
    return rate


def _unix_ns(text: str) -> int:
    """ISO 8601; without a zone it is UTC."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write it as 2026-07-01T00:00Z") from None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    since = when - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * _NS + since.microseconds * 1_000


class _Choice(NamedTuple):
    """Which batches are meant; None is any."""

    start: int | None
    stop: int | None
    tenant: str | None
    agent_id: str | None

    def means(self, found: Found) -> bool:
        if found.trouble or self == _Choice(None, None, None, None):
            return True
        return (
            (self.start is None or found.interval_end_unix_ns > self.start)
            and (self.stop is None or 0 < found.interval_start_unix_ns < self.stop)
            and self.tenant in (None, found.tenant)
            and found.identity is not None
            and self.agent_id in (None, found.identity.agent_id)
        )


def _replay(args: argparse.Namespace) -> int:
    settings = config.read(args.config)
    if [args.log is not None, bool(args.files), args.kafka].count(True) != 1:
        raise CollectorError(
            "name FILEs of batches, --log for a collector's log, or --kafka; one of the three"
        )
    sources, total, names = _sources(args, settings)
    report = Report(Progress(total))
    choice = _Choice(args.start, args.stop, args.tenant, args.agent_id)
    chosen = (found for found in sources if choice.means(found))
    if args.dry_run:
        return _say_what_would(chosen, report, args.json)
    sender = Sender(settings.control_socket, "usage-replay", names, report.refused, args.rate)
    done, before = 0, 0
    for found in chosen:
        if found.end < done:
            before += done  # the next file
        done = found.end
        if found.trouble:
            report.refused(found, found.trouble)
        else:
            sender.add(found)
        report.progress.at(before + done, sender.sent)
    sender.close()
    return report.finish(sender, args.json)


def _sources(args: argparse.Namespace, settings: config.Settings) -> tuple[Source, int, list[str]]:
    """What is read, its size (in bytes; of Kafka, in records), and its names."""
    if args.kafka:
        # Where there is no Kafka its client is not needed.
        from collector.resend.kafka_range import KafkaRange

        kafka = KafkaRange(settings, args.start)
        return kafka.batches(), kafka.total, list(kafka.topics)
    if args.log is not None:
        directory = settings.log_directory if args.log == Path() else args.log
        if not directory.is_dir():
            raise CollectorError(f"no log at {directory}: name its directory")
        # What arrives from now on is not meant: it may be what is sent here.
        extent = extent_of(directory)
        if extent.begin:
            _say_where_it_begins(directory)
        return log_batches(directory, extent), extent.size, [str(directory)]
    reader = BatchFiles()
    try:
        total_bytes = sum(path.stat().st_size for path in args.files)
    except OSError as error:
        raise CollectorError(f"{error.filename}: {error.strerror}; nothing was sent") from error
    read: Callable[[Path], Source] = reader.read
    return itertools.chain.from_iterable(map(read, args.files)), total_bytes, [str(p) for p in args.files]


def _say_where_it_begins(directory: Path) -> None:
    begun = begins_at_unix_ns(directory)
    since = "and has nothing yet" if begun is None else f"and begins with what came in at {iso(begun)}"
    print(
        f"usage-replay: {directory} has been pruned {since}; what is older may be in Kafka (--kafka)",
        file=sys.stderr,
    )


def _say_what_would(chosen: Source, report: Report, as_json: bool) -> int:
    batches: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    size = 0
    first, last = 1 << 63, 0
    for found in chosen:
        if found.trouble:
            report.refused(found, found.trouble)
            continue
        batches[found.tenant or "-"] += 1
        rows[found.tenant or "-"] += found.rows
        size += len(found.body)
        first = min(first, found.interval_start_unix_ns or first)
        last = max(last, found.interval_end_unix_ns)
        report.progress.at(found.end, batches.total())
    report.progress.aside()
    times = [iso(first), iso(last)] if last else []
    if as_json:
        print(
            json.dumps(
                {
                    "batches": batches.total(),
                    "rows": rows.total(),
                    "bytes": size,
                    "times": times,
                    "tenants": dict(batches),
                    "unreadable": report.count,
                }
            )
        )
    else:
        print(
            f"{batches.total()} batches, {rows.total()} rows, {size} bytes, {' to '.join(times) or 'of no time'}"
        )
        for tenant, count in sorted(batches.items()):
            print(f"  {tenant}: {count} batches, {rows[tenant]} rows")
        if report.count:
            print(f"  {report.count} places cannot be read")
    return 1 if report.count else 0


if __name__ == "__main__":
    sys.exit(main())
