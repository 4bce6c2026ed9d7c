"""Join tokens that leave the host's own row out: said on both sides, before usage is rejected for it."""

from __future__ import annotations

from bench.site import Site


def test_a_token_without_the_hosts_own_tenant_is_warned_of_where_it_is_made_and_where_it_is_spent(
    site: Site,
) -> None:
    owners = {"default": "acme", "rules": [{"path": "/a/**", "tenant": "globex"}]}
    site.prepare(agent={"owners": owners})
    site.start_collector()
    made = site.command("collector", "token", "create", "--tenant", "acme")
    assert made.stdout.count("\n") == 1, "the token alone, so that it can be piped"
    assert "add `--tenant unattributed`" in made.stderr
    spent = site.command("agent", "enroll", made.stdout)
    assert "enrolled as agent" in spent.stdout
    warned = spent.stderr.splitlines()
    assert [line.split("`")[1:4:2] for line in warned] == [
        ["owners.host", "unattributed"],
        ["owners.rules[1]", "globex"],
    ]


def test_a_token_that_has_the_tenants_or_permits_any_is_not_warned_of(site: Site) -> None:
    site.prepare()
    site.start_collector()
    for words in ((), ("--tenant", "acme", "--tenant", "unattributed")):
        made = site.command("collector", "token", "create", *words)
        spent = site.command("agent", "enroll", "--force", made.stdout)
        assert (made.stderr, spent.stderr) == ("", "")


def test_a_list_too_long_for_a_token_is_left_to_the_collector(site: Site) -> None:
    site.prepare()
    site.start_collector()
    many = [word for n in range(200) for word in ("--tenant", f"{n}-{'t' * 120}")]
    made = site.command("collector", "token", "create", *many, "--tenant", "unattributed")
    assert "enrolled as agent" in site.command("agent", "enroll", made.stdout).stdout
