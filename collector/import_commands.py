"""`weighbridge-collector import FILE ...`: batches from files, through the running collector."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from collector.config import Settings
from collector.errors import CollectorError
from collector.resend.batches import Found
from collector.resend.bookmark import Bookmark
from collector.resend.files import BatchFiles
from collector.resend.progress import Progress
from collector.resend.sender import Sender

MAX_TOLD = 1_000
"""Of what did not come in, so many are named; all are counted."""

SettingsOf = Callable[[argparse.Namespace], Settings]


def add_commands(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], settings_of: SettingsOf
) -> None:
    """Add the command; `settings_of` reads the settings that the parsed arguments name."""
    command = subparsers.add_parser(
        "import", help="let batches in from files, by the running collector; twice adds nothing"
    )
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument(
        "--format",
        choices=("auto", "delimited", "json"),
        default="auto",
        help="delimited as `weighbridge-agent spool export` writes them, or JSON lines; default: look",
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(handler=lambda args: _import(args, settings_of(args)))


def _import(args: argparse.Namespace, settings: Settings) -> int:
    report = Report(Progress(sum(map(_size, args.files))))
    sender = Sender(settings.control_socket, "import", [str(path) for path in args.files], report.refused)
    reader = BatchFiles(args.format)
    before = 0
    for path in args.files:
        _import_file(path, reader, sender, report, before)
        before += _size(path)
    sender.close()
    return report.finish(sender, args.json)


def _import_file(path: Path, reader: BatchFiles, sender: Sender, report: Report, before: int) -> None:
    bookmark = Bookmark(path)
    begin, counted_before = bookmark.offset, report.count
    sender.settled_end = begin
    # What an earlier run named is counted again, so that the exit code still says so.
    report.count += bookmark.refused
    try:
        for found in reader.read(path):
            if found.end <= begin:
                report.passed_over += not found.trouble
                continue
            if found.trouble:
                sender.flush()
                report.refused(found, found.trouble)
                sender.settled_end = found.end
            else:
                sender.add(found)
            # What was given up may come in later: a second run begins before it.
            if sender.settled_end > bookmark.offset and not sender.answers["missing_before"]:
                bookmark.move(sender.settled_end, report.count - counted_before)
            report.progress.at(before + found.end, sender.sent)
        sender.flush()
    except BaseException:
        bookmark.keep()
        raise
    bookmark.remove()


class Report:
    """What did not come in, said as it happens, and the sum of it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.count = 0
        """Batches that did not come in."""
        self.passed_over = 0
        """Batches that an earlier run had sent."""

    def refused(self, found: Found, why: str) -> None:
        self.count += 1
        if self.count <= MAX_TOLD:
            self.progress.aside()
            print(f"{found.place}: {_plain(why)}", file=sys.stderr)

    def finish(self, sender: Sender, as_json: bool) -> int:
        """Say what became of it; the exit code."""
        self.progress.aside()
        if self.count > MAX_TOLD:
            print(f"and {self.count - MAX_TOLD} more", file=sys.stderr)
        if as_json:
            print(
                json.dumps(
                    {
                        **sender.answers,
                        "sent": sender.sent,
                        "not_in": self.count,
                        "sent_before": self.passed_over,
                    }
                )
            )
        else:
            parts = [f"{n} {status.replace('_', ' ')}" for status, n in sorted(sender.answers.items())]
            if self.passed_over:
                parts.append(f"{self.passed_over} sent by an earlier run")
            print(f"{', '.join(parts) or 'nothing to send'}; {self.count} did not come in")
        return 1 if self.count else 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CollectorError(f"{path}: {error.strerror}; nothing was imported") from error


def _plain(text: str) -> str:
    """Nothing hostile in a batch reaches the terminal raw."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
