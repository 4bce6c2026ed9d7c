"""From the kernel's counter to the books, with a real cgroup, agent, collector and ledger: the same nanoseconds."""

from __future__ import annotations

import contextlib
import os
import signal
from subprocess import Popen
from typing import Any

import pytest

from bench.cgroups import Cgroup, burner
from bench.site import Site
from ledger.recovery import recoveries
from tests.ledger.both_sides import accepted_in_log, asked, booked, opened, total
from tests.waiting import until

FOREVER_NS = 1 << 62
OWNERS = {"host": "host", "rules": [{"path": "/weighbridge-test-*/**", "tenant": "acme"}]}

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


class Burner:
    """A cgroup of ours in which something uses the CPU."""

    def __init__(self, parent: Cgroup, name: str) -> None:
        self.cgroup = parent.child(name)
        self._process: Popen[bytes] = self.cgroup.run(burner(0.3))

    def end(self) -> int:
        """What the kernel counted, all told."""
        for pid in self.cgroup.pids():
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self.cgroup.wait_empty()
        return self.cgroup.cpu_usage_ns()


@pytest.fixture
def chain(site: Site) -> Site:
    """All three of them, running."""
    site.prepare(agent={"owners": OWNERS})
    site.start_collector()
    site.enroll()
    site.start_agent()
    site.start_ledger()
    site.wait_metering()
    site.wait_booking()
    return site


def booked_ns(site: Site, cgroup: Cgroup) -> int:
    """CPU time of this cgroup, as the ledger tells it."""
    return sum(line["cpu_usage_ns"] for line in usage(site, "unit") if line["cgroup_id"] == cgroup.cgroup_id)


def usage(site: Site, by: str) -> list[dict[str, Any]]:
    return list(site.ask("ledger", "usage", start_unix_ns=0, end_unix_ns=FOREVER_NS, by=by)["rows"])


def settled(site: Site) -> bool:
    """Whether everything that the collector has is booked."""
    site.ask("ledger", "usage", start_unix_ns=0, end_unix_ns=1, by="tenant")  # books what is in hand
    return not any(lag["lag"] for lag in site.ask("ledger", "status").get("source_lag", [{"lag": 1}]))


def test_the_ledger_says_of_a_cgroup_what_the_kernel_says_and_of_the_host_what_its_rows_add_up_to(
    chain: Site, ours: Cgroup
) -> None:
    burners = [Burner(ours, f"wb-chain-{number}.scope") for number in range(2)]
    until(lambda: all(booked_ns(chain, one.cgroup) > 500_000_000 for one in burners), 60)
    kernel = {one.cgroup.cgroup_id: one.end() for one in burners}
    assert chain.stop("agent") == 0, chain.journal("agent")[-2_000:]
    assert chain.stop("collector") == 0, chain.journal("collector")[-2_000:]
    until(lambda: settled(chain))

    units = {line["cgroup_id"]: line for line in usage(chain, "unit")}
    assert {cgroup_id: units[cgroup_id]["cpu_usage_ns"] for cgroup_id in kernel} == kernel
    assert {units[cgroup_id]["tenant"] for cgroup_id in kernel} == {"acme"}
    hops = chain.ask("ledger", "reconcile")
    assert hops["ok"], hops
    assert hops["intervals_compared"] >= 2
    assert hops["conservation_difference_ns"] == 0
    verdict = chain.ask("ledger", "verify")
    assert verdict["ok"], verdict
    sums = total(usage(chain, "tenant"))
    assert chain.stop("ledger") == 0, chain.journal("ledger")[-2_000:]
    made, there = accepted_in_log(chain.directory / "collector/log"), booked(chain.directory / "ledger")
    assert there.digests == made.digests
    assert len(there.digests) >= 4
    assert sums == there.sums == made.sums
    ((deficit,),) = asked(
        chain.directory / "ledger",
        "SELECT argMax(host_cpu_deficit_ns, seq) FROM batches FINAL WHERE has_host_totals",
    )
    ((host,),) = asked(chain.directory / "ledger", "SELECT sum(host_cpu_usage_ns) FROM batches FINAL")
    assert (
        sum(of_tenant["cpu_usage_ns"] for of_tenant in sums.values()) == host + deficit > sum(kernel.values())
    )


def test_a_lost_spool_loses_no_nanosecond_to_the_books(chain: Site, ours: Cgroup) -> None:
    burning = Burner(ours, "wb-chain-lost.scope")
    until(lambda: booked_ns(chain, burning.cgroup) > 500_000_000, 60)
    chain.stop("agent", signal.SIGKILL)
    until(lambda: settled(chain))
    first = booked_ns(chain, burning.cgroup)
    spool = sorted((chain.directory / "agent").glob("spool.db*"))
    assert spool
    for file in spool:
        file.unlink()
    before = burning.cgroup.cpu_usage_ns()
    until(lambda: burning.cgroup.cpu_usage_ns() > before + 300_000_000)
    chain.start_agent()
    until(lambda: booked_ns(chain, burning.cgroup) > first + 300_000_000, 60)
    kernel = burning.end()
    assert chain.stop("agent") == 0, chain.journal("agent")[-2_000:]
    until(lambda: settled(chain))
    delivered = booked_ns(chain, burning.cgroup)
    assert chain.ask("ledger", "reconcile")["ok"]
    assert chain.stop("ledger") == 0
    rows = asked(
        chain.directory / "ledger",
        f"SELECT epoch, cpu_usage_ns FROM opening_rows WHERE cgroup_id = {burning.cgroup.cgroup_id} ORDER BY epoch",
    )
    assert len({epoch for epoch, _ in rows}) == 2, rows
    (_, born_with), (_, opened_at) = rows
    assert born_with == 0
    # What lies between the first epoch's total and the second one's opening is what no batch carried.
    recovered = opened_at - first
    assert recovered > 300_000_000
    assert delivered + recovered == kernel
    # And that is what the ledger finds by itself.
    with contextlib.closing(opened(chain.directory / "ledger")) as store:
        found = recoveries(store).recovered
    assert [
        (one.tenant, one.amount)
        for one in found
        if one.cgroup_id == burning.cgroup.cgroup_id and one.measure == "cpu_usage_ns"
    ] == [("acme", recovered)]
