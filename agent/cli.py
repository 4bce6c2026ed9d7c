"""`weighbridge-agent`: the commands. Heavy parts are imported by the command that needs them."""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
from pathlib import Path
from typing import Any

from agent import __version__, config
from agent.errors import AgentError
from agent.meter.owners import OwnersSettings
from wire.daemon import journal
from wire.daemon.command_line import describe_reload, run_command
from wire.daemon.control import ask
from wire.daemon.settings import SettingsError
from wire.daemon.support_command import add_bundle_arguments, write_bundle


def main() -> int:
    """Run one command; see `run_command` for the exit codes."""
    return run_command(_parser(), AgentError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weighbridge-agent", description="Meters what every container on this host really uses."
    )
    parser.add_argument("--version", action="version", version=f"weighbridge-agent {__version__}")
    parser.add_argument("--config", type=Path, help=f"settings file (default {config.DEFAULT_FILE})")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, handler: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(handler=handler)
        return sub

    command("run", _run, "be the daemon")
    command("check-config", _check_config, "are the settings usable?")
    command("status", _status, "ask the running agent how it is").add_argument("--json", action="store_true")
    top = command("top", _top, "live table of what runs and what it uses")
    top.add_argument("--once", action="store_true", help="print one table and end")
    top.add_argument("--json", action="store_true", help="one table as JSON")
    top.add_argument("--limit", type=int, default=30, help="rows")
    command("reload", _reload, "have the running agent take up its settings file; says what needs a restart")
    command("doctor", _doctor, "check everything; each failed check names its fix").add_argument(
        "--json", action="store_true"
    )
    add_bundle_arguments(
        command(
            "support-bundle", _support_bundle, "one file for whoever helps: no key, no token, nobody's usage"
        )
    )
    explain = command("explain", _explain, "who a container is, who pays for it and why")
    explain.add_argument("container", help="id, the beginning of one, a name, or a part of the cgroup path")
    explain.add_argument("--json", action="store_true")
    enroll = command("enroll", _enroll, "spend a join token for an identity")
    enroll.add_argument(
        "token", help="the line `weighbridge-collector token create` printed; - reads it from standard input"
    )
    enroll.add_argument("--agent-id", help="come back under this id; the token must be made for it")
    enroll.add_argument("--force", action="store_true", help="replace the identity this host has")
    replay = command("replay", _replay, "send exported batches again; what was delivered stays as it is")
    replay.add_argument("files", nargs="+", type=Path)
    spool = commands.add_parser("spool", help="the durable queue").add_subparsers(required=True)
    for name, handler, text in (
        ("list", _spool_list, "batches that wait"),
        ("export", _spool_export, "write them to a file for `replay`"),
        ("verify", _spool_verify, "digests, holes and chain"),
    ):
        sub = spool.add_parser(name, help=text)
        sub.set_defaults(handler=handler)
        sub.add_argument("--state-dir", type=Path, help="the agent's directory, instead of the settings'")
        if name == "export":
            sub.add_argument("file", type=Path, help="- is standard output")
        else:
            sub.add_argument("--json", action="store_true")
    command("identify", _identify, "cgroup paths on standard input -> who they are, one JSON object a line")
    read = command("read", _read, "every cgroup of a tree as the kernel gives it")
    read.add_argument("--cgroup-root", type=Path, help="instead of the settings'")
    read.add_argument("--json", action="store_true", help="one object a line")
    return parser


def _run(args: argparse.Namespace) -> int:
    import asyncio

    from agent.daemon import Daemon

    settings = config.read(args.config)
    journal.configure(settings.journal_level)
    faulthandler.enable()
    _stay_small()

    async def serve() -> None:
        await Daemon(settings, args.config).run()

    asyncio.run(serve())
    return 0


def _stay_small() -> None:
    """One malloc arena instead of one per thread (mallopt(3)), and no cycle collector over what stays anyway."""
    import ctypes
    import gc

    m_arena_max = -8
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_arena_max, 1)
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _check_config(args: argparse.Namespace) -> int:
    config.read(args.config)
    print("settings are good")
    return 0


