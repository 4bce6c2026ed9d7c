"""The images of packaging/container, built without an engine's daemon, a registry or a network.

buildah builds the stages that install the packages; those come from the run's own build instead of from the stage `build`.
What of Debian the stages need was fetched before (`base.sh`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.machines.cache import Cache, build_step, key_of
from tests.packaging.apart import Apart
from tests.packaging.built import LIGHT, ROOT, Built

CONTAINERFILE = ROOT / "packaging/container/Containerfile"
BASE_SCRIPT = Path(__file__).with_name("base.sh")
BASE = "localhost/base"
BUILD_SECONDS = 300


@dataclass(frozen=True)
class Image:
    """`config` is what the image says of itself, as OCI has it; `root` its file system, mounted where it was built."""

    name: str
    config: dict[str, Any]
    root: Path
    size_bytes: int


def stages() -> dict[str, str]:
    """The build file's stages by name, each with the arguments from before the first."""
    head, *texts = re.split(r"^(?=FROM )", CONTAINERFILE.read_text(), flags=re.MULTILINE)
    return {text.split("\n", 1)[0].split()[-1]: head + text for text in texts}


def wanted_of_debian(built: Built) -> list[str]:
    """Packages that the installing stages and our own packages ask for by name."""
    names = set()
    for part in LIGHT:
        (install,) = re.findall(r"apt-get install ([^&]*)", stages()[part])
        names |= {word for word in install.split() if re.fullmatch(r"[a-z][a-z0-9.+-]+", word)}
        depends = built.control(part, "Depends").split(", ")
        names |= {re.sub(r" \(.*", "", need) for need in depends if "|" not in need}
    return sorted(names)


class Images:
    """Builds in `apart`."""

    def __init__(self, apart: Apart) -> None:
        self._apart = apart
        self._directory = apart.directory / "images"
        for name in ("tmp", "store", "run"):
            apart.seen(self._directory / name).mkdir(parents=True)

    def build(self, built: Built) -> dict[str, Image]:
        names = wanted_of_debian(built)
        with Cache().entry(
            "image_base", key_of(BASE_SCRIPT, *names), lambda to: build_step([BASE_SCRIPT, to, *names])
        ) as base:
            recipe = self._write("Base", "FROM scratch\nADD root.tar /\n")
            self._buildah("build", "--tag", BASE, "--file", recipe, base)
            return {part: self._install(part, built, base / "archive") for part in LIGHT}

    def _install(self, part: str, built: Built, archive: Path) -> Image:
        name = f"localhost/weighbridge-{part}"
        packages = self._directory / part
        (self._apart.seen(packages) / "src/dist").mkdir(parents=True)
        shutil.copy(built.deb(part), self._apart.seen(packages) / "src/dist")
        recipe = self._write(f"{part}.Containerfile", stages()[part])
        self._buildah(
            *("build", "--tag", name, "--file", recipe, "--build-arg", f"DEBIAN={BASE}"),
            *("--build-context", f"build={packages}", "--volume", f"{archive}:/archive:ro", packages),
        )
        config = json.loads(self._buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
        container = self._buildah("from", "--pull-never", name).strip()
        root = Path(self._buildah("mount", container).strip())
        return Image(name, config, root, _size_bytes(self._apart.seen(root)))

    def _write(self, name: str, text: str) -> Path:
        path = self._directory / name
        self._apart.seen(path).write_text(text)
        return path

    def _buildah(self, *words: str | Path) -> str:
        store = ["--root", self._directory / "store", "--runroot", self._directory / "run"]
        return self._apart.run(
            ["buildah", *store, "--storage-driver", "overlay", *words],
            seconds=BUILD_SECONDS,
            environment={"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self._directory / "tmp")},
        ).stdout


def _size_bytes(root: Path) -> int:
    """Of all files, each once."""
    files = {(found.st_dev, found.st_ino): found for found in map(os.lstat, root.rglob("*"))}
    return sum(found.st_size for found in files.values() if not stat.S_ISDIR(found.st_mode))
