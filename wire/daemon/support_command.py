"""`support-bundle`, as both programs have it: arguments, the file's name, what is said of it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, help="the file to make (default: named after host and time, here)"
    )
    parser.add_argument(
        "--journal",
        type=Path,
        help="where the daemon's standard error goes, if that is a file and not the journal",
    )


def write_bundle(
    args: argparse.Namespace, program: str, make: Callable[[Path, Path | None, Path | None], list[str]]
) -> int:
    """`make` gets the output, the settings file and the journal file, and returns the names of the parts."""
    # Not loaded by a daemon.
    from wire.daemon.support_bundle import BundleError

    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    output: Path = args.output or Path(f"{program}-{os.uname().nodename}-{now}.tar.gz")
    try:
        names = make(output, args.config, args.journal)
    except BundleError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {', '.join(names)}. Look at it before you send it: tar -xzf {output}")
    return 0
