"""Identity + labels -> tenant, by ordered rules."""

from __future__ import annotations

import time

import pytest

from agent.meter.identity import identify
from agent.meter.owners import Labels, Owners, OwnersError, OwnersSettings, Rule, TenantFrom

WEB = identify("/acme.slice/acme-web.slice/docker-" + "a" * 64 + ".scope")
SERVICE = identify("/system.slice/nginx.service")
LABELS = Labels("web-1", "shop", {"tenant": "globex", "team": "pay/eu"})


def tenant(*rules: Rule, labels: Labels = LABELS, identity: object = WEB) -> str:
    return Owners(OwnersSettings(rules=list(rules))).tenant(identity, labels)  # type: ignore[arg-type]


def test_the_first_rule_whose_keys_all_match_decides() -> None:
    rules = (
        Rule(kind="service", tenant="ops"),
        Rule(label={"tenant": "globex"}, namespace="other", tenant="no"),
        Rule(label={"tenant": "globex"}, namespace="sh*", tenant="yes"),
        Rule(path="**", tenant="late"),
    )
    assert tenant(*rules) == "yes"
    assert tenant(*rules, identity=SERVICE) == "ops"


def test_what_no_rule_claims_is_kept_under_the_default_tenant() -> None:
    assert tenant() == "unattributed"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (TenantFrom(label="tenant"), "globex"),
        (TenantFrom(namespace=True), "shop"),
        (TenantFrom(slice=True), "acme-web"),
        (TenantFrom(label="team"), "unattributed"),
        (TenantFrom(label="absent"), "unattributed"),
    ],
)
def test_a_tenant_may_be_taken_from_the_container_but_only_if_it_is_a_tenant_name(
    source: TenantFrom, expected: str
) -> None:
    assert tenant(Rule(path="**", tenant_from=source)) == expected


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("/acme.slice/**", True),
        ("/acme.slice/*", False),
        ("**/docker-*.scope", True),
        ("/*/*/docker-*", True),
        ("/acme.slice", False),
        ("/acm?.slice/**", True),
        ("**", True),
        ("", False),
    ],
)
def test_a_star_stays_within_a_segment_and_two_stars_do_not(pattern: str, matches: bool) -> None:
    assert tenant(Rule(path=pattern, tenant="yes")) == ("yes" if matches else "unattributed")


def test_a_hostile_name_cannot_make_a_pattern_slow() -> None:
    begun = time.perf_counter()
    tenant(Rule(path="*a" * 30, tenant="x"), identity=identify("/" + "a" * 250))
    tenant(Rule(path="**a" * 30, tenant="x"), identity=identify("/a" * 2_000))
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Rule(path="/a"), "tenant"),
        (Rule(path="/a", tenant="a", tenant_from=TenantFrom(slice=True)), "exactly one"),
        (Rule(path="/a", tenant="no good"), "no tenant name"),
        (Rule(path="/a", tenant_from=TenantFrom()), "exactly one"),
        (Rule(kind="pet", tenant="a"), "none of"),
    ],
)
def test_a_rule_that_cannot_be_used_is_named(rule: Rule, says: str) -> None:
    with pytest.raises(OwnersError, match=says) as error:
        Owners(OwnersSettings(rules=[Rule(path="/x", tenant="x"), rule]))
    assert "2" in str(error.value) or "rules" in str(error.value)


def test_explain_says_why_each_rule_did_or_did_not_match() -> None:
    owners = Owners(
        OwnersSettings(rules=[Rule(kind="service", tenant="ops"), Rule(namespace="shop", tenant="acme")])
    )
    lines = owners.explain(WEB, LABELS)
    assert "kind is container, not service" in lines[0]
    assert "matches; tenant is acme" in lines[1]
    assert owners.explain(SERVICE, Labels())[-1].endswith("ops")
    assert owners.tenant(WEB, LABELS) == "acme"
