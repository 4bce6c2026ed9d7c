"""`weighbridge-collector parked` and `plan show | set | clear`: questions to the running collector."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collector.errors import CollectorError
from wire.daemon.control import ask

SocketOf = Callable[[argparse.Namespace], Path]


def add_commands(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], socket_of: SocketOf
) -> None:
    """Add the commands; `socket_of` finds the control socket of the parsed arguments."""
    parked = subparsers.add_parser("parked", help="who waits, how much, and for how long still")
    parked.add_argument("--json", action="store_true")
    parked.set_defaults(handler=lambda args: _parked(args, socket_of(args)))

    plan = subparsers.add_parser("plan", help="what each tenant may use").add_subparsers(required=True)
    show = plan.add_parser("show", help="the plans in force, and what is left of them")
    show.add_argument("tenant", nargs="?")
    show.add_argument("--json", action="store_true")
    show.set_defaults(handler=lambda args: _show(args, socket_of(args)))
    override = plan.add_parser("set", help="override a tenant's plan until it is cleared, also over restarts")
    override.add_argument("tenant")
    override.add_argument("--rate", type=_rate, help="tokens a second, or `unlimited`")
    override.add_argument("--burst", type=float, help="tokens that may be used at once")
    override.add_argument("--park-bytes", type=int, help="bytes that may wait; 0: nothing is parked")
    override.add_argument("--park-batches", type=int, help="batches that may wait")
    override.add_argument("--json", action="store_true")
    override.set_defaults(handler=lambda args: _set(args, socket_of(args)))
    clear = plan.add_parser("clear", help="back to the plan of the settings")
    clear.add_argument("tenant")
    clear.add_argument("--json", action="store_true")
    clear.set_defaults(handler=lambda args: _clear(args, socket_of(args)))


def _rate(text: str) -> float | str:
    return text if text == "unlimited" else float(text)


def _parked(args: argparse.Namespace, socket: Path) -> int:
    answer = ask(socket, {"command": "parked"})
    if args.json:
        print(json.dumps(answer))
        return 0
    tenants = answer["tenants"]
    if not tenants:
        print("nothing is parked")
        return 0
    print(f"{'TENANT':32} {'BATCHES':>9} {'MIB':>9} {'DEBT':>11} {'OLDEST':>9} {'DRAINED IN':>11}")
    for t in tenants:
        print(
            f"{t['tenant']:32} {t['batches']:9} {t['bytes'] / 2**20:9.1f} {t['debt_tokens']:11.1f}"
            f" {_span(t['oldest_seconds']):>9} {_span(t['drained_in_seconds']):>11}"
        )
    _more(answer)
    return 0


def _show(args: argparse.Namespace, socket: Path) -> int:
    request = {"command": "plans"} if args.tenant is None else {"command": "plans", "tenant": args.tenant}
    return _plans(args, ask(socket, request))


def _set(args: argparse.Namespace, socket: Path) -> int:
    said = {
        "rate": args.rate,
        "burst": args.burst,
        "park": args.park_bytes,
        "park_batches": args.park_batches,
    }
    plan = {key: value for key, value in said.items() if value is not None}
    if not plan:
        raise CollectorError("nothing to set: give --rate, --burst, --park-bytes or --park-batches")
    return _plans(args, ask(socket, {"command": "plan_set", "tenant": args.tenant, "plan": plan}))


def _clear(args: argparse.Namespace, socket: Path) -> int:
    return _plans(args, ask(socket, {"command": "plan_clear", "tenant": args.tenant}))


def _plans(args: argparse.Namespace, answer: dict[str, Any]) -> int:
    if args.json:
        print(json.dumps(answer))
        return 0
    print(f"{'TENANT':32} {'SOURCE':9} {'TOKENS/S':>10} {'BURST':>12} {'LEFT':>12} {'MAY WAIT':>20}")
    for t in answer["tenants"]:
        rate, burst, left = (
            "unlimited" if t["rate"] is None else f"{t['rate']:g}",
            *("-" if t[key] is None else f"{t[key]:.1f}" for key in ("burst", "balance")),
        )
        wait = f"{t['park_batches']} / {t['park_bytes'] / 2**20:.0f} MiB" if t["park_bytes"] else "nothing"
        print(f"{t['tenant']:32} {t['source']:9} {rate:>10} {burst:>12} {left:>12} {wait:>20}")
    _more(answer)
    return 0


def _more(answer: dict[str, Any]) -> None:
    if answer["not_shown"]:
        print(f"and {answer['not_shown']} more")


def _span(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
