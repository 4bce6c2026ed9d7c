"""`weighbridge-collector`: the commands. Heavy parts are imported by the command that needs them."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
from pathlib import Path

from collector import (
    __version__,
    admission_commands,
    audit_commands,
    config,
    import_commands,
    log_commands,
)
from collector.door import ca_commands
from collector.errors import CollectorError
from wire.daemon import journal
from wire.daemon.command_line import describe_reload, run_command
from wire.daemon.control import ask
from wire.daemon.settings import SettingsError
from wire.daemon.support_command import add_bundle_arguments, write_bundle


def main() -> int:
    """Run one command; see `run_command` for the exit codes."""
    return run_command(_parser(), CollectorError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weighbridge-collector", description="Takes batches in from agents and makes them durable."
    )
    parser.add_argument("--version", action="version", version=f"weighbridge-collector {__version__}")
    parser.add_argument("--config", type=Path, help=f"settings file (default {config.DEFAULT_FILE})")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="be the daemon")
    run.set_defaults(handler=_run)
    check = commands.add_parser("check-config", help="are the settings, the CA and the directories usable?")
    check.add_argument("--online", action="store_true", help="also ask brokers, topics and Redis")
    check.set_defaults(handler=_check_config)

    def audit_of(args: argparse.Namespace) -> Path:
        return config.read(args.config).audit_file

    ca_commands.add_commands(
        commands,
        lambda args: config.read(args.config).ca_dir,
        audit_of,
        lambda args: config.split_address(config.read(args.config).listen.enrolment)[1],
    )
    log_commands.add_commands(commands, lambda args: config.read(args.config))
    import_commands.add_commands(commands, lambda args: config.read(args.config))
    admission_commands.add_commands(commands, _control_socket)
    audit_commands.add_commands(commands, audit_of)
    reload = commands.add_parser(
        "reload", help="have the running collector take up its settings file; says what needs a restart"
    )
    reload.set_defaults(handler=_reload)
    status = commands.add_parser("status", help="ask the running collector how it is")
    status.add_argument("--json", action="store_true")
    status.set_defaults(handler=_status)
    bundle = commands.add_parser(
        "support-bundle", help="one file for whoever helps: no key, no token, nobody's usage"
    )
    bundle.set_defaults(handler=_support_bundle)
    add_bundle_arguments(bundle)
    return parser


def _run(args: argparse.Namespace) -> int:
    import asyncio

    from collector.server import Server

    settings = config.read(args.config)
    journal.configure(settings.journal_level)
    faulthandler.enable()
    # What was imported stays, and a batch makes no cycles: collect seldom. But grpc.aio leaves each call's metadata in one.
    gc.freeze()
    gc.set_threshold(2_000, 20, 50)

    async def serve() -> None:
        await Server(settings, args.config).run()

    asyncio.run(serve())
    return 0


def _check_config(args: argparse.Namespace) -> int:
    settings = config.read(args.config)
    if not settings.external_ca:
        from collector.door.ca import CertificateAuthority

        CertificateAuthority(settings.ca_dir).server_pem()
    if settings.handoff.kafka.brokers:
        from collector.handoff.kafka.client import Client

        Client(settings.handoff.kafka).close()
    if settings.webhook.url and settings.webhook.secret_file:
        from collector.webhook import read_secret

        read_secret(settings.webhook.secret_file)
    print("settings are good")
    if not args.online:
        return 0
    from collector import online

    sound = True
    for finding in online.findings(settings):
        print(f"{finding.verdict:8} {finding.what}: {finding.text}")
        sound = sound and finding.verdict != "failed"
    return 0 if sound else 1


def _support_bundle(args: argparse.Namespace) -> int:
    from collector.support import make

    return write_bundle(args, "weighbridge-collector", make)


def _control_socket(args: argparse.Namespace) -> Path:
    return config.read(args.config).control_socket


def _reload(args: argparse.Namespace) -> int:
    try:
        socket = _control_socket(args)
    except SettingsError:
        # The running one is asked all the same: it keeps what it has, and shows that its file is bad.
        socket = config.Settings().control_socket
    print(describe_reload(ask(socket, {"command": "reload"})))
    return 0


def _status(args: argparse.Namespace) -> int:
    answer = ask(_control_socket(args), {"command": "status"})
    if args.json:
        print(json.dumps(answer))
    else:
        print(f"agents       {answer['agents']} known, {answer['open_streams']} connected")
        print(
            f"answers      {', '.join(f'{n} {name}' for name, n in sorted(answer['answers'].items())) or 'none yet'}"
        )
        for what, count in sorted(answer["refusals"].items()):
            print(f"refused      {count} {what}")
        print(f"log          {(answer['log_end_bytes'] - answer['log_begin_bytes']) / 2**20:.1f} MiB")
        for tenant, total in answer["tenants"].items():
            print(
                f"tenant       {tenant}: {total['batches']} batches, {total['rows']} rows,"
                f" {total['cpu_usage_ns'] / 1e9:.3f} CPU seconds"
            )
        for name, text in answer["ready"].items():
            print(f"not ready    {name}: {text}")
    return 1 if answer["ready"] else 0
