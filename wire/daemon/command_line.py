"""What both programs do alike around a command: errors for people on standard error, exit codes."""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from pathlib import Path
from typing import Any

from wire.daemon.control import ControlError
from wire.daemon.settings import SettingsError


def run_command(parser: argparse.ArgumentParser, own_error: type[Exception]) -> int:
    """Parse the arguments and call their `handler`; 0 is success, 1 a finding, 2 wrong usage or settings."""
    args = parser.parse_args()
    try:
        return int(args.handler(args))
    except (own_error, SettingsError, ControlError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has seen enough; nothing is left to flush into its closed pipe.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def act_as_owner(directory: Path) -> None:
    """Root's command that writes into a daemon's directory does it as the directory's owner, so that the daemon can
    read what it finds there. The real user stays root's, by which the audit log knows who it was.
    """
    try:
        owner = directory.stat()
    except OSError:
        return  # whoever makes it says what is wrong
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups(_groups_of(owner.st_uid, owner.st_gid))
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)


def _groups_of(uid: int, gid: int) -> list[int]:
    """What the daemon has, too: the ledger's user reads the collector's log as a member of its group."""
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return [gid]


def describe_reload(answer: dict[str, Any]) -> str:
    """What a daemon's answer to `reload` says to a person."""
    restart = ", ".join(answer["needs_restart"])
    return f"reloaded; only a restart takes up: {restart}" if restart else "reloaded"
