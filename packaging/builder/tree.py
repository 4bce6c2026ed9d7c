"""Everything a package installs, laid out below a directory as it will lie below /."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from checkout import PACKAGING, ROOT, PackagingError, Target

from ledger.store.migrate import ddl

PRIVATE = "usr/lib/weighbridge"
PARTS = ("agent", "collector", "ledger")
UNIT_PREFIXES = {
    "agent": ("weighbridge-agent", "weighbridge-probes", "run-weighbridge"),
    "collector": ("weighbridge-collector",),
    "ledger": ("weighbridge-ledger", "weighbridge-reconcile"),
}
PROGRAMS = {
    "agent": {"weighbridge-agent": "agent.cli"},
    "collector": {"weighbridge-collector": "collector.cli", "usage-replay": "collector.replay"},
    "ledger": {"weighbridge-ledger": "ledger.cli"},
}

_LAUNCHER = '''\
#!/usr/bin/python{python} -IS
"""{name}, with the modules of its own package and nobody else's."""

import sys

# Compiled when the package was installed: /usr stays as it was shipped.
sys.pycache_prefix = "/var/cache/weighbridge/{part}"
sys.path.insert(0, "/{private}/{part}")

from {module} import main

sys.exit(main())
'''


def stage(part: str, target: Target, unpacked: Path, root: Path) -> None:
    """The programs with all they need, units, settings and users; documentation is added by others. `unpacked` has what
    is in the wheels; no copy is made of it, so nothing may change it."""
    shutil.copytree(PACKAGING / part / "root", root)
    home = root / PRIVATE / part
    shutil.copytree(unpacked, home, copy_function=os.link)
    for package in (part, "wire"):
        _copy_package(ROOT / package, home / package)
    for name, module in PROGRAMS[part].items():
        text = _LAUNCHER.format(python=target.python, name=name, part=part, private=PRIVATE, module=module)
        _write(root / "usr/bin" / name, text.encode(), 0o755)
    settings = (ROOT / f"docs/{part}.yaml").read_bytes()
    _write(root / f"etc/weighbridge/{part}.yaml", settings)
    (root / f"etc/weighbridge/{part}.d").mkdir()
    for unit in units(part):
        path = root / "usr/lib/systemd/system" / unit.relative_to(ROOT / "systemd")
        _write(path, unit.read_bytes())
    _OF_ITS_OWN[part](root)


def units(part: str) -> list[Path]:
    """This part's files below systemd/, drop-ins too. Every file there has to belong to a part."""
    of_no_part = []
    found = []
    for file in sorted((ROOT / "systemd").rglob("*")):
        if file.is_dir() or file.suffix == ".md":
            continue
        name = file.relative_to(ROOT / "systemd").parts[0]
        if name.startswith(UNIT_PREFIXES[part]):
            found.append(file)
        elif not name.startswith(tuple(prefix for prefixes in UNIT_PREFIXES.values() for prefix in prefixes)):
            of_no_part.append(name)
    if of_no_part:
        raise PackagingError(f"systemd/: {', '.join(of_no_part)}: of which package? See UNIT_PREFIXES")
    return found


def installed_bytes(root: Path) -> int:
    return sum(path.lstat().st_size for path in root.rglob("*") if not path.is_dir())


def _copy_package(source: Path, copy: Path) -> None:
    for file in sorted(source.rglob("*")):
        if file.suffix in (".py", ".sql"):
            _write(copy / file.relative_to(source), file.read_bytes())
    if source.name == "wire" and not (copy / "v1/usage_pb2.py").exists():
        raise PackagingError("wire/v1 is not generated: ./dev setup")


def _probes(root: Path) -> None:
    """The loader with its programs inside; engine bcc's text, with the headers a directory above as it expects them."""
    built = ROOT / "bpf/build/weighbridge-probes"
    if not built.exists():
        raise PackagingError("bpf/build/weighbridge-probes is not built: ./dev setup says what it needs")
    loader = root / "usr/bin/weighbridge-probes"
    _write(loader, built.read_bytes(), 0o755)
    subprocess.run(["strip", "--strip-unneeded", "--remove-section=.comment", loader], check=True)
    for name in ("records.h", "network.bpf.h", "overflow.bpf.h"):
        _write(root / PRIVATE / "bpf" / name, (ROOT / "bpf" / name).read_bytes())
    for file in sorted((ROOT / "bpf/bcc").iterdir()):
        if file.is_file():
            _write(root / PRIVATE / "bpf/bcc" / file.name, file.read_bytes())


def _share(root: Path) -> None:
    """Dashboards and rules are about both parts; the centre is where they are looked for."""
    for file in sorted((PACKAGING / "share").rglob("*")):
        if file.is_file():
            _write(root / "usr/share/weighbridge" / file.relative_to(PACKAGING / "share"), file.read_bytes())


def _schema(root: Path) -> None:
    """The migrations, one after the other: what a fresh ledger runs."""
    _write(root / "usr/share/weighbridge/schema.sql", ddl().encode())


_OF_ITS_OWN = {"agent": _probes, "collector": _share, "ledger": _schema}


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
