"""`weighbridge-ledger`: the commands. Heavy parts are imported by the command that needs them.

A command asks the running daemon; where none runs it opens the ledger itself, as the owner of its directory.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ledger import __version__, config, desk, tables
from ledger.errors import LedgerError
from ledger.tables import as_csv, as_json, plain
from wire.daemon import journal
from wire.daemon.command_line import act_as_owner, describe_reload, run_command
from wire.daemon.control import NotRunning, ask
from wire.daemon.files import replace_durably
from wire.daemon.settings import SettingsError
from wire.daemon.support_command import add_bundle_arguments, write_bundle

ANSWER_SECONDS = 1_900.0
"""A little longer than the daemon gives a command, so that its own words are heard."""
DAY_NS = 86_400 * 10**9

Command = Callable[[argparse.Namespace], int]


def main() -> int:
    """Run one command; see `run_command` for the exit codes."""
    return run_command(_parser(), LedgerError)


def open_books(settings: config.Settings) -> desk.Books:
    """The ledger itself. Its engine takes half a second and 290 MB to load, so only who needs it does."""
    from ledger.ledger import Ledger

    return Ledger(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weighbridge-ledger",
        description="Books what collectors took in, proves it complete, closes periods.",
    )
    parser.add_argument("--version", action="version", version=f"weighbridge-ledger {__version__}")
    parser.add_argument("--config", type=Path, help=f"settings file (default {config.DEFAULT_FILE})")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, handler: Command, text: str, json: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(handler=handler)
        if json:
            sub.add_argument("--json", action="store_true", help="as JSON")
        return sub

    def of_period(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("period", help="its name, such as 2026-10 or 2026-10-31")
        return sub

    command("run", _run, "be the daemon")
    check = command("check-config", _check_config, "are the settings usable?")
    check.add_argument("--online", action="store_true", help="also ask ClickHouse, brokers and topics")
    command("status", _status, "how far it is, and what is wrong", json=True)
    usage = command("usage", _usage, "who used how much", json=True)
    usage.add_argument("--tenant", help="only this one's")
    usage.add_argument(
        "--from", dest="start", metavar="TIME", help="date or instant, UTC (default: a day before --to)"
    )
    usage.add_argument("--to", dest="end", metavar="TIME", help="date or instant, UTC (default: now)")
    usage.add_argument(
        "--by", choices=desk.BY, default="tenant", help="a line for each of these (default: tenant)"
    )
    usage.add_argument("--csv", action="store_true", help="as CSV, all measures exactly")
    command("periods", _periods, "billing periods: open, closed, what keeps them open", json=True)
    of_period(command("close", _close, "close a period for ever, if it is complete", json=True))
    waive = of_period(command("waive", _waive, "close a period in spite of these blockers", json=True))
    waive.add_argument("blockers", nargs="+", metavar="BLOCKER", help="its id, as `close` prints it")
    waive.add_argument(
        "--reason", required=True, metavar="TEXT", help="kept in the manifest, with who said so"
    )
    retire = command("retire", _retire, "an agent that will never report again", json=True)
    retire.add_argument("agent_id", metavar="agent", help="its id")
    retire.add_argument("--at", metavar="TIME", help="from when on nothing is expected of it (default: now)")
    retire.add_argument("--reason", required=True, metavar="TEXT", help="kept, with who said so")
    command(
        "reconcile", _reconcile, "has every hop what the one before it has? Names what has not", json=True
    )
    command("verify", _verify, "sums against raw usage, chains, manifests", json=True)
    export = of_period(command("export", _export, "the bill lines of a closed period"))
    export.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default: csv")
    export.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="instead of standard output; replaced whole"
    )
    of_period(
        command(
            "manifest",
            _manifest,
            "what a closed period consists of, as JSON; its digest is on standard error",
        )
    )
    command("reread", _reread, "read the source again from its beginning; what is booked stays as it is")
    command("schema", _schema, "the tables, as SQL")
    command("reload", _reload, "have the running ledger take up its settings file; says what needs a restart")
    add_bundle_arguments(
        command(
            "support-bundle", _support_bundle, "one file for whoever helps: no key, no token, nobody's usage"
        )
    )
    return parser


def _asked(args: argparse.Namespace, name: str, **more: Any) -> dict[str, Any]:
    """The answer to a command: of the running daemon, or of the ledger itself where none runs."""
    settings = config.read(args.config)
    request = {"command": name, **more}
    try:
        return ask(settings.control_socket, request, ANSWER_SECONDS)
    except NotRunning:
        return _by_itself(settings, request)


def _by_itself(settings: config.Settings, request: dict[str, Any]) -> dict[str, Any]:
    from ledger.worker import open_for_command

    uid = os.getuid()
    act_as_owner(settings.state_dir)
    return open_for_command(settings, open_books, request, uid)


def _run(args: argparse.Namespace) -> int:
    import asyncio

    from ledger.server import Server

    settings = config.read(args.config)
    journal.configure(settings.journal_level)
    faulthandler.enable()

    async def serve() -> None:
        await Server(settings, args.config, open_books).run()

    asyncio.run(serve())
    return 0


def _check_config(args: argparse.Namespace) -> int:
    settings = config.read(args.config)
    print("settings are good")
    if not args.online:
        return 0
    from ledger.online import findings

    sound = True
    for finding in findings(settings):
        print(f"{finding.verdict:8} {finding.what}: {finding.text}")
        sound = sound and finding.verdict != "failed"
    return 0 if sound else 1


def _status(args: argparse.Namespace) -> int:
    settings = config.read(args.config)
    try:
        answer = ask(settings.control_socket, {"command": "status"})
    except NotRunning as error:
        answer = {**_by_itself(settings, {"command": "status"}), "ready": {"not_running": str(error)}}
    ready = answer["ready"]
    if args.json:
        print(as_json(answer))
    else:
        print(tables.facts({key: value for key, value in answer.items() if key not in ("ready", "busy")}))
        if answer.get("busy"):
            print(plain(answer["busy"]))
        for name, text in ready.items():
            print(plain(f"not ready: {name}: {text}"))
    return 1 if ready else 0


def _usage(args: argparse.Namespace) -> int:
    end = time.time_ns() if args.end is None else desk.instant(args.end)
    start = max(0, end - DAY_NS) if args.start is None else desk.instant(args.start)
    answer = _asked(args, "usage", start_unix_ns=start, end_unix_ns=end, by=args.by, tenant=args.tenant)
    rows = answer["rows"]
    if args.json:
        print(as_json(answer))
    elif args.csv:
        print(as_csv(rows), end="")
    else:
        print(tables.table(rows) or "no usage")
    if answer["more"]:
        print(
            f"only the first {len(rows)} lines; ask for less with --tenant, --from and --to", file=sys.stderr
        )
    return 1 if answer["more"] else 0


def _periods(args: argparse.Namespace) -> int:
    answer = _asked(args, "periods")
    print(as_json(answer) if args.json else tables.table(answer["periods"]) or "no periods yet")
    return 0


def _close(args: argparse.Namespace) -> int:
    answer = _asked(args, "close", period=args.period)
    blockers = answer.get("blockers", [])
    if args.json:
        print(as_json(answer))
    elif blockers:
        for blocker in blockers:
            print(plain(f"{blocker['id']}  {blocker['sentence']}"))
        print(
            f"{plain(args.period)} is not complete and stays open. What will never come is waived:"
            f" weighbridge-ledger waive {plain(args.period)} BLOCKER... --reason TEXT"
        )
    else:
        print(tables.facts(answer))
    return 1 if blockers else 0


def _waive(args: argparse.Namespace) -> int:
    answer = _asked(args, "waive", period=args.period, blockers=args.blockers, reason=args.reason)
    if args.json:
        print(as_json(answer))
    for blocker in () if args.json else answer["waived"]:
        print(plain(f"waived: {blocker['id']}  {blocker['sentence']}"))
    return 0


def _retire(args: argparse.Namespace) -> int:
    at = time.time_ns() if args.at is None else desk.instant(args.at)
    return _done(args, _asked(args, "retire", agent_id=args.agent_id, at_unix_ns=at, reason=args.reason))


def _reconcile(args: argparse.Namespace) -> int:
    return _judged(args, _asked(args, "reconcile"))


def _verify(args: argparse.Namespace) -> int:
    return _judged(args, _asked(args, "verify"))


def _done(args: argparse.Namespace, answer: dict[str, Any]) -> int:
    print(as_json(answer) if args.json else tables.facts(answer) or "done")
    return 0


def _judged(args: argparse.Namespace, answer: dict[str, Any]) -> int:
    """0 for sound, 1 for a finding."""
    print(as_json(answer) if args.json else tables.facts(answer))
    return 0 if answer["ok"] else 1


def _export(args: argparse.Namespace) -> int:
    lines = _asked(args, "export", period=args.period)["lines"]
    text = as_csv(lines) if args.format == "csv" else "".join(f"{as_json(line)}\n" for line in lines)
    if args.output is None:
        print(text, end="")
        return 0
    try:
        replace_durably(args.output, text.encode(), 0o640)
    except OSError as error:
        raise LedgerError(
            f"{args.output}: {error.strerror}; name a file in a directory you may write"
        ) from error
    print(f"{args.output}: {len(lines)} lines", file=sys.stderr)
    return 0


def _manifest(args: argparse.Namespace) -> int:
    answer = _asked(args, "manifest", period=args.period)
    # Where it goes to a program or a file, byte for byte what the digest is of.
    print(answer["manifest"], end="\n" if sys.stdout.isatty() else "")
    print(f"SHA-256 {plain(answer['digest'])}", file=sys.stderr)
    return 0


def _reread(args: argparse.Namespace) -> int:
    _asked(args, "reread")
    print("everything will be read again; what is booked stays as it is, and what is missing is booked")
    return 0


def _schema(_args: argparse.Namespace) -> int:
    from ledger.store.migrate import migrations

    print("\n".join(f"-- {one.name}\n{one.sql.strip()}\n" for one in migrations()), end="")
    return 0


def _reload(args: argparse.Namespace) -> int:
    try:
        settings = config.read(args.config)
    except SettingsError:
        # The running one is asked all the same: it keeps what it has, and shows that its file is bad.
        settings = config.Settings()
    print(describe_reload(ask(settings.control_socket, {"command": "reload"})))
    return 0


def _support_bundle(args: argparse.Namespace) -> int:
    from ledger.support import make

    return write_bundle(args, "weighbridge-ledger", make)