def _status(args: argparse.Namespace) -> int:
    answer = ask(config.read(args.config).control_socket, {"command": "status"})
    if args.json:
        print(json.dumps(answer))
    else:
        for key, value in answer.items():
            if key == "ready":
                continue
            if isinstance(value, list):
                value = "; ".join(value) or "nothing"
            elif isinstance(value, dict):
                value = ", ".join(f"{n} {name}" for name, n in sorted(value.items())) or "none yet"
            print(f"{key.replace('_', ' '):32} {value}")
        for name, text in answer["ready"].items():
            print(f"not ready: {name}: {text}")
    return 1 if answer["ready"] else 0


def _reload(args: argparse.Namespace) -> int:
    try:
        socket = config.read(args.config).control_socket
    except SettingsError:
        # The running one is asked all the same: it keeps what it has, and shows that its file is bad.
        socket = config.Settings().control_socket
    print(describe_reload(ask(socket, {"command": "reload"})))
    return 0


def _top(args: argparse.Namespace) -> int:
    socket = config.read(args.config).control_socket
    while True:
        answer = ask(socket, {"command": "top", "limit": args.limit})
        if args.json:
            print(json.dumps(answer))
            return 0
        table = _top_table(answer)
        if args.once or not sys.stdout.isatty():
            print(table)
            return 0
        sys.stdout.write("\x1b[H\x1b[2J" + table + "\n")
        sys.stdout.flush()
        time.sleep(2)


def _top_table(answer: dict[str, Any]) -> str:
    lines = [
        f"{answer['units']} units in the last {answer['duration_seconds']:.1f} s",
        f"{'CPUS':>8} {'MEMORY MiB':>11} {'READ MB/s':>10} {'WRITE MB/s':>10}  {'TENANT':20} {'KIND':10} UNIT",
    ]

    def number(value: float | None, scale: float, digits: int) -> str:
        return "?" if value is None else f"{value / scale:.{digits}f}"

    lines.extend(
        f"{number(row['cpu_cores'], 1, 3):>8} {number(row['memory_bytes'], 2**20, 1):>11}"
        f" {number(row['read_bytes_per_second'], 1e6, 2):>10} {number(row['write_bytes_per_second'], 1e6, 2):>10}"
        f"  {row['tenant'][:20]:20} {row['kind']:10} {row['name'] or row['path']}"
        for row in answer["rows"]
    )
    return "\n".join(lines)


def _doctor(args: argparse.Namespace) -> int:
    from agent.doctor import examine

    failed = False
    for finding in examine(config.read(args.config)):
        failed |= finding.level == "failed"
        if args.json:
            print(json.dumps(finding._asdict()))
        else:
            print(f"{finding.level.upper():8} {finding.check:10} {finding.text}")
    return 1 if failed else 0


def _support_bundle(args: argparse.Namespace) -> int:
    from agent.support import make

    return write_bundle(args, "weighbridge-agent", make)


def _explain(args: argparse.Namespace) -> int:
    answer = ask(config.read(args.config).control_socket, {"command": "explain", "container": args.container})
    if args.json:
        print(json.dumps(answer))
        return 0
    for unit in answer["found"]:
        print(f"{unit['path']}  (cgroup {unit['cgroup_id']}, {unit['kind']})")
        for key in ("runtime", "container_id", "pod_uid", "unit", "name", "nested_in"):
            if unit[key]:
                print(f"  {key.replace('_', ' '):14} {unit[key]}")
        print(f"  {'tenant':14} {unit['tenant']}")
        for line in unit["because"]:
            print(f"  {'':14} {line}")
        for name, value in unit["counters"].items():
            print(f"  {name:28} {value}")
        for name, value in unit["traffic"].items():
            print(f"  {name:28} {value}  (of its own cgroup, since the probes were loaded)")
        print(f"  unknown: {', '.join(unit['unknown']) or 'nothing'}")
    return 0


def _enroll(args: argparse.Namespace) -> int:
    import os

    from agent.ship.enrol import FILE_NAME, enroll
    from wire.identity import AgentId

    settings = config.read(args.config)
    if (settings.state_dir / FILE_NAME).exists() and not args.force:
        raise AgentError(f"{settings.state_dir} has an identity already; --force replaces it")
    token = sys.stdin.read() if args.token == "-" else args.token  # noqa: S105
    for warning in _not_permitted(token, settings.owners):
        print(f"warning: {warning}", file=sys.stderr)
    identity = enroll(
        token,
        settings.state_dir,
        settings.host_name or os.uname().nodename,
        AgentId(args.agent_id) if args.agent_id else None,
        20.0,
    )
    print(f"enrolled as agent {identity.agent_id}; collectors: {', '.join(identity.collectors)}")
    return 0


