"""The audit log: every act is in it before it counts, and what was changed afterwards is named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fleet import key_and_request
from bench.site import Site
from collector.audit import Audit, AuditError, Line, lines, verify
from collector.door.ca import CertificateAuthority
from wire.identity import new_agent_id

BY: dict[str, object] = {"uid": 7}


def written(path: Path, acts: int) -> list[bytes]:
    """A log of so many acts; its lines."""
    audit = Audit(path, BY)
    for number in range(1, acts + 1):
        audit("plan_set", tenant=f"tenant-{number}")
    return path.read_bytes().splitlines(keepends=True)


def entries(path: Path) -> list[Line]:
    return [line for line in lines(path) if isinstance(line, Line)]


def test_each_line_bears_the_hash_of_its_text_and_of_the_line_before(tmp_path: Path) -> None:
    raw = written(tmp_path / "audit.log", 3)
    previous = "0" * 64
    for number, line in enumerate(raw, start=1):
        stated, text = line.rstrip(b"\n").split(b" ", 1)
        assert hashlib.sha256(text).hexdigest() == stated.decode()
        entry = json.loads(text)
        assert (entry["number"], entry["previous"], entry["by"]) == (number, previous, BY)
        previous = stated.decode()
    verdict = verify(tmp_path / "audit.log")
    assert (verdict.sound, verdict.acts, verdict.head) == (True, 3, f"3:{previous}")


@settings(max_examples=30)
@given(st.data())
def test_the_first_line_that_was_changed_is_named(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    path = tmp_path_factory.mktemp("audit") / "audit.log"
    raw = written(path, 4)
    number = data.draw(st.integers(0, 3))
    at = data.draw(st.integers(0, len(raw[number]) - 2))
    byte = data.draw(st.integers(1, 255).filter(lambda b: raw[number][at] ^ b not in (0, 10)))
    spoiled = bytearray(raw[number])
    spoiled[at] ^= byte
    path.write_bytes(b"".join([*raw[:number], bytes(spoiled), *raw[number + 1 :]]))
    verdict = verify(path)
    assert not verdict.sound
    assert verdict.broken.startswith(f"line {number + 1}, byte {sum(map(len, raw[:number]))}: changed")
    Audit(path, BY)("revoked")
    assert verify(path).broken == verdict.broken, "a later line does not vouch for it"


@pytest.mark.parametrize("order", [(0, 2, 3), (1, 2, 3), (0, 2, 1, 3), (0, 1, 1, 2, 3)])
def test_lines_that_are_missing_swapped_or_repeated_break_the_chain(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    path = tmp_path / "audit.log"
    raw = written(path, 4)
    path.write_bytes(b"".join(raw[n] for n in order))
    first = next(n for n, line in enumerate(order) if line != n)
    assert verify(path).broken.startswith(f"line {first + 1}: is number")


def test_a_line_written_anew_with_a_fitting_hash_does_not_fit_the_next(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    raw = written(path, 3)
    text = raw[1].split(b" ", 1)[1].rstrip(b"\n").replace(b"tenant-2", b"tenant-9")
    forged = hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"
    path.write_bytes(raw[0] + forged + raw[2])
    assert verify(path).broken.startswith("line 3: is number 3 and does not follow")


def test_a_log_whose_end_was_cut_off_lacks_the_head_that_was_noted(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    raw = written(path, 3)
    head = verify(path).head
    assert verify(path, head).sound
    Audit(path, BY)("revoked")
    assert verify(path, head).sound
    path.write_bytes(b"".join(raw[:2]))
    assert verify(path).sound
    assert "cut off" in verify(path, head).broken


def test_a_line_torn_by_a_power_cut_is_no_tampering_and_the_next_vouches_for_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "audit.log"
    raw = written(path, 3)
    for cut in (1, 2, 63, 64, 65, 66, 100, 150, len(raw[2]) - 3, len(raw[2]) - 2):
        for torn in (raw[2][:cut], raw[2][:cut] + bytes(len(raw[2]) - cut - 1) + b"\n"):
            path.write_bytes(raw[0] + raw[1] + torn)
            verdict = verify(path)
            assert (verdict.sound, verdict.acts, verdict.unfinished_bytes) == (True, 2, len(torn))
            Audit(path, BY)("revoked", agent_or_serial="x")
            verdict = verify(path)
            assert (verdict.sound, verdict.acts, verdict.torn, verdict.unfinished_bytes) == (True, 3, [3], 0)
            assert path.read_bytes().startswith(raw[0] + raw[1] + torn), "nothing is ever cut off"
    path.write_bytes(raw[0] + raw[1] + raw[2][:-1])
    Audit(path, BY)("revoked")
    verdict = verify(path)
    assert (verdict.sound, verdict.acts, verdict.torn) == (True, 4, []), "only its end was missing"
    path.write_bytes(raw[0] + raw[1] + raw[2][:40])
    Audit(path, BY)("revoked")
    path.write_bytes(path.read_bytes().replace(raw[2][:20], b"x" * 20))
    assert verify(path).broken.startswith("line 3, byte ")
    path.write_bytes(b"".join(raw[:2]) + path.read_bytes().splitlines(keepends=True)[-1])
    assert verify(path).broken.startswith("line 3: the unfinished line before it is gone")


def append_some(path: Path) -> None:
    for _ in range(20):
        Audit(path)("plan_set", tenant="acme")


def test_processes_that_append_at_once_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=append_some, args=(path,)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert (verify(path).sound, verify(path).acts) == (True, 60)


def test_what_cannot_be_written_down_is_not_done(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "audit.log"
    authority = CertificateAuthority.init(tmp_path / "ca", "demo.example", ["127.0.0.1"], Audit(path, BY))
    before = len(entries(path))
    _, csr = key_and_request()
    agent_id = new_agent_id()
    path.unlink()
    path.mkdir()
    registry = authority.registry
    for act in (
        lambda: registry.add_token(None, None, 60),
        lambda: authority.issue_agent(csr, agent_id, timedelta(hours=1)),
        lambda: registry.add_agent(agent_id, "host", None),
        lambda: authority.issue_server(["127.0.0.1"]),
    ):
        with pytest.raises(AuditError, match="nothing was done"):
            act()
    assert before == 2
    assert registry.certificates() == []
    assert registry.agent(agent_id) is None


def test_the_collectors_certificate_stays_in_use_while_its_renewal_cannot_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit.log"
    authority = CertificateAuthority.init(tmp_path / "ca", "demo.example", ["127.0.0.1"], Audit(path, BY))
    before = authority.server_pair()
    monkeypatch.setattr("collector.door.ca.SERVER_LIFE", timedelta(seconds=60))
    path.rename(tmp_path / "aside")
    path.mkdir()
    assert authority.server_pair() == before
    assert "server_certificate_not_renewed" in capfd.readouterr().err
    path.rmdir()
    (tmp_path / "aside").rename(path)
    assert authority.server_pair() != before


def test_every_administrative_act_of_a_site_is_in_its_audit_log(site: Site) -> None:
    site.prepare(collector={"admission": {"tenants": {"acme": {"rate": 5}}}})
    site.start_collector()
    agent_id = site.enroll("--tenant", "acme")
    site.command("collector", "plan", "set", "acme", "--rate", "7")
    site.command("collector", "plan", "clear", "acme")
    site.command("collector", "ca", "revoke", agent_id)
    _, csr = key_and_request()
    request = site.directory / "csr.der"
    request.write_bytes(csr)
    site.command("collector", "ca", "issue", "--csr", str(request))
    site.command("collector", "ca", "issue", "--server", "--host", "127.0.0.1")
    shown = [
        json.loads(line) for line in site.command("collector", "audit", "show", "--json").stdout.splitlines()
    ]
    assert [entry["act"] for entry in shown] == [
        "ca_made",
        "server_certificate_issued",
        "token_created",
        "token_used",
        "certificate_issued",
        "plan_set",
        "plan_cleared",
        "revoked",
        "certificate_issued",
        "agent_admitted",
        "server_certificate_issued",
    ]
    created, used = shown[2], shown[3]
    assert created["token"] == used["token"]
    assert (created["tenants"], used["agent_id"]) == (["acme"], agent_id)
    assert created["by"]["uid"] == shown[5]["by"]["uid"]
    assert used["by"] == {"program": "weighbridge-collector run"}
    assert shown[5]["plan"]["rate"] == 7
    verdict = json.loads(site.command("collector", "audit", "verify", "--json").stdout)
    assert (verdict["sound"], verdict["acts"]) == (True, len(shown))
    assert "plan_set" in site.command("collector", "audit", "show", "--act", "plan_set").stdout
    path = site.directory / "collector" / "audit.log"
    path.write_bytes(path.read_bytes().replace(b'"rate": 7', b'"rate": 8'))
    spoiled = site.command("collector", "audit", "verify", check=False)
    assert spoiled.returncode == 1
    assert "line 6, byte" in spoiled.stdout
