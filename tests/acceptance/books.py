"""The ledger in a machine, asked by its own commands."""

from __future__ import annotations

import json

from tests.acceptance.weighbridge import Weighbridge

LEDGER_PORT = 9466
ALL_READ = "weighbridge-ledger status --json | python3 -Sc '{}'"
NOTHING_LEFT = 'import json, sys; sys.exit(any(lag["lag"] for lag in json.load(sys.stdin)["source_lag"]))'


def wait_booked(site: Weighbridge) -> None:
    """Until everything that the collector's log has is in the books: the agent has stopped."""
    site.wait(ALL_READ.format(NOTHING_LEFT), 300)


def booked_cpu_ns(site: Weighbridge, cgroup_id: int) -> int:
    """Of one cgroup, over all time."""
    lines = json.loads(site.command("ledger", "usage --from 2000-01-01 --by unit --json"))["rows"]
    return sum(int(line["cpu_usage_ns"] or 0) for line in lines if line["cgroup_id"] == cgroup_id)
