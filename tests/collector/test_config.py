"""The collector's settings: what cannot work is refused before anything runs, with the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector import config
from collector.config import Settings, TenantPlan, read, split_address
from collector.errors import CollectorError
from wire.daemon.settings import Bytes, SettingsError


def of(directory: Path, text: str) -> Settings:
    (directory / "collector.yaml").write_text(text)
    return read(directory / "collector.yaml")


def test_without_any_file_everything_is_at_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "collector.yaml")
    assert read(None) == Settings()
    (tmp_path / "collector.yaml").write_text("limits: {streams: 7}\n")
    assert read(None).limits.streams == 7


def test_a_finding_in_the_default_file_names_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "collector.yaml")
    (tmp_path / "collector.yaml").write_text("tls: {key_file: /k}\n")
    with pytest.raises(SettingsError) as error:
        read(None)
    assert str(error.value).startswith(f"{tmp_path}/collector.yaml: tls: an external CA needs")


def test_directories_lie_below_the_state_directory_unless_named(tmp_path: Path) -> None:
    found = of(tmp_path, "state_dir: /srv/wb")
    assert (found.ca_dir, found.log_directory) == (Path("/srv/wb/ca"), Path("/srv/wb/log"))
    found = of(tmp_path, "state_dir: /srv/wb\ntls: {ca_dir: /ca}\nlog: {directory: /log}")
    assert (found.ca_dir, found.log_directory) == (Path("/ca"), Path("/log"))


def test_an_external_ca_is_all_four_settings_or_none(tmp_path: Path) -> None:
    four = {
        "certificate_file": "/c",
        "key_file": "/k",
        "client_ca_file": "/a",
        "trust_domain": "example.org",
    }
    assert of(tmp_path, "tls: " + str(four)).external_ca
    assert not of(tmp_path, "").external_ca
    for missing in four:
        some = {key: value for key, value in four.items() if key != missing}
        with pytest.raises(SettingsError, match="needs certificate_file, key_file, client_ca_file"):
            of(tmp_path, "tls: " + str(some))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("listen: {ingest: '9460'}", "listen.ingest: `9460` is no HOST:PORT such as 0.0.0.0:9460"),
        ("listen: {ingest: ''}", "listen.ingest"),
        ("listen: {enrolment: 'host:99999'}", "listen.enrolment: `host:99999` is no HOST:PORT"),
        ("limits: {in_flight: 257}", "collector.yaml:1: limits.in_flight"),
        ("validation:\n  tenants: acme", "collector.yaml:2: validation.tenants"),
        ("admission: {rate: 0}", "collector.yaml:1: admission.rate: expected a number >= 0.001"),
        ("admission: {burst: 61}", "collector.yaml:1: admission.burst: expected a number >= 62"),
        ("admission: {tenants: {acme: {rate: -1}}}", "admission.tenants.*.rate: expected a number >= 0.001"),
        (
            "admission: {tenants: {acme: {rat: 1}}}",
            "admission.tenants.acme.rat: unknown key; did you mean `rate`?",
        ),
        ("admission: {park: 5}", "admission.park: 0, or at least 1048576 bytes"),
        (
            "admission: {tenants: {acme: {park: 5}}}",
            "admission.tenants.acme.park: 0, or at least 1048576 bytes",
        ),
        ("ingest: x", "collector.yaml:1: ingest: unknown key; it belongs under `listen.ingest`"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as error:
        of(tmp_path, text)
    assert says in str(error.value)
    assert str(tmp_path / "collector.yaml") in str(error.value)


def test_a_plan_says_what_it_says_and_no_more(tmp_path: Path) -> None:
    found = of(tmp_path, "admission: {rate: 5, tenants: {acme: {rate: unlimited, park: 2MiB}}}").admission
    assert (found.rate, found.burst, found.park) == (5.0, None, 1 << 30)
    assert found.tenants == {"acme": TenantPlan(rate="unlimited", park=Bytes(2 << 20))}
    assert of(tmp_path, "admission: {park: 0}").admission.park == 0


def test_an_empty_enrolment_address_closes_that_door(tmp_path: Path) -> None:
    assert of(tmp_path, "listen: {enrolment: ''}").listen.enrolment == ""


def test_no_list_of_tenants_is_not_an_empty_list(tmp_path: Path) -> None:
    assert of(tmp_path, "validation: {tenants: null}").validation.tenants is None
    assert of(tmp_path, "validation: {tenants: []}").validation.tenants == []


@given(st.text(max_size=20), st.integers(0, 65_535))
def test_an_address_splits_at_its_last_colon(host: str, port: int) -> None:
    assert split_address(f"{host}:{port}") == (host, port)


@given(st.text(max_size=30))
def test_no_text_makes_splitting_an_address_raise_anything_else(text: str) -> None:
    try:
        _, port = split_address(text)
    except CollectorError:
        return
    assert 0 <= port <= 65_535


def test_digits_that_are_no_number_are_no_port() -> None:
    for text in ("host:²", f"host:{'9' * 5_000}", "host:-1", "host: 1", "host:", "host"):
        with pytest.raises(CollectorError, match="HOST:PORT"):
            split_address(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("connections: {handshake: 2m}", "connections.handshake"),
        ("connections: {idle: 500ms}", "connections.idle"),
        ("connections: {age: 5s}", "connections.age"),
        ("limits: {bytes_per_second: 64KiB}", "limits.bytes_per_second"),
        ("limits: {burst: 1MiB}", "limits.burst"),
        ("limits: {memory: 64MiB}", "limits.memory"),
    ],
)
def test_a_bound_of_the_door_that_would_shut_out_honest_agents_is_named(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=says):
        read(path)
