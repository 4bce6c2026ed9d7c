"""The packages of this checkout for a machine: built once for the same sources, two revisions, and compiled beforehand.

A package compiles its modules when it is installed. An emulated machine would take minutes for what takes this host
seconds, so that step of its scripts is done with what this host has compiled, if its Python is the machine's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.acceptance.machines.cache import Cache, build_step, key_of
from tests.acceptance.machines.machine import Machine
from tests.packaging.built import LIGHT, build

ROOT = Path(__file__).parent.parent.parent
GUEST_PYTHON = "3.11"
SOURCES = (
    "agent",
    "collector",
    "ledger",
    "wire",
    "packaging",
    "systemd",
    "requirements",
    "docs",
    "bpf/build",
    "bpf/bcc",
)
IN_MACHINE = "/var/tmp/packages"
OLD, NEW = "1", "2"
"""Revisions of the same version."""
PYTHON = f"/usr/bin/python{GUEST_PYTHON}"
REAL_PYTHON = "/usr/local/lib/weighbridge-rig/python"
COMPILER = f"""#!/bin/bash
# In the place of Python while dpkg or rpm runs: whoever compiles gets what there is, everybody else Python.
case " $* " in
    *" compileall "*)
        part=${{!#}}; part=${{part##*/}}; mkdir -p /var/cache/weighbridge
        cp -a "{IN_MACHINE}/compiled/$part" /var/cache/weighbridge/
        # The standard library's own cache goes along, as sys.pycache_prefix wants it.
        cd /; find usr/lib/python{GUEST_PYTHON} -name '*.pyc' | tar -c -T - --transform 's,__pycache__/,,' |
            tar -x -C "/var/cache/weighbridge/$part" ;;
    *"; import "*) ;;
    *) exec -a {PYTHON} {REAL_PYTHON} "$@" ;;
esac
"""


@contextmanager
def packages(kind: str) -> Iterator[Path]:
    """A directory with agent and collector, `1/*.deb` and `2/*.deb`, or .rpm."""
    with Cache().entry(f"packages_{kind}", _key(), lambda to: _build(kind, to)) as directory:
        yield directory


@contextmanager
def ledger_package(kind: str) -> Iterator[Path]:
    """A directory with `1/*.deb`, or .rpm, and of a .deb `2/*.deb`, which differs in nothing but its revision."""
    with Cache().entry(f"ledger_{kind}", _key(), lambda to: _build_ledger(kind, to)) as directory:
        yield directory


@contextmanager
def compiled(parts: Sequence[str] = LIGHT) -> Iterator[Path]:
    """A directory with the `compiler` that stands in for Python, and what it deals out."""
    with Cache().entry(f"compiled_{'_'.join(parts)}", _key(), lambda to: _compile(parts, to)) as directory:
        yield directory


def put_packages(machine: Machine, kind: str = "deb") -> None:
    """Below IN_MACHINE: `1/`, `2/`, `compiled/`."""
    with packages(kind) as directory:
        machine.put(directory, IN_MACHINE)
    with compiled() as directory:
        machine.put(directory, f"{IN_MACHINE}/compiled")


def put_ledger(machine: Machine, kind: str = "deb") -> None:
    """Beside what `put_packages` has put there: `ledger/1/`, of a .deb `ledger/2/`, and `compiled/ledger/`."""
    with ledger_package(kind) as directory:
        machine.put(directory, f"{IN_MACHINE}/ledger")
    with compiled(["ledger"]) as directory:
        machine.put(directory / "ledger", f"{IN_MACHINE}/compiled/ledger")


def manage(machine: Machine, command: str, seconds: int = 300) -> str:
    """A command of dpkg or rpm, in the directory of the packages."""
    return machine.run(with_compiled(command), seconds=seconds).output


def with_compiled(command: str) -> str:
    """A shell command under which packages find their modules compiled."""
    if sys.version_info[:2] != tuple(map(int, GUEST_PYTHON.split("."))):
        return f"cd {IN_MACHINE}; {command}"
    return (
        f"cd {IN_MACHINE}; cp --update {PYTHON} {REAL_PYTHON}\n"
        f"mount --bind compiled/compiler {PYTHON}; trap 'umount {PYTHON}' EXIT\n{command}\n"
    )


def _key() -> str:
    files = sorted(
        file
        for source in SOURCES
        for file in (ROOT / source).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    )
    return key_of(COMPILER, *(str(file.relative_to(ROOT)) for file in files), *files)


def _build(kind: str, directory: Path) -> None:
    for revision in (OLD, NEW):
        parts = (word for part in LIGHT for word in ("--part", part))
        build(directory / revision, *parts, "--format", kind, "--revision", revision)


def _build_ledger(kind: str, directory: Path) -> None:
    build(directory / OLD, "--part", "ledger", "--format", kind, "--revision", OLD)
    if kind == "rpm":
        return
    (old,) = (directory / OLD).glob("*.deb")
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        build_step(["dpkg-deb", "--raw-extract", old, tree])
        control = tree / "DEBIAN/control"
        revision = re.compile(rf"^(Version: .*-){OLD}\b", re.MULTILINE)
        control.write_text(revision.sub(rf"\g<1>{NEW}", control.read_text()))
        (directory / NEW).mkdir()
        new = directory / NEW / old.name.replace(f"-{OLD}+", f"-{NEW}+")
        build_step(["dpkg-deb", "-Zzstd", "-z1", "--build", tree, new])


def _compile(parts: Sequence[str], directory: Path) -> None:
    compiler = directory / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    source_of = packages if tuple(parts) == LIGHT else ledger_package
    with source_of("deb") as built, tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            (deb,) = (built / NEW).glob(f"weighbridge-{part}_*.deb")
            unpacked, cache = Path(scratch, part), Path(scratch, f"{part}.cache")
            subprocess.run(["dpkg-deb", "-x", deb, unpacked], check=True)
            python = [sys.executable, "-IS", "-X", f"pycache_prefix={cache}", "-m", "compileall", "-q"]
            source = unpacked / f"usr/lib/weighbridge/{part}"
            how = ["--invalidation-mode", "checked-hash", "-s", unpacked, source]
            build_step([*python, *how])
            shutil.copytree(f"{cache}{source}", directory / f"{part}/usr/lib/weighbridge/{part}")
