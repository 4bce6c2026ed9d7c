"""The bill of materials is CycloneDX, and names what the lock names."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from tests.packaging.built import PARTS, ROOT, WHEELS, Built


def bill(built: Built, part: str) -> dict[str, Any]:
    content = built.entries(part)[f"/usr/share/doc/weighbridge-{part}/sbom.cdx.json"].content
    assert content is not None
    return dict(json.loads(content))


def validator() -> jsonschema.Draft7Validator:
    """CycloneDX's own schema, out of its own library."""
    home = files("cyclonedx.schema") / "_res"
    load = {
        name: json.loads((home / name).read_text())
        for name in (
            "bom-1.5.SNAPSHOT.schema.json",
            "spdx.SNAPSHOT.schema.json",
            "jsf-0.82.SNAPSHOT.schema.json",
        )
    }
    registry: Registry[Any] = Registry().with_resources(
        (f"http://cyclonedx.org/schema/{name}", Resource(document, DRAFT7)) for name, document in load.items()
    )
    return jsonschema.Draft7Validator(load["bom-1.5.SNAPSHOT.schema.json"], registry=registry)


@pytest.mark.parametrize("part", PARTS)
def test_it_is_what_cyclonedx_says_it_should_be(built: Built, part: str) -> None:
    document = bill(built, part)
    check = validator()
    assert [error.message for error in check.iter_errors(document)] == []
    assert not check.is_valid({**document, "bomFormat": "another"})


@pytest.mark.parametrize("part", PARTS)
def test_every_wheel_of_the_package_is_in_it_with_the_hash_of_the_lock(built: Built, part: str) -> None:
    lock = (ROOT / f"requirements/{part}.txt").read_text()
    wheels = [c for c in bill(built, part)["components"] if c["purl"].startswith("pkg:pypi/")]
    assert len(wheels) > 8
    (store,) = WHEELS.glob(f"{part}-3.11-*")
    assert len(wheels) == len(list(store.glob("*.whl")))
    for component in wheels:
        assert re.search(rf"^{component['name']}=={re.escape(component['version'])}\b", lock, re.MULTILINE)
        (digest,) = [entry["content"] for entry in component["hashes"]]
        assert f"--hash=sha256:{digest}" in lock
        (name,) = [entry["value"] for entry in component["properties"]]
        assert hashlib.sha256((store / name).read_bytes()).hexdigest() == digest


def test_what_is_compiled_in_is_named_too(built: Built) -> None:
    names = {component["name"] for component in bill(built, "agent")["components"]}
    assert {"libbpf", "libelf", "zlib"} <= names
    (cryptography,) = [c for c in bill(built, "agent")["components"] if c["name"] == "cryptography"]
    assert any("openssl" in inner["name"].lower() for inner in cryptography["components"])


@pytest.mark.parametrize("part", PARTS)
def test_it_also_lies_beside_the_package(built: Built, part: str) -> None:
    beside = built.deb(part).with_name(f"{built.deb(part).name}.cdx.json")
    assert json.loads(beside.read_text()) == bill(built, part)
