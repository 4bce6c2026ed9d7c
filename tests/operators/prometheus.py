"""A real Prometheus that scrapes a throw-away site, set up as the shipped example says."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from bench.ports import free_port
from tests.operators.rules import RULES, SCRAPE

_SELECTOR = re.compile(r"\b(weighbridge_\w+|process_\w+|up)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"""(\w+)\s*(=~|!~|!=|=)\s*("[^"]*")""")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


class Selector(NamedTuple):
    """A name with its label matchers, as an expression has it."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]

    def found_by(self) -> str:
        """What finds its series, whatever they must *not* be."""
        kept = ",".join(f"{label}{op}{value}" for label, op, value in self.matchers if op[0] != "!")
        return f"{self.name}{{{kept}}}"


def selectors(expression: str) -> list[Selector]:
    return [
        Selector(name, tuple(_MATCHER.findall(matchers))) for name, matchers in _SELECTOR.findall(expression)
    ]


def grouping_labels(expression: str) -> set[str]:
    return {label.strip() for labels in _GROUPING.findall(expression) for label in labels.split(",")}


class Prometheus:
    """Scrapes each second, and evaluates the shipped rules as often."""

    def __init__(self, directory: Path, targets: Mapping[str, int]) -> None:
        self._port = free_port()
        settings = yaml.safe_load(SCRAPE.read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(RULES)]
        for job in settings["scrape_configs"]:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{targets[job['job_name']]}"]}]
        directory.mkdir()
        (directory / "prometheus.yml").write_text(yaml.safe_dump(settings))
        with (directory / "journal").open("wb") as journal:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={directory}/prometheus.yml",
                    f"--storage.tsdb.path={directory}/data",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stdout=journal,
                stderr=journal,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, path: str, **parameters: str) -> Any:
        """`data` of an answer; what Prometheus does not understand is an AssertionError with its words."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:
                raise  # not ready yet
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.ask("query", query=expression)["result"])

    def series(self, selector: str) -> list[dict[str, str]]:
        return list(self.ask("series", **{"match[]": selector, "start": str(time.time() - 3600)}))

    def ready(self) -> bool:
        """Whether every job has been scraped."""
        assert self._process.poll() is None, "prometheus has ended"
        try:
            return len(self.query("up == 1")) == 3
        except OSError:
            return False
