"""/usr/share: manual pages, completions, what changed, licences, the bill of materials."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

from checkout import MAINTAINER, ROOT, Target
from completions import files
from manual import page
from programs import programs
from sbom import bill, notices
from wheels import Wheel

_CHANGES = """\
{name} ({version}) unstable; urgency=medium

  * Weighbridge {release}. What changed for operators is in
    /usr/share/doc/{name}/changelog.gz.

 -- {maintainer}  {date}
"""


def document(part: str, kind: str, target: Target, wheels: list[Wheel], root: Path) -> str:
    """Writes below `root`; returns the bill of materials, which also lies beside the package."""
    name = f"weighbridge-{part}"
    found = programs(part)
    names = sorted(program.words[0] for program in found)
    for program in found:
        text = page(program, names, target)
        _put(root / f"usr/share/man/man8/{program.words[0]}.8.gz", text, compress=True)
        for path, completion in files(program, kind):
            _put(root / path, completion)
    doc = root / "usr/share/doc" / name
    _put(doc / "changelog.gz", (ROOT / "CHANGELOG.md").read_text(), compress=True)
    changes = _CHANGES.format(
        name=name,
        version=f"{target.version}-{target.release('deb')}",
        release=target.version,
        maintainer=MAINTAINER,
        date=format_datetime(datetime.fromtimestamp(target.epoch_seconds, UTC)),
    )
    if kind == "deb":
        _put(doc / "changelog.Debian.gz", changes, compress=True)
    apache = "/usr/share/common-licenses/Apache-2.0"
    if kind == "rpm":
        apache = f"/usr/share/licenses/{name}/LICENSE"
        _put(root / apache.lstrip("/"), (ROOT / "LICENSE").read_text())
    _put(doc / "copyright", notices(part, wheels, apache))
    materials = bill(part, kind, target, wheels)
    _put(doc / "sbom.cdx.json", materials)
    return materials


def _put(path: Path, text: str, compress: bool = False) -> None:
    """Compressed as Debian wants it: no name and no time in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0) if compress else text.encode())
