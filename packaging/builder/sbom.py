"""What is in a package: for scanners (CycloneDX 1.5, JSON), and for whoever has to know the licences."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkout import HOMEPAGE, MAINTAINER, PackagingError, Target
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheels import Wheel, environment

LICENSE = "Apache-2.0"

_FULL_APACHE = "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION"
_LINKED_INTO_PROBES = {
    "libbpf": "LGPL-2.1-only OR BSD-2-Clause",
    "libelf": "GPL-2.0-or-later OR LGPL-3.0-or-later",
    "zlib": "Zlib",
}
_OLDER_NAMES = {
    "3-Clause BSD License": "BSD-3-Clause",
    "MIT": "MIT",
    "Apache-2.0": "Apache-2.0",
    "MPL-2.0": "MPL-2.0",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",  # lz4, as its text says
}
"""Of wheels from before License-Expression."""


def bill(part: str, kind: str, target: Target, wheels: list[Wheel]) -> str:
    """The same wheels give the same text."""
    name, version = f"weighbridge-{part}", f"{target.version}-{target.release(kind)}"
    reference = f"pkg:{kind}/weighbridge/{name}@{version}?arch={target.architecture}"
    components = [_component(wheel) for wheel in wheels]
    if part == "agent":
        components += [_linked(library, terms) for library, terms in _LINKED_INTO_PROBES.items()]
    direct = {"ref": reference, "dependsOn": sorted(component["bom-ref"] for component in components)}
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": uuid.uuid5(
            uuid.NAMESPACE_URL, f"{reference} {[wheel.sha256 for wheel in wheels]}"
        ).urn,
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(target.epoch_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application",
                "bom-ref": reference,
                "name": name,
                "version": version,
                "purl": reference,
                "licenses": [{"expression": LICENSE}],
            },
        },
        "components": components,
        "dependencies": [direct, *_dependencies(wheels, target)],
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def license_of_all(part: str, wheels: list[Wheel]) -> str:
    """One SPDX expression."""
    others = {_license(wheel) for wheel in wheels}
    if part == "agent":
        others |= set(_LINKED_INTO_PROBES.values())
    terms = sorted({term for other in others for term in other.split(" AND ")} - {LICENSE})
    return " AND ".join([LICENSE, *(f"({term})" if " OR " in term else term for term in terms)])


def notices(part: str, wheels: list[Wheel], apache: str) -> str:
    """Debian's copyright file: a paragraph for each component with its licence as the wheel brings it; `apache` is the
    file that has the text of that one."""
    paragraphs = [
        f"Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nSource: {HOMEPAGE}",
        f"Files: *\nCopyright: {MAINTAINER}\nLicense: {LICENSE}\n Its text: {apache}",
    ]
    for wheel in wheels:
        texts = [text.decode() for path, text in sorted(wheel.about().items()) if _is_license(path)]
        texts = [f"Its text: {apache}" if _FULL_APACHE in text else text for text in texts]
        if not texts:
            raise PackagingError(f"{wheel.file.name}: brings no text of its licence")
        holders = re.findall(r"^\s*(Copyright .*\S)", "\n".join(texts), re.MULTILINE)
        author = f"the authors of {wheel.locked.name}"
        body = "\n".join(
            f" {line.rstrip()}" if line.strip() else " ." for line in "\n".join(texts).splitlines()
        )
        paragraphs.append(
            f"Files: usr/lib/weighbridge/{part}/*\nComment: {wheel.locked.name} {wheel.locked.version}\n"
            f"Copyright: {holders[0] if holders else author}\nLicense: {_license(wheel).replace(' OR ', ' or ')}\n{body}"
        )
    if part == "agent":
        for library, terms in _LINKED_INTO_PROBES.items():
            paragraphs.append(
                f"Files: usr/bin/weighbridge-probes\nComment: {library} {_installed_version(library)}, linked in\n"
                f"Copyright: the authors of {library}\nLicense: {terms.replace(' OR ', ' or ')}"
            )
    return "\n\n".join(paragraphs) + "\n"


def _component(wheel: Wheel) -> dict[str, Any]:
    name, version = canonicalize_name(wheel.locked.name), wheel.locked.version
    reference = f"pkg:pypi/{name}@{version}"
    component = {
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "version": version,
        "purl": reference,
        "hashes": [{"alg": "SHA-256", "content": wheel.sha256}],
        "licenses": [{"expression": _license(wheel)}],
        "properties": [{"name": "weighbridge:wheel", "value": wheel.file.name}],
    }
    inner = list(_inside(wheel, reference))
    return {**component, "components": inner} if inner else component


def _inside(wheel: Wheel, reference: str) -> Iterator[dict[str, Any]]:
    """What was compiled into the wheel, as far as the wheel says."""
    seen = set()
    for path, content in sorted(wheel.about().items()):
        if not path.startswith("sboms/"):
            continue
        for component in json.loads(content).get("components", []):
            about = {key: component[key] for key in ("name", "version", "purl") if key in component}
            key = tuple(about.values())
            if "name" in about and key not in seen and about.get("purl") != reference:
                seen.add(key)
                yield {"type": "library", "bom-ref": f"{reference}#{len(seen)}", **about}


def _linked(library: str, terms: str) -> dict[str, Any]:
    version = _installed_version(library)
    return {
        "type": "library",
        "bom-ref": f"pkg:generic/{library}@{version}",
        "name": library,
        "version": version,
        "purl": f"pkg:generic/{library}@{version}",
        "licenses": [{"expression": terms}],
    }


def _installed_version(library: str) -> str:
    """Of the static library on the machine that builds."""
    for file in sorted(Path("/usr").glob(f"lib*/**/pkgconfig/{library}.pc")):
        found = re.search(r"^Version:\s*(\S+)", file.read_text(), re.MULTILINE)
        if found:
            return found[1]
    raise PackagingError(
        f"no {library}.pc below /usr/lib*: is the development package of {library} installed?"
    )


def _dependencies(wheels: list[Wheel], target: Target) -> Iterator[dict[str, Any]]:
    there = {canonicalize_name(wheel.locked.name): wheel for wheel in wheels}
    for name, wheel in sorted(there.items()):
        wanted = set()
        for line in wheel.metadata().get_all("Requires-Dist", []):
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({**environment(target), "extra": ""}):
                wanted.add(canonicalize_name(needed.name))
        yield {
            "ref": f"pkg:pypi/{name}@{wheel.locked.version}",
            "dependsOn": sorted(f"pkg:pypi/{n}@{there[n].locked.version}" for n in wanted & there.keys()),
        }


def _license(wheel: Wheel) -> str:
    metadata = wheel.metadata()
    stated = metadata.get("License-Expression")
    if stated:
        return str(stated)
    for name in (metadata.get("License", ""), *metadata.get_all("Classifier", [])):
        if name in _OLDER_NAMES:
            return _OLDER_NAMES[name]
    raise PackagingError(f"{wheel.file.name}: under which licence? Teach sbom.py its name")


def _is_license(path: str) -> bool:
    return path.startswith("licenses/") or re.match(r"(LICEN[CS]E|NOTICE|COPYING)", path) is not None
