"""`./dev package`: the packages of this checkout, as .deb and .rpm.

Flow: lock -> wheels -> a tree per part -> documentation made from the programs -> nfpm.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nfpm
from checkout import ROOT, PackagingError, Target, source_date
from documents import document
from sbom import license_of_all
from tree import PARTS, installed_bytes, stage
from wheels import unpack, wheels_for


def main() -> int:
    """0, or 2 after saying what is wrong."""
    os.umask(0o022)
    args = _parser().parse_args()
    target = Target(args.python, args.revision, source_date())
    try:
        if args.command == "fetch":
            for part in PARTS:
                wheels_for(part, target, args.wheels)
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        for part in args.part or PARTS:
            for line in build(part, target, args.wheels, args.out, args.format or nfpm.KINDS):
                print(line)
    except PackagingError as error:
        print(f"package: {error}", file=sys.stderr)
        return 2
    return 0


def build(part: str, target: Target, store: Path, out: Path, kinds: Sequence[str]) -> list[str]:
    """What was made and how large it is, a line each."""
    wheels = wheels_for(part, target, store)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = Path(scratch, "wheels")
        unpack(wheels, unpacked)
        for kind in kinds:
            root = Path(scratch, kind)
            stage(part, target, unpacked, root)
            materials = document(part, kind, target, wheels, root)
            file = nfpm.pack(part, kind, target, license_of_all(part, wheels), root, out)
            file.with_name(f"{file.name}.cdx.json").write_text(materials)
            lines.append(
                f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, {installed_bytes(root) / 1e6:.1f} MB installed"
            )
    return lines


def _minor(text: str) -> str:
    if not re.fullmatch(r"3\.[0-9]{2}", text):
        raise argparse.ArgumentTypeError("a minor version, such as 3.11")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./dev package",
        description="Makes weighbridge-agent, weighbridge-collector and weighbridge-ledger.",
    )
    parser.add_argument(
        "command", nargs="?", choices=["build", "fetch"], default="build", help="fetch: only the wheels"
    )
    parser.add_argument(
        "--python",
        type=_minor,
        default="3.11",
        help="3.11 for Debian 12, 3.13 for Debian 13; any that the locked wheels are there for",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one")
    parser.add_argument("--format", action="append", choices=nfpm.KINDS, help="only this one")
    parser.add_argument("--revision", type=int, default=1, help="the how-manieth packaging of this version")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / ".cache/wheels", help="where locked wheels are kept"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
