"""The distributions' own checkers have nothing to say, but for what the overrides explain."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.built import PARTS, ROOT, Built

ENGINE = "usr/lib/weighbridge/ledger/chdb/_chdb.abi3.so"


def without_engine(deb: Path, scratch: Path) -> Path:
    """The same package less ClickHouse's library, which takes lintian two minutes to read."""
    tree = scratch / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    (tree / ENGINE).unlink()
    sums = tree / "DEBIAN/md5sums"
    left = [line for line in sums.read_text().splitlines(keepends=True) if not line.endswith(f" {ENGINE}\n")]
    sums.write_text("".join(left))
    copy = scratch / deb.name
    how = ["-Zzstd", "-z1", "--no-uniform-compression", "--root-owner-group"]
    subprocess.run(["dpkg-deb", *how, "--build", tree, copy], check=True, capture_output=True)
    shutil.rmtree(tree)
    return copy


@pytest.mark.parametrize("part", PARTS)
def test_lintian_finds_no_error_and_no_warning(built: Built, part: str, tmp_path: Path) -> None:
    deb = without_engine(built.deb(part), tmp_path) if part == "ledger" else built.deb(part)
    command = ["lintian", "--no-cfg", "--allow-root", "--fail-on", "error,warning", deb]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"^[EW]:", done.stdout, re.MULTILINE)


def test_rpmlint_finds_no_error_and_no_warning(built: Built) -> None:
    command = ["rpmlint", "--config", ROOT / "packaging/rpmlint.toml", *map(built.rpm, PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert f"{len(PARTS)} packages and 0 specfiles checked; 0 errors, 0 warnings" in done.stdout, (
        done.stdout + done.stderr
    )


def test_every_exception_says_why() -> None:
    overrides = sorted((ROOT / "packaging").glob("*/root/usr/share/lintian/overrides/*"))
    assert len(overrides) == len(PARTS)
    for file in (*overrides, ROOT / "packaging/rpmlint.toml"):
        assert file.read_text().startswith("#"), file
        for paragraph in re.split(r"(?m)^(?=\s*#)", file.read_text()):
            assert not paragraph.strip() or paragraph.lstrip().startswith("#"), paragraph
