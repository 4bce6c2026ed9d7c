"""One running collector for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with Site(tmp_path_factory.mktemp("door")) as site:
        site.prepare(collector={"validation": {"tenants": ["acme", "globex", "unattributed"]}})
        site.start_collector()
        yield Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
        assert site.collector is not None
        assert site.collector.poll() is None, f"the collector died:\n{site.journal('collector')}"
        # Whatever was thrown at it, what it holds is sound.
        assert site.command("collector", "log", "verify").returncode == 0