def _not_permitted(token_text: str, owners: OwnersSettings) -> list[str]:
    """Which tenants of the settings the token does not permit, as far as it says."""
    from wire.token import JoinToken, TokenError

    try:
        permitted = JoinToken.decode(token_text).tenants
    except TokenError:
        return []  # `enroll` says what is wrong with it
    if permitted is None:
        return []
    named = {"owners.host": owners.host, "owners.default": owners.default}
    named |= {f"owners.rules[{n}]": rule.tenant for n, rule in enumerate(owners.rules, 1) if rule.tenant}
    return [
        f"`{key}` names `{tenant}`, which this token does not permit: those batches will be rejected; change"
        " it, or enrol again with a token that has the tenant"
        for key, tenant in named.items()
        if tenant not in permitted
    ]


def _replay(args: argparse.Namespace) -> int:
    import contextlib

    import grpc

    from agent.ship.enrol import Identity
    from agent.ship.replay import TIMEOUT_SECONDS, replay
    from wire.tls import CHANNEL_OPTIONS

    settings = config.read(args.config)
    identity = Identity.load(settings.state_dir)
    address = (settings.ship.collectors or identity.collectors)[0]
    with contextlib.ExitStack() as closing:
        try:
            files = [closing.enter_context(path.open("rb")) for path in args.files]
        except OSError as error:
            raise AgentError(f"{error.filename}: {error.strerror}; name files of `spool export`") from error
        channel = closing.enter_context(grpc.secure_channel(address, identity.credentials(), CHANNEL_OPTIONS))
        answers = replay(files, identity.agent_id, channel, TIMEOUT_SECONDS)
    print(", ".join(f"{count} {answer}" for answer, count in sorted(answers.items())) or "nothing to send")
    return 1 if any(answer.startswith(("rejected", "retry")) for answer in answers) else 0


def _spool_dir(args: argparse.Namespace) -> Path:
    return args.state_dir or config.read(args.config).state_dir


def _spool_list(args: argparse.Namespace) -> int:
    from agent.ship.export import batches

    for batch in batches(_spool_dir(args)):
        line = {
            "epoch": batch.epoch,
            "seq": batch.seq,
            "tenant": batch.tenant,
            "rows": batch.rows,
            "interval_end_unix_ns": batch.interval_end_unix_ns,
            "digest": batch.digest.hex(),
            "bytes": len(batch.body),
        }
        if args.json:
            print(json.dumps(line))
        else:
            end = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(batch.interval_end_unix_ns / 1e9))
            print(
                f"{batch.epoch}/{batch.seq}  until {end}  {batch.rows:5} rows  {len(batch.body):8} bytes  {batch.tenant}"
            )
    return 0


def _spool_export(args: argparse.Namespace) -> int:
    from agent.ship.export import export

    directory = _spool_dir(args)
    if str(args.file) == "-":
        export(directory, sys.stdout.buffer)
        return 0
    partial = args.file.with_name(f".{args.file.name}.partial")
    try:
        if args.file.exists():
            raise AgentError(f"{args.file} exists; name a new file")
        with partial.open("wb") as out:
            count = export(directory, out)
        partial.rename(args.file)
    except OSError as error:
        raise AgentError(f"{args.file}: {error.strerror}; name a file this user may write") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{count} batches in {args.file}")
    return 0


def _spool_verify(args: argparse.Namespace) -> int:
    import msgspec

    from agent.ship.export import verify

    verdict = verify(_spool_dir(args))
    if args.json:
        print(json.dumps({**msgspec.to_builtins(verdict), "sound": verdict.sound}))
    else:
        print(f"{verdict.batches} batches, {verdict.rows} rows; {verdict.quarantined} in quarantine")
        for title, found in (
            ("damaged", verdict.damaged),
            ("missing", verdict.missing),
            ("chain broken", verdict.chain_breaks),
        ):
            print(f"  {title:14} {', '.join(found[:20]) or 'none'}")
    return 0 if verdict.sound else 1


def _identify(_args: argparse.Namespace) -> int:
    from agent.meter.identity import identify_lines

    identify_lines(sys.stdin.buffer, sys.stdout)
    return 0


def _read(args: argparse.Namespace) -> int:
    from agent.read.dump import dump_tree

    dump_tree(args.cgroup_root or config.read(args.config).read.cgroup_root, sys.stdout, args.json)
    return 0
