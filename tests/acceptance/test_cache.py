"""Two runs at once share what is built: one builds it, both use it at the same time."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

import pytest

from tests.acceptance.machines.cache import Cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Cache()


def test_what_one_builds_the_other_uses_as_soon_as_it_is_there(cache: Cache) -> None:
    users, builds = 4, []
    (cache.directory / "locks").mkdir()
    all_use_it = threading.Barrier(users, timeout=20)

    def build(directory: Path) -> None:
        builds.append(directory)
        (directory / "content").write_text("built")

    def use() -> None:
        with cache.entry("kind", "key", build) as directory:
            assert (directory / "content").read_text() == "built"
            all_use_it.wait()

    threads = [threading.Thread(target=use) for _ in range(users)]
    with (cache.directory / "locks/kind-key").open("w") as somebody:
        # As one that looks whether it is there: all of them ask before any can build.
        fcntl.flock(somebody, fcntl.LOCK_SH)
        for thread in threads:
            thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert not all_use_it.broken, "somebody waited until the others were done"


def test_what_failed_to_build_is_built_by_the_next(cache: Cache) -> None:
    def fails(_: Path) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), cache.entry("kind", "key", fails):
        pass
    with cache.entry("kind", "key", lambda directory: (directory / "content").touch()) as directory:
        assert [file.name for file in directory.iterdir()] == ["content"]
