"""`weighbridge-collector ca ...` and `token create`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from collector.audit import Audit
from collector.errors import CollectorError
from wire.daemon.command_line import act_as_owner
from wire.identity import UNATTRIBUTED, AgentId, new_agent_id
from wire.token import MAX_TENANTS, JoinToken

if TYPE_CHECKING:
    from collector.door.ca import CertificateAuthority

CaOf = Callable[[argparse.Namespace], Path]
"""The CA's directory."""
AuditOf = Callable[[argparse.Namespace], Path]
"""The audit log."""
PortOf = Callable[[argparse.Namespace], int]


def add_commands(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    ca_of: CaOf,
    audit_of: AuditOf,
    enrolment_port_of: PortOf,
) -> None:
    """Add the commands; the functions find the CA, the audit log and the enrolment port of the arguments."""

    def authority_of(args: argparse.Namespace) -> CertificateAuthority:
        from collector.door.ca import CertificateAuthority

        audit_file = audit_of(args)
        act_as_owner(audit_file.parent)
        return CertificateAuthority(ca_of(args), Audit(audit_file))

    ca = subparsers.add_parser("ca", help="the collector's own certificate authority").add_subparsers(
        required=True
    )

    init = ca.add_parser("init", help="make a root and the collector's certificate")
    init.add_argument(
        "--domain", required=True, help="trust domain: the host part of spiffe://DOMAIN/agent/ID"
    )
    init.add_argument(
        "--host", required=True, action="append", help="name or address agents connect to; repeatable"
    )
    init.set_defaults(handler=lambda args: _init(args, ca_of(args), audit_of(args)))

    issue = ca.add_parser(
        "issue", help="sign a certificate: an agent's request, or a new one for the collector"
    )
    what = issue.add_mutually_exclusive_group(required=True)
    what.add_argument("--csr", type=Path, help="an agent's PKCS#10 request, DER")
    what.add_argument("--server", action="store_true", help="the collector's own")
    issue.add_argument(
        "--host", action="append", default=[], help="with --server: name or address; repeatable"
    )
    issue.add_argument("--agent-id", help="with --csr: the agent; new if left out")
    issue.add_argument(
        "--tenant", action="append", help="with --csr: a tenant it may report; repeatable; any if left out"
    )
    issue.add_argument("--hours", type=int, default=24, help="how long it is good (24)")
    # The request is read by whoever gave it.
    issue.set_defaults(handler=lambda args: _issue(args, _csr(args), authority_of(args)))

    revoke = ca.add_parser("revoke", help="revoke an agent, or one certificate by its serial")
    revoke.add_argument("agent_or_serial")
    revoke.set_defaults(handler=lambda args: _revoke(args, authority_of(args)))

    permit = ca.add_parser("permit", help="say which tenants an agent may report; holds within 5 s")
    permit.add_argument("agent_id")
    which = permit.add_mutually_exclusive_group(required=True)
    which.add_argument("--tenant", action="append", help="one of them; repeatable")
    which.add_argument("--any", action="store_true", help="any tenant")
    permit.set_defaults(handler=lambda args: _permit(args, authority_of(args)))

    listing = ca.add_parser("list", help="the certificates that were issued")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(handler=lambda args: _list(args, authority_of(args)))

    _add_token(subparsers, lambda args: _token(args, authority_of(args), enrolment_port_of(args)))


def _add_token(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    handler: Callable[[argparse.Namespace], int],
) -> None:
    token = subparsers.add_parser("token", help="join tokens").add_subparsers(required=True)
    create = token.add_parser("create", help="one line that lets one agent enrol, once, within the hour")
    create.add_argument(
        "--tenant", action="append", help="a tenant the agent may report; repeatable; any if left out"
    )
    create.add_argument("--agent-id", help="let this agent enrol again under its old name")
    create.add_argument("--ttl-minutes", type=int, default=60, help="how long it is good (60, at most)")
    create.add_argument(
        "--address",
        action="append",
        help="enrolment door as agents reach it, HOST:PORT; default: every --host of `ca init`",
    )
    create.set_defaults(handler=handler)


