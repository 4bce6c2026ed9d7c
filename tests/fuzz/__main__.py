"""`./dev fuzz TARGET`: libFuzzer, led by what of our Python an input reaches, until time or runs are over.

New inputs that reach more gather in `.cache/fuzz/TARGET`, and the next run goes on from there. One that breaks a target's word is
written beside them and named; `./dev fuzz TARGET FILE` shows it again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["collector", "wire", "google"]):
    from tests.fuzz.delivery import delivery
    from tests.fuzz.files import delimited, json_lines
    from tests.fuzz.likeness import followers, likeness

from tests.fuzz import mutator
from tests.fuzz.seeds import CORPUS
from wire.v1 import usage_pb2 as pb

TARGETS = {"delivery": delivery, "likeness": likeness, "delimited": delimited, "json": json_lines}
MUTATORS = {"delivery": mutator.other_delivery, "likeness": partial(mutator.other_batch, good=followers())}
MAX_INPUT_BYTES = 8_192
"""What a limit of a thousand rows or a MiB does is for tests of its own: long inputs make the search slow."""
MOST_SECONDS_AN_INPUT, MOST_RSS_MIB = 10, 1_024
_FIELDS = [
    field
    for message in (pb.UsageBatch, pb.ContainerTable, pb.Opening, pb.Gap, pb.HostTotals)
    for field in message.DESCRIPTOR.fields
]
WORDS = (
    *(f'"{name}":' for field in _FIELDS for name in (field.name, field.json_name)),
    *(
        "null",
        "true",
        '"NaN"',
        "-0",
        "1e3",
        "1e999",
        "18446744073709551616",
        '"\\ud800"',
        "[",
        "{}",
        "\\u0000",
    ),
)
"""Of JSON lines: what chance would hardly write."""


def main() -> None:
    args, passed = _arguments()
    if args.keep:
        _keep(args.target, args.work)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    flags = [
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={MOST_SECONDS_AN_INPUT}",
        f"-rss_limit_mb={MOST_RSS_MIB}",
        f"-artifact_prefix={args.work}-",
        "-print_final_stats=1",
    ]
    if args.target == "json":
        flags.append(f"-dict={_dictionary(args.work)}")
    for flag, value in (("seed", args.seed), ("max_total_time", args.seconds), ("runs", args.runs)):
        if value is not None:
            flags.append(f"-{flag}={value}")
    inputs = args.inputs or [args.work, CORPUS / args.target]
    # libFuzzer runs itself again to merge, by these words.
    myself = f"{sys.executable} -m tests.fuzz {args.target}"
    more = {}
    if args.target in MUTATORS:
        other = MUTATORS[args.target]
        more["custom_mutator"] = lambda data, size, seed: other(data, size, seed, atheris.Mutate)
    atheris.Setup([myself, *flags, *passed, *map(str, inputs)], TARGETS[args.target], **more)
    atheris.Fuzz()


def _keep(target: str, work: Path) -> None:
    """Make the kept corpus anew: of it and what was found, the smallest inputs that together reach as much."""
    kept = CORPUS / target
    with tempfile.TemporaryDirectory() as fresh:
        words = [sys.executable, "-m", "tests.fuzz", target, "-merge=1", fresh, str(kept), str(work)]
        subprocess.run(words, check=True)
        shutil.rmtree(kept)
        shutil.copytree(fresh, kept)


def _dictionary(work: Path) -> Path:
    file = work.with_suffix(".dict")
    file.write_text("".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"\n' for word in WORDS))
    return file


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    """Ours, and those that libFuzzer adds when it runs itself."""
    parser = argparse.ArgumentParser(prog="./dev fuzz", description=__doc__, allow_abbrev=False)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("inputs", nargs="*", type=Path, metavar="FILE", help="no search: only these inputs")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--seconds", type=int, metavar="N")
    much.add_argument("--runs", type=int, metavar="N")
    parser.add_argument("--seed", type=int, metavar="N", help="of the search; another one each time")
    parser.add_argument("--work", type=Path, metavar="DIRECTORY", help="default .cache/fuzz/TARGET")
    parser.add_argument(
        "--keep", action="store_true", help="no search: make corpus/TARGET anew with what was found"
    )
    args, passed = parser.parse_known_args()
    args.work = args.work or Path(".cache/fuzz") / args.target
    return args, passed


if __name__ == "__main__":
    main()
