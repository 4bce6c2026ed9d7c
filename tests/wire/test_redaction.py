"""The scrubber: a known secret is gone from any text, in whatever form it was written; what merely looks like one, too."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.daemon.redaction import HIDDEN, LEAST_CHARACTERS, Scrubber, scalars, secrets_in_file

# Not of the letters of `[hidden]`: a secret that is in the mask cannot be told from it.
SECRETS = st.text("ABCXYZ0189+/=%&?#\"\\'äß @:", min_size=LEAST_CHARACTERS, max_size=40).filter(
    lambda text: len(text.strip()) >= LEAST_CHARACTERS
)
AROUND = st.text("klmop \n=", max_size=20)


@given(SECRETS, AROUND, AROUND)
def test_a_known_secret_is_gone_as_it_is_as_json_in_a_url_and_in_hexadecimal(
    secret: str, before: str, after: str
) -> None:
    known = secret.strip()
    scrubber = Scrubber([secret])
    for form in (known, json.dumps(known)[1:-1], quote(known, safe=""), known.encode().hex()):
        assert form not in scrubber.text(f"{before}{form}{after}")


@given(SECRETS, st.binary(max_size=7), st.binary(max_size=7))
def test_a_known_secret_is_gone_from_base64_wherever_it_begins(
    secret: str, before: bytes, after: bytes
) -> None:
    known = secret.strip().encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(before + known + after).decode()
        # The characters that only the secret decides.
        only = text[(8 * len(before) + 5) // 6 : 8 * (len(before) + len(known)) // 6]
        assert only not in Scrubber([secret.strip()]).text(f"Basic {text}")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIIx\n-----END EC PRIVATE KEY-----\n", "MHcCAQEEIIx"),
        ("-----BEGIN PRIVATE KEY-----\nMHcCAQEEIIx cut off", "MHcCAQEEIIx"),
        (
            r'{"key_pem": "-----BEGIN PRIVATE KEY-----\nMHcCAQEEIIx\n-----END PRIVATE KEY-----\n"}',
            "MHcCAQEEIIx",
        ),
        ("enroll wb1.k9kgeENQabc-_x", "k9kgeENQabc"),
        ("redis://:hunter22@cache:6379/0", "hunter22"),
        ("redis://user:hun/ter22@cache:6379/0", "ter22"),
        ("sasl.password = hunter22", "hunter22"),
        ('{"client_secret": "hunter22"}', "hunter22"),
        ("Authorization: Bearer hunter22", "hunter22"),
        ("API_KEY=hunter22;", "hunter22"),
    ],
)
def test_what_looks_like_a_secret_is_gone_though_nobody_knew_it(text: str, secret: str) -> None:
    scrubbed = Scrubber([]).text(text)
    assert secret not in scrubbed
    assert HIDDEN in scrubbed


@pytest.mark.parametrize(
    "text",
    [
        '{"event": "collector_connected", "collector": "127.0.0.1:9460"}',
        '"webhook.secret_file": "/etc/weighbridge/webhook.secret"',
        "weighbridge_agent_spool_bytes 324.0",
        "-----BEGIN CERTIFICATE-----\nMIIBqDCCAU2g\n-----END CERTIFICATE-----",
        "/system.slice/docker-c0ffee.scope tenant acme",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Scrubber(["hunter22"]).text(text) == text


def test_of_a_file_with_key_and_certificate_only_the_key_is_a_secret(tmp_path) -> None:
    file = tmp_path / "server.pem"
    file.write_text(
        "-----BEGIN PRIVATE KEY-----\nKEYKEYKEY\n-----END PRIVATE KEY-----\n"
        "-----BEGIN CERTIFICATE-----\nPUBLIC\n-----END CERTIFICATE-----\n"
    )
    lines = list(secrets_in_file(file))[1:]
    assert lines == ["KEYKEYKEY"]
    assert list(secrets_in_file(tmp_path / "nothing")) == []
    assert list(secrets_in_file(None)) == []


def test_the_values_of_settings_that_cannot_be_used_are_secrets_but_keys_and_paths_that_exist_are_not(
    tmp_path,
) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(f'state_dir: {tmp_path}\nship: {{collectors: ["hunter22", other]}}\nbad: "unterminated\n')
    assert list(scalars([file, tmp_path / "missing.yaml"])) == ["hunter22", "other"]
