"""Two builds are the same to the bit, wherever they were made."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.packaging.built import PARTS, ROOT, Built, build


def test_a_copy_of_the_checkout_elsewhere_gives_the_same_packages(built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "another/checkout"
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    generated = [str(path.relative_to(ROOT)) for path in (ROOT / "wire/v1").glob("*.py")]
    for name in [*filter(None, listed.split("\0")), *generated]:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    version = subprocess.check_output([ROOT / "bpf/build/weighbridge-probes", "--version"], text=True)
    release = version.split()[1].partition("+")[0]
    subprocess.run(["make", "-s", "-C", copy / "bpf", f"VERSION={release}"], check=True, capture_output=True)
    commit = subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True)

    both = ("--part", "agent", "--part", "collector")
    build(tmp_path / "out", *both, checkout=copy, epoch=int(commit))
    # Its tree is the same in both formats; compressing half a gigabyte once is enough.
    build(tmp_path / "out", "--part", "ledger", "--format", "rpm", checkout=copy, epoch=int(commit))
    first, second = digests(built.directory), digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    assert len(first) == 4 * len(PARTS)
    assert len(second) == len(first) - 2
    assert second.items() <= first.items()


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