def _init(args: argparse.Namespace, directory: Path, audit_file: Path) -> int:
    from collector.door.ca import CertificateAuthority

    act_as_owner(audit_file.parent)
    CertificateAuthority.init(directory, args.domain, args.host, Audit(audit_file))
    print(f"CA for spiffe://{args.domain} in {directory}; keep ca.key secret and back it up")
    return 0


def _csr(args: argparse.Namespace) -> bytes:
    if args.csr is None:
        return b""
    try:
        return bytes(args.csr.read_bytes())
    except OSError as error:
        raise CollectorError(f"{args.csr}: {error.strerror}; name a file with a request in DER") from error


def _issue(args: argparse.Namespace, csr: bytes, authority: CertificateAuthority) -> int:
    if args.server:
        if not args.host:
            raise CollectorError("name at least one --host with --server")
        authority.issue_server(args.host)
        print(
            f"{authority.directory / 'server.pem'} written; a running collector takes it up at its next handshake"
        )
        return 0
    agent_id = AgentId(args.agent_id) if args.agent_id else new_agent_id()
    chain = authority.issue_agent(csr, agent_id, timedelta(hours=args.hours))
    authority.registry.add_agent(agent_id, "issued by hand", frozenset(args.tenant) if args.tenant else None)
    sys.stdout.write(chain.decode())
    _warn_of_missing_tenant(args.tenant)
    return 0


def _revoke(args: argparse.Namespace, authority: CertificateAuthority) -> int:
    hit = authority.registry.revoke(args.agent_or_serial)
    if not hit:
        raise CollectorError(
            f"nothing valid is known by `{args.agent_or_serial}`; see `weighbridge-collector ca list`"
        )
    print("revoked; open streams are cut within 5 s")
    return 0


def _permit(args: argparse.Namespace, authority: CertificateAuthority) -> int:
    tenants = None if args.any else frozenset(args.tenant)
    if not authority.registry.permit(AgentId(args.agent_id), tenants):
        raise CollectorError(
            f"agent `{args.agent_id}` is not enrolled here; see `weighbridge-collector ca list`"
        )
    print("permitted; its streams begin anew within 5 s")
    _warn_of_missing_tenant(args.tenant)
    return 0


def _list(args: argparse.Namespace, authority: CertificateAuthority) -> int:
    records = authority.registry.certificates()
    now = time.time()
    for record in records:
        state = "revoked" if record.revoked_at else "expired" if record.not_after < now else "valid"
        if args.json:
            print(json.dumps(record._asdict() | {"state": state}))
        else:
            until = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(record.not_after))
            print(f"{record.agent_id}  {state:8} until {until}  serial {record.serial}")
    return 0


def _token(args: argparse.Namespace, authority: CertificateAuthority, port: int) -> int:
    addresses = args.address or [
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in authority.server_hosts()
    ]
    secret = authority.registry.add_token(
        frozenset(args.tenant) if args.tenant else None,
        AgentId(args.agent_id) if args.agent_id else None,
        args.ttl_minutes * 60,
    )
    named = sorted(args.tenant or ())
    tenants = named if 0 < len(named) <= MAX_TENANTS else None
    print(JoinToken(secret, addresses, authority.ca_pem.decode(), tenants).encode())
    _warn_of_missing_tenant(args.tenant)
    return 0


def _warn_of_missing_tenant(tenants: list[str] | None) -> None:
    """The host's own row has a tenant too, and is easily forgotten. Said on standard error, beside the result."""
    if tenants and UNATTRIBUTED not in tenants:
        print(
            f"warning: `{UNATTRIBUTED}` is not among these tenants: unless the host sets `owners.host` and"
            " `owners.default` to one that is, its own row and what no rule claims are rejected;"
            f" add `--tenant {UNATTRIBUTED}` or set them",
            file=sys.stderr,
        )
