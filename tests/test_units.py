"""The units against systemd's own judgement and against the settings' defaults."""

from __future__ import annotations

import configparser
import itertools
import os
import re
import shutil
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import agent.config
import collector.config
import ledger.config
from agent.ship.enrol import FILE_NAME

UNITS = Path(__file__).parent.parent / "systemd"
EXPOSURE = {"probes": 1.5, "agent": 1.5, "collector": 1.5, "ledger": 1.5, "reconcile": 1.0, "probes-bcc": 2.0}
"""A compiler writes code and runs it, and looks for the headers where the modules are."""
DAEMONS = ("agent", "collector", "ledger")


class Unit(configparser.RawConfigParser):
    def __init__(self, name: str) -> None:
        super().__init__(strict=False)
        self.optionxform = str  # type: ignore[assignment,method-assign]
        assert self.read(UNITS / name), name


@pytest.mark.parametrize("name", EXPOSURE)
def test_the_sandbox_is_as_tight_as_promised(name: str) -> None:
    if shutil.which("systemd-analyze") is None:
        assert not os.environ.get("CI"), "systemd-analyze is missing"
        pytest.skip("needs systemd-analyze, from the package systemd")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    done = subprocess.run(
        [*command, UNITS / f"weighbridge-{name}.service"], capture_output=True, text=True, check=True
    )
    (exposure,) = re.findall(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert float(exposure) <= EXPOSURE[name]


@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemon_is_checked_watched_never_given_up_and_reloads_by_asking(name: str) -> None:
    unit = Unit(f"weighbridge-{name}.service")
    program = f"/usr/bin/weighbridge-{name}"
    service = unit["Service"]
    assert service["ExecStartPre"] == f"{program} check-config"
    assert service["ExecReload"] == f"{program} reload"
    assert (service["Type"], service["NotifyAccess"], service["Restart"]) == ("notify", "main", "always")
    assert service["WatchdogSec"]
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert service["CapabilityBoundingSet"] == ""
    assert "network-online.target" not in (UNITS / f"weighbridge-{name}.service").read_text()


def test_the_units_speak_of_the_places_that_the_settings_mean() -> None:
    host, centre = agent.config.Settings(), collector.config.Settings()
    unit = Unit("weighbridge-agent.service")
    assert unit["Unit"]["ConditionPathExists"] == str(host.state_dir / FILE_NAME)
    assert f"/var/lib/{unit['Service']['StateDirectory']}" == str(host.state_dir)
    assert f"/run/{unit['Service']['RuntimeDirectory']}" == str(host.run_dir)
    assert Unit("run-weighbridge-bpf.mount")["Mount"]["Where"] == str(host.read.probes_dir)
    unit = Unit("weighbridge-collector.service")
    assert unit["Unit"]["ConditionPathExists"] == str(centre.ca_dir)
    assert f"/var/lib/{unit['Service']['StateDirectory']}" == str(centre.state_dir)
    books = ledger.config.Settings()
    unit = Unit("weighbridge-ledger.service")
    assert f"/var/lib/{unit['Service']['StateDirectory']}" == str(books.state_dir)
    assert books.source.log_directory == centre.state_dir / "log"


def test_the_ledger_compares_hourly_for_as_long_as_it_runs() -> None:
    """A difference ends `reconcile` with 1, which makes the unit a failed one: nothing may restart it or call it well."""
    service = Unit("weighbridge-reconcile.service")
    assert service["Service"]["Type"] == "oneshot"
    assert service["Service"]["ExecStart"] == "/usr/bin/weighbridge-ledger reconcile"
    assert not {"Restart", "SuccessExitStatus", "RemainAfterExit"} & service["Service"].keys()
    assert service["Unit"]["Requisite"] == service["Unit"]["After"] == "weighbridge-ledger.service"
    timer = Unit("weighbridge-reconcile.timer")
    assert timer["Unit"]["PartOf"] == timer["Install"]["WantedBy"] == "weighbridge-ledger.service"
    assert Unit("weighbridge-ledger.service")["Install"]["Also"] == "weighbridge-reconcile.timer"
    assert timer["Timer"]["Persistent"] == "yes"
    command = ["systemd-analyze", "calendar", "--iterations=3", timer["Timer"]["OnCalendar"]]
    done = subprocess.run(
        command, env={**os.environ, "TZ": "UTC"}, capture_output=True, text=True, check=True
    )
    elapses = re.findall(r"(?:Next elapse|Iter(?:ation|\.) #\d): \S+ (\S+ \S+)", done.stdout)
    times = [datetime.fromisoformat(text) for text in elapses]
    assert [later - earlier for earlier, later in itertools.pairwise(times)] == [timedelta(hours=1)] * 2


@pytest.mark.parametrize("unit", sorted(path.name for path in UNITS.glob("weighbridge-*")))
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    """Programs that are not installed here stand for by ones that are."""
    for path in UNITS.iterdir():
        if path.suffix != ".md":
            text = re.sub(
                r"^(Exec\w+=)/usr/bin/(?:weighbridge|usage)-\S+",
                r"\1/bin/true",
                path.read_text(),
                flags=re.MULTILINE,
            )
            (tmp_path / path.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_probes_come_before_the_agent_and_it_does_without_them() -> None:
    unit = Unit("weighbridge-agent.service")["Unit"]
    assert unit["Wants"] == "weighbridge-probes.service"
    assert "weighbridge-probes.service" in unit["After"].split()
    assert "Requires" not in unit
