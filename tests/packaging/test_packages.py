"""What is in a package, and what is not."""

from __future__ import annotations

import gzip
import hashlib
import re
import stat
from typing import IO

import pytest
import yaml

from tests.packaging.built import PARTS, ROOT, Built, Entry

MOST_BYTES_OF_THE_AGENT = 60_000_000


def sha256(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def digest_of(entry: Entry) -> str:
    assert entry.file is not None
    with entry.file.open("rb") as file:
        return sha256(file)


def test_the_agent_with_its_probes_takes_at_most_60_mb(built: Built) -> None:
    files = [entry.content for entry in built.entries("agent").values() if entry.content is not None]
    assert len(files) > 300
    assert sum(map(len, files)) <= MOST_BYTES_OF_THE_AGENT


@pytest.mark.parametrize("part", PARTS)
def test_everything_is_root_s_and_only_programs_can_be_run(built: Built, part: str) -> None:
    for path, entry in built.entries(part).items():
        assert entry.owner == "root:root", path
        wanted = 0o755 if entry.file is None or path.startswith("/usr/bin/") else 0o644
        assert stat.S_IMODE(entry.mode) == wanted, path


@pytest.mark.parametrize("part", PARTS)
def test_modules_lie_in_a_tree_of_the_part_s_own(built: Built, part: str) -> None:
    outside = {
        path
        for path, entry in built.entries(part).items()
        if entry.file is not None and re.search(r"\.(py|so)\b", path)
        if not path.startswith((f"/usr/lib/weighbridge/{part}/", "/usr/lib/weighbridge/bpf/bcc/"))
    }
    assert outside == set()


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_packaged_that_does_not_run(built: Built, part: str) -> None:
    own = f"/usr/lib/weighbridge/{part}/"
    modules = [path.removeprefix(own) for path in built.entries(part) if path.startswith(own)]
    assert f"{part}/cli.py" in modules
    assert "wire/v1/usage_pb2.py" in modules
    strangers = [p for p in modules if re.search(r"(^|/)(tests?|pip|__pycache__)/|\.(pyc|pyi|c|h)$", p)]
    assert strangers == []
    others = {"agent", "collector", "ledger", "bench"} - {part}
    assert {path.split("/")[0] for path in modules} & others == set()


@pytest.mark.parametrize("part", PARTS)
def test_modules_of_wheels_are_the_published_bytes(built: Built, part: str) -> None:
    """What an SBOM's hash vouches for is what is installed."""
    import zipfile

    from tests.packaging.built import WHEELS

    entries = built.entries(part)
    compared = 0
    (store,) = WHEELS.glob(f"{part}-3.11-*")
    for file in store.glob("*.whl"):
        with zipfile.ZipFile(file) as wheel:
            for name in wheel.namelist():
                entry = entries.get(f"/usr/lib/weighbridge/{part}/{name}")
                if entry and entry.file is not None:
                    with entry.file.open("rb") as installed, wheel.open(name) as published:
                        assert sha256(installed) == sha256(published), name
                    compared += 1
    assert compared > 200


@pytest.mark.parametrize("part", PARTS)
def test_settings_are_conffiles_that_say_nothing_and_explain_everything(built: Built, part: str) -> None:
    text = built.entries(part)[f"/etc/weighbridge/{part}.yaml"].content
    assert text is not None
    assert yaml.safe_load(text) is None
    assert text.count(b"#") > 30
    assert f"/etc/weighbridge/{part}.d" in built.entries(part)
    assert built.conffiles(part) == [f"/etc/weighbridge/{part}.yaml"]


@pytest.mark.parametrize("part", PARTS)
def test_deb_and_rpm_install_the_same(built: Built, part: str) -> None:
    files = {path: entry for path, entry in built.entries(part).items() if entry.file is not None}
    others = {path: digest for path, (_, _, digest) in built.rpm_entries(part).items() if digest}
    renamed = {
        path.replace("zsh/vendor-completions", "zsh/site-functions"): entry for path, entry in files.items()
    }
    of_deb_alone = {
        path for path in renamed if path.startswith("/usr/share/lintian/") or "changelog.Debian" in path
    }
    assert renamed.keys() - others.keys() == of_deb_alone
    assert {
        path for path in others.keys() - renamed.keys() if not path.startswith("/usr/share/licenses/")
    } == set()
    different = {path for path in others.keys() & renamed.keys() if digest_of(renamed[path]) != others[path]}
    doc = f"/usr/share/doc/weighbridge-{part}"
    assert different <= {f"{doc}/copyright", f"{doc}/sbom.cdx.json"}


@pytest.mark.parametrize("part", PARTS)
def test_each_package_needs_the_python_it_was_made_for_and_no_other(built: Built, part: str) -> None:
    assert "python3.11" in built.control(part, "Depends").split(", ")
    assert built.control(part, "Version").endswith("+py3.11")
    for path, entry in built.entries(part).items():
        if path.startswith("/usr/bin/") and entry.content and entry.content.startswith(b"#!"):
            assert entry.content.startswith(b"#!/usr/bin/python3.11 -IS\n"), path


def test_every_unit_is_in_exactly_one_package(built: Built) -> None:
    wanted = sorted(
        str(file.relative_to(ROOT / "systemd"))
        for file in (ROOT / "systemd").rglob("*")
        if file.is_file() and file.suffix != ".md"
    )
    home = "/usr/lib/systemd/system/"
    found = [
        path.removeprefix(home)
        for part in PARTS
        for path, entry in built.entries(part).items()
        if path.startswith(home) and entry.file is not None
    ]
    assert sorted(found) == wanted


def test_dashboards_and_rules_are_where_the_centre_is(built: Built) -> None:
    shared = ROOT / "packaging/share"
    wanted = {f"/usr/share/weighbridge/{p.relative_to(shared)}" for p in shared.rglob("*") if p.is_file()}
    assert wanted <= built.entries("collector").keys()


def test_the_ledgers_tables_are_there_to_read_as_its_migrations_make_them(built: Built) -> None:
    entries = built.entries("ledger")
    text = entries["/usr/share/weighbridge/schema.sql"].content
    assert text is not None
    migrations = sorted((ROOT / "ledger/store/schema").glob("*.sql"))
    assert migrations
    for file in migrations:
        assert f"\n-- {file.name}\n".encode() + file.read_bytes() in text
        installed = entries[f"/usr/lib/weighbridge/ledger/{file.relative_to(ROOT)}"].content
        assert installed == file.read_bytes()
    assert [text.index(file.name.encode()) for file in migrations] == sorted(
        text.index(file.name.encode()) for file in migrations
    )


def test_engine_bcc_finds_its_headers_a_directory_above(built: Built) -> None:
    entries = built.entries("agent")
    home = "/usr/lib/weighbridge/bpf/"
    included = {
        name.decode()
        for path, entry in entries.items()
        if path.startswith(home) and entry.content
        for name in re.findall(rb'^#include "(.+)"', entry.content, re.MULTILINE)
    }
    assert "records.h" in included
    for name in included:
        assert {f"{home}bcc/{name}", f"{home}{name}"} & entries.keys(), name
    sources = {path.name for path in (ROOT / "bpf/bcc").iterdir() if path.is_file()}
    assert {f"{home}bcc/{name}" for name in sources} <= entries.keys()


@pytest.mark.parametrize("part", PARTS)
def test_every_time_in_a_package_is_the_commit_s(built: Built, part: str) -> None:
    assert len({entry.modified_unix for entry in built.entries(part).values()}) == 1


@pytest.mark.parametrize("part", PARTS)
def test_the_licence_of_every_wheel_is_named(built: Built, part: str) -> None:
    entries = built.entries(part)
    text = entries[f"/usr/share/doc/weighbridge-{part}/copyright"].content
    assert text is not None
    # Some are for Windows alone.
    names = re.findall(
        r"^([a-z0-9-]+)==(?!.*'win32')", (ROOT / f"requirements/{part}.txt").read_text(), re.MULTILINE
    )
    assert len(names) > 8
    for name in names:
        assert re.search(rf"^Comment: {name} [0-9]", text.decode(), re.MULTILINE), name


@pytest.mark.parametrize("part", PARTS)
def test_what_changed_is_there_to_read(built: Built, part: str) -> None:
    text = built.entries(part)[f"/usr/share/doc/weighbridge-{part}/changelog.gz"].content
    assert text is not None
    assert gzip.decompress(text) == (ROOT / "CHANGELOG.md").read_bytes()
