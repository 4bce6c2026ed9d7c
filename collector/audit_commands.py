"""`weighbridge-collector audit show | verify`: administrative acts, as a person reads and checks them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from collector.audit import Line, lines, verify

FileOf = Callable[[argparse.Namespace], Path]
_FRAME = ("number", "at", "act", "by", "previous", "torn")


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], file_of: FileOf) -> None:
    """Add the commands; `file_of` finds the audit log of the parsed arguments."""
    audit = subparsers.add_parser("audit", help="who did what to this collector").add_subparsers(
        required=True
    )
    show = audit.add_parser("show", help="the acts, oldest first")
    show.add_argument("--act", help="only this one, such as token_created")
    show.add_argument("--json", action="store_true", help="one object a line")
    show.set_defaults(handler=lambda args: _show(args, file_of(args)))
    check = audit.add_parser("verify", help="is every line as it was written, and none missing between them?")
    check.add_argument(
        "--head", default="", metavar="NUMBER:HASH", help="what an earlier `verify` said; must still be in it"
    )
    check.add_argument("--json", action="store_true")
    check.set_defaults(handler=lambda args: _verify(args, file_of(args)))


def _show(args: argparse.Namespace, path: Path) -> int:
    for line in lines(path):
        if not isinstance(line, Line) or args.act not in (None, line.entry["act"]):
            continue
        if args.json:
            print(json.dumps({**line.entry, "hash": line.hash}))
        else:
            entry = line.entry
            by = " ".join(f"{key} {value}" for key, value in entry["by"].items())
            said = "  ".join(f"{key}={json.dumps(entry[key])}" for key in entry if key not in _FRAME)
            print(f"{entry['number']:6}  {entry['at']}  {entry['act']:26} {by}  {said}")
    return 0


def _verify(args: argparse.Namespace, path: Path) -> int:
    verdict = verify(path, args.head)
    if args.json:
        print(json.dumps({**verdict._asdict(), "sound": verdict.sound}))
    else:
        print(f"{verdict.acts} acts; head {verdict.head}")
        for number in verdict.torn:
            print(f"  before line {number}: an unfinished line of a crash; nobody was told of it")
        if verdict.unfinished_bytes:
            print(
                f"  {verdict.unfinished_bytes} bytes of an unfinished line at the end; nobody was told of it"
            )
        print(f"  broken: {verdict.broken or 'none'}")
    return 0 if verdict.sound else 1
