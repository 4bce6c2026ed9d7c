"""The distributions' own checkers have nothing to say, but for what the overrides explain."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.packaging.built import PARTS, ROOT, Built


@pytest.mark.parametrize("part", PARTS)
def test_lintian_finds_no_error_and_no_warning(built: Built, part: str) -> None:
    command = ["lintian", "--no-cfg", "--allow-root", "--fail-on", "error,warning", built.deb(part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"^[EW]:", done.stdout, re.MULTILINE)


def test_rpmlint_finds_no_error_and_no_warning(built: Built) -> None:
    command = ["rpmlint", "--config", ROOT / "packaging/rpmlint.toml", *map(built.rpm, PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert "2 packages and 0 specfiles checked; 0 errors, 0 warnings" in done.stdout, (
        done.stdout + done.stderr
    )


def test_every_exception_says_why() -> None:
    overrides = sorted((ROOT / "packaging").glob("*/root/usr/share/lintian/overrides/*"))
    assert len(overrides) == len(PARTS)
    for file in (*overrides, ROOT / "packaging/rpmlint.toml"):
        assert file.read_text().startswith("#"), file
        for paragraph in re.split(r"(?m)^(?=\s*#)", file.read_text()):
            assert not paragraph.strip() or paragraph.lstrip().startswith("#"), paragraph
