"""The configuration reference is what the code says, and the example files are the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from agent.config import Settings as AgentSettings
from bench.reference import DOCS, files
from collector.config import Settings as CollectorSettings
from ledger.config import Settings as LedgerSettings
from wire.daemon.settings import load


@pytest.mark.parametrize("name", sorted(files()))
def test_the_committed_file_is_what_the_code_generates(name: str) -> None:
    assert (DOCS / name).read_text() == files()[name], "run: python -m bench.reference"


@pytest.mark.parametrize(
    ("name", "struct"),
    [("agent.yaml", AgentSettings), ("collector.yaml", CollectorSettings), ("ledger.yaml", LedgerSettings)],
)
def test_the_example_is_the_defaults_as_it_stands_and_with_every_key_uncommented(
    tmp_path: Path, name: str, struct: type
) -> None:
    text = (DOCS / name).read_text()
    assert load(DOCS / name, struct) == struct()
    lines = [
        line.replace("#", "", 1)
        for line in text.splitlines()
        if line.lstrip().startswith("#") and "# " not in line
    ]
    path = tmp_path / "all.yaml"
    path.write_text("\n".join(lines))
    assert load(path, struct) == struct()
    assert len(yaml.safe_load(path.read_text())) == len(struct.__struct_fields__)  # type: ignore[attr-defined]
