"""A staged tree -> .deb and .rpm, by nfpm. Every file, mode and time is named; nothing is left to the machine that builds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from checkout import HOMEPAGE, MAINTAINER, PACKAGING, PackagingError, Target
from elf import Needs

KINDS = ("deb", "rpm")

_OWN_DIRECTORIES = (
    "usr/lib/weighbridge",
    "etc/weighbridge",
    "usr/share/weighbridge",
    "usr/share/doc/weighbridge-",
)
_SCRIPTS = {
    "deb": {
        "postinstall": ("prepare", "systemd_runs", "{part}/hand_over", "deb/postinst"),
        "preremove": ("systemd_runs", "{part}/end", "deb/prerm"),
        "postremove": ("systemd_runs", "forget", "purge", "deb/postrm"),
    },
    "rpm": {
        "postinstall": ("prepare", "rpm/post"),
        "posttrans": ("systemd_runs", "{part}/hand_over", "rpm/posttrans"),
        "preremove": ("systemd_runs", "{part}/end", "rpm/preun"),
        "postremove": ("systemd_runs", "forget", "rpm/postun"),
    },
}
"""nfpm's name of a script -> what it is put together from, below packaging/scripts/."""
_DEPENDS = {
    "deb": [
        "python{python}",
        "systemd | systemd-standalone-sysusers",
        "systemd | systemd-standalone-tmpfiles",
    ],
    "rpm": ["/usr/bin/python{python}", "python(abi) = {python}", "systemd"],
}


def pack(part: str, kind: str, target: Target, terms: str, root: Path, out: Path) -> Path:
    """The package's file, below `out`."""
    with tempfile.TemporaryDirectory() as scratch:
        description = {**_describe(part, kind, target, root, Path(scratch)), "license": terms}
        config = Path(scratch, "nfpm.yaml")
        config.write_text(json.dumps(description))
        name = _file_name(part, kind, target)
        command = [str(Path(sys.prefix, "bin/nfpm")), "package", "--config", str(config), "--packager", kind]
        done = subprocess.run(
            [*command, "--target", str(out / name)],
            env={**os.environ, "SOURCE_DATE_EPOCH": str(target.epoch_seconds)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise PackagingError(f"nfpm: {done.stderr.strip() or done.stdout.strip()}")
        return out / name


def _file_name(part: str, kind: str, target: Target) -> str:
    version = f"{target.version}-{target.release(kind)}"
    if kind == "deb":
        return f"weighbridge-{part}_{version}_{target.architecture}.deb"
    return f"weighbridge-{part}-{version}.{target.machine}.rpm"


def _describe(part: str, kind: str, target: Target, root: Path, scratch: Path) -> dict[str, Any]:
    """nfpm's settings."""
    said = yaml.safe_load((PACKAGING / part / "package.yaml").read_text())
    needs = Needs(root)
    depends = [line.format(python=target.python) for line in _DEPENDS[kind]]
    scripts = {
        when: str(_script(part, target, pieces, scratch / when)) for when, pieces in _SCRIPTS[kind].items()
    }
    common = {
        "name": said["name"],
        "arch": target.architecture,
        "platform": "linux",
        "version": target.version,
        "version_schema": "none",
        "release": target.release(kind),
        "section": "admin",
        "priority": "optional",
        "maintainer": MAINTAINER,
        "vendor": "Weighbridge",
        "homepage": HOMEPAGE,
        "mtime": _time(target),
        "disable_globbing": True,
        "depends": depends + (needs.debian() if kind == "deb" else needs.rpm()),
        "suggests": said["suggests"].get(kind, []),
        "contents": list(_contents(kind, target, root)),
    }
    if kind == "deb":
        return {
            **common,
            "description": f"{said['summary']}\n{said['description']}",
            "scripts": scripts,
            "deb": {"compression": said["compression"]},
        }
    return {
        **common,
        "description": said["description"].replace("\n.\n", "\n\n"),
        "changelog": str(_changelog(target, scratch)),
        "rpm": {
            "summary": said["summary"],
            "group": "Applications/System",
            "compression": "zstd",
            "buildhost": "localhost",
            "packager": MAINTAINER,
            "scripts": {"posttrans": scripts.pop("posttrans")},
        },
        "scripts": scripts,
    }


def _changelog(target: Target, scratch: Path) -> Path:
    """As nfpm reads it; Debian's is a file among the others."""
    note = "What changed for operators: /usr/share/doc/weighbridge-*/changelog.gz"
    entry = {
        "semver": f"{target.version}-{target.release('rpm')}",
        "date": _time(target),
        "packager": MAINTAINER,
        "changes": [{"note": note}],
    }
    path = scratch / "changelog.yaml"
    path.write_text(json.dumps([entry]))
    return path


def _time(target: Target) -> str:
    return datetime.fromtimestamp(target.epoch_seconds, UTC).isoformat()


def _contents(kind: str, target: Target, root: Path) -> Iterator[dict[str, Any]]:
    """Directories that others have, too, belong to nobody here."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if kind == "rpm" and name.startswith("usr/share/lintian"):
            continue
        entry: dict[str, Any] = {
            "dst": f"/{name}",
            "file_info": {"owner": "root", "group": "root", "mtime": _time(target)},
        }
        if path.is_symlink():
            yield {**entry, "src": str(path.readlink()), "type": "symlink"}
        elif path.is_dir():
            if name.startswith(_OWN_DIRECTORIES):
                entry["file_info"]["mode"] = 0o755
                yield {**entry, "type": "dir"}
        else:
            entry["file_info"]["mode"] = path.stat().st_mode & 0o777
            yield {**entry, "src": str(path), **_type(kind, name)}


def _type(kind: str, name: str) -> dict[str, str]:
    if name.startswith("etc/"):
        return {"type": "config|noreplace"}
    if name.startswith("usr/share/licenses/"):
        return {"type": "license"}
    if kind == "rpm" and name.startswith(("usr/share/doc/", "usr/share/man/")):
        return {"type": "doc"}
    return {}


def _script(part: str, target: Target, pieces: tuple[str, ...], path: Path) -> Path:
    text = f"#!/bin/sh\nset -e\npython=/usr/bin/python{target.python}\n"
    for piece in ("{part}/names", *pieces):
        source = PACKAGING / "scripts" / f"{piece.format(part=part)}.sh"
        text += re.sub(r"\A# shellcheck .*\n", "", source.read_text())
    path.write_text(text)
    return path
