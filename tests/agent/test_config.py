"""The agent's settings: what cannot work is refused before anything runs, with the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import config
from agent.config import Settings, read
from wire.daemon.settings import SettingsError


def of(directory: Path, text: str) -> Settings:
    (directory / "agent.yaml").write_text(text)
    return read(directory / "agent.yaml")


def test_without_any_file_everything_is_at_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "agent.yaml")
    assert read(None) == Settings()
    (tmp_path / "agent.yaml").write_text("host_name: web-1\n")
    assert read(None).host_name == "web-1"


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no such file.*--config"):
        read(tmp_path / "agent.yaml")


def test_what_is_written_is_what_is_used(tmp_path: Path) -> None:
    found = of(
        tmp_path,
        "run_dir: /run/other\n"
        "meter: {interval: 1m, memory_sample: 500ms}\n"
        "spool: {max_bytes: 2GiB}\n"
        "ship: {collectors: ['a:1', 'b:2']}\n"
        "owners: {rules: [{label: {team: 'web-*'}, tenant: acme}]}\n",
    )
    assert found.control_socket == Path("/run/other/agent.sock")
    assert (found.meter.interval, found.meter.memory_sample) == (60, 0.5)
    assert found.spool.max_bytes == 2 << 30
    assert found.ship.collectors == ["a:1", "b:2"]
    assert (found.owners.rules[0].label, found.owners.rules[0].tenant) == ({"team": "web-*"}, "acme")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("meter: {interval: 500ms}", "meter.interval: 0.5 s; between 1s and 1h"),
        ("meter: {interval: 2h}", "meter.interval: 7200 s; between 1s and 1h"),
        ("meter: {memory_sample: 10ms}", "meter.memory_sample: 0.01 s; between 100ms"),
        ("meter: {interval: 2s, memory_sample: 3s}", "meter.memory_sample: 3 s; between 100ms"),
        ("spool: {max_bytes: 1MiB}", "spool.max_bytes: at least 16MiB"),
        ("owners: {rules: [{path: /x}]}", "owners.rules[1]: give exactly one of `tenant` and `tenant_from`"),
        ("owners: {default: ../etc}", "owners.default"),
        ("read: {hierarchy: v3}", "agent.yaml:1: read.hierarchy"),
        ("local_port:\n  port: 65536", "agent.yaml:2: local_port.port"),
        ("interval: 5s", "agent.yaml:1: interval: unknown key; it belongs under `meter.interval`"),
        (
            "owners:\n  rules:\n  - tennant: x",
            "agent.yaml:3: owners.rules.0.tennant: unknown key; did you mean",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as error:
        of(tmp_path, text)
    assert says in str(error.value)
    assert str(tmp_path / "agent.yaml") in str(error.value)
