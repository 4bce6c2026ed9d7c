"""What both sides agree on: names, measures, reasons, tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.identity import agent_of_spiffe, digest, new_agent_id, spiffe_uri
from wire.measures import BIT, FIRST_MEASURE_FIELD, MEASURES
from wire.statuses import Meter, Reason, meter_code
from wire.token import JoinToken, TokenError
from wire.v1 import usage_pb2


def test_the_number_of_a_measure_is_its_field_number_less_thirty_two() -> None:
    fields = usage_pb2.UsageBatch.DESCRIPTOR.fields_by_name
    assert [fields[name].number for name in MEASURES] == list(
        range(FIRST_MEASURE_FIELD, FIRST_MEASURE_FIELD + len(MEASURES))
    )
    columns = {f.name for f in fields.values() if FIRST_MEASURE_FIELD <= f.number <= 65}
    assert columns == set(MEASURES)
    assert all(MEASURES[BIT[name]] == name for name in MEASURES)


def test_every_reason_belongs_to_its_code() -> None:
    codes = {name.removeprefix("REASON_"): meter_code(number) for name, number in Reason.items()}
    assert codes.pop("UNSPECIFIED") is None
    assert {n for n, c in codes.items() if c is None} == {"OUT_OF_WINDOW", "SHUTTING_DOWN", "HELD_ELSEWHERE"}
    assert {n for n, c in codes.items() if c is Meter.NOT_AUTHORISED} == {
        "FOREIGN_AGENT",
        "TENANT_NOT_PERMITTED",
    }
    assert {n for n, c in codes.items() if c is Meter.IDENTITY_CONFLICT} == {"IDENTITY_CONFLICT"}
    assert {n for n, c in codes.items() if c is Meter.DATABASE_UNAVAILABLE} == {"STORAGE_UNAVAILABLE"}
    assert {n for n, c in codes.items() if c is Meter.BUFFER_OVERFLOW} == {
        "OVERLOADED",
        "PARK_FULL",
        "MEMORY",
    }
    assert sum(c is Meter.INVALID_BATCH for c in codes.values()) == 11


def test_an_agents_name_survives_its_uri_and_strangers_have_none() -> None:
    agent = new_agent_id()
    assert agent_of_spiffe(spiffe_uri("example.org", agent), "example.org") == agent
    for uri in (
        spiffe_uri("elsewhere.org", agent),
        f"spiffe://example.org/host/{agent}",
        f"spiffe://example.org/agent/{agent}/x",
        f"spiffe://example.org/agent/{agent.upper()}",
        "",
    ):
        assert agent_of_spiffe(uri, "example.org") is None


def test_a_digest_is_sha_256() -> None:
    assert digest(b"").hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


tokens = st.builds(
    JoinToken,
    secret=st.text("abcXYZ019-_", min_size=16, max_size=64),
    addresses=st.lists(st.text("abc.:0123456789", min_size=1, max_size=30), min_size=1, max_size=4),
    ca_pem=st.text(max_size=200),
    tenants=st.none() | st.lists(st.text("abc-.", min_size=1), max_size=4),
)


@given(tokens, st.integers(0, 10**6))
def test_a_token_reads_back_and_a_mistyped_one_is_noticed(token: JoinToken, at: int) -> None:
    text = token.encode()
    assert JoinToken.decode(f"  {text[:20]}\n{text[20:]} ") == token
    place = 4 + at % (len(text) - 4)
    mistyped = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
    with pytest.raises(TokenError, match="paste the whole line"):
        # The last character may hold bits that no byte uses; then nothing was mistyped that matters.
        if JoinToken.decode(mistyped) == token:
            raise TokenError("paste the whole line")


@given(st.text(max_size=60))
def test_nothing_else_is_a_token(text: str) -> None:
    with pytest.raises(TokenError):
        JoinToken.decode(text)
