"""The ledger's settings: what cannot work is refused before anything runs, with the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import config
from ledger.config import COLLECTORS_LOG, Server, Settings, read, split_dsn
from wire.daemon.settings import SettingsError


def of(directory: Path, text: str) -> Settings:
    (directory / "ledger.yaml").write_text(text)
    return read(directory / "ledger.yaml")


def test_without_any_file_everything_is_at_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "ledger.yaml")
    assert read(None) == Settings()
    assert read(None).source.log_directory == COLLECTORS_LOG
    (tmp_path / "ledger.yaml").write_text("rollup: {settle: 7s}\n")
    assert read(None).rollup.settle == 7


def test_what_is_its_own_lies_below_the_state_directory(tmp_path: Path) -> None:
    found = of(tmp_path, "state_dir: /srv/wb")
    assert found.database_directory == Path("/srv/wb/db")
    assert found.lock_file == Path("/srv/wb/lock")
    assert found.control_socket == Path("/srv/wb/ledger.sock")


def test_without_a_dsn_the_engine_is_inside_this_program() -> None:
    assert Settings().store.server is None


@pytest.mark.parametrize(
    ("dsn", "server"),
    [
        ("http://h", Server(False, "h", 8_123, "default", "own")),
        ("https://h", Server(True, "h", 8_443, "default", "own")),
        ("http://me@h:9/billing", Server(False, "h", 9, "me", "billing")),
        ("https://a%40b@[::1]:9/", Server(True, "::1", 9, "a@b", "own")),
    ],
)
def test_a_dsn_says_where_who_and_what(dsn: str, server: Server) -> None:
    assert split_dsn(dsn, "own") == server


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("store: {dsn: 'clickhouse://h:9000/db'}", "store.dsn: ClickHouse is spoken to over HTTP"),
        ("store: {dsn: 'http:///db'}", "store.dsn: names no host"),
        ("store: {dsn: 'http://h:99999'}", "store.dsn: no URL"),
        ("store: {dsn: 'http://h/a-b'}", "store.dsn: a database has"),
        ("store: {dsn: 'http://h/?compress=1'}", "store.dsn: takes neither ?options"),
        ("store: {password_file: /p}", "store.password_file: only a server has a password"),
        ("store: {database: '1; DROP'}", "store.database: up to 64 letters"),
        ("store: {memory: 1MiB}", "store.memory: 256MiB or more"),
        ("rollup: {every: 2h}", "rollup.every: 1s to 1h"),
        ("source: {kafka: {topic: 'a b'}}", "source.kafka.topic: up to 200"),
        ("periods: {length: week}", "ledger.yaml:1: periods.length"),
        ("local_port: {port: 70000}", "ledger.yaml:1: local_port.port"),
        ("log_directory: /x", "unknown key; it belongs under `source.log_directory`"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as error:
        of(tmp_path, text)
    assert says in str(error.value)
    assert str(tmp_path / "ledger.yaml") in str(error.value)


def test_a_password_in_a_dsn_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        of(tmp_path, "store: {dsn: 'http://me:hunter22@h'}")
    assert "store.password_file" in str(error.value)
    assert "hunter22" not in str(error.value)


@given(st.text(max_size=60))
def test_no_text_makes_splitting_a_dsn_raise_anything_else(text: str) -> None:
    for dsn in (text, f"http://{text}"):
        try:
            server = split_dsn(dsn, "own")
        except ValueError:
            continue
        assert server.host
        assert 0 < server.port < 65_536
