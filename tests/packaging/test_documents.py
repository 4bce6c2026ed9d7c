"""Manual pages and completions are made from the programs: they name what the programs take, and each shell understands them."""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import agent.cli
import collector.cli
import collector.replay
import ledger.cli
from tests.packaging.built import PARTS, Built

PROGRAMS = {
    "weighbridge-agent": "agent",
    "weighbridge-probes": "agent",
    "weighbridge-collector": "collector",
    "usage-replay": "collector",
    "weighbridge-ledger": "ledger",
}
PARSERS = {
    "weighbridge-agent": agent.cli._parser(),
    "weighbridge-collector": collector.cli._parser(),
    "usage-replay": collector.replay._parser(),
    "weighbridge-ledger": ledger.cli._parser(),
}


def text_of(built: Built, program: str, path: str) -> str:
    content = built.entries(PROGRAMS[program])[path].content
    assert content is not None
    return (gzip.decompress(content) if path.endswith(".gz") else content).decode()


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """The words of each command, and its long options."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield (
            words,
            {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")},
        )
    for action in inner:
        for name, sub in action.choices.items():
            yield from leaves(sub, (*words, name))


@pytest.mark.parametrize("part", PARTS)
def test_every_program_has_a_page_and_completions(built: Built, part: str) -> None:
    entries = built.entries(part)
    programs = [path.rpartition("/")[2] for path in entries if path.startswith("/usr/bin/")]
    assert set(programs) == {name for name, owner in PROGRAMS.items() if owner == part}
    for name in programs:
        assert f"/usr/share/man/man8/{name}.8.gz" in entries
        assert f"/usr/share/bash-completion/completions/{name}" in entries
        assert f"/usr/share/zsh/vendor-completions/_{name}" in entries
        assert f"/usr/share/fish/vendor_completions.d/{name}.fish" in entries


@pytest.mark.parametrize("program", PROGRAMS)
def test_man_formats_a_page_without_a_warning(built: Built, program: str, tmp_path: Path) -> None:
    page = tmp_path / f"{program}.8"
    page.write_text(text_of(built, program, f"/usr/share/man/man8/{program}.8.gz"))
    command = ["man", "--warnings", "--local-file", "--encoding=UTF-8", str(page)]
    done = subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for heading in ("NAME", "SYNOPSIS", "OPTIONS", "FILES", "EXIT STATUS", "SEE ALSO"):
        assert re.search(rf"^{heading}$", done.stdout, re.MULTILINE), heading


@pytest.mark.parametrize("program", PARSERS)
def test_a_page_names_every_command_and_every_option(built: Built, program: str) -> None:
    page = (
        text_of(built, program, f"/usr/share/man/man8/{program}.8.gz")
        .replace("\\-", "-")
        .replace("\\fR", " ")
    )
    for words, flags in leaves(PARSERS[program]):
        if words:
            assert re.search(rf"^\.SS {' '.join(words)}$", page, re.MULTILINE), words
        for flag in flags - {"--help"}:
            assert f"\\fB{flag} " in page, (words, flag)


def bash_offers(built: Built, program: str, *words: str) -> set[str]:
    script = text_of(built, program, f"/usr/share/bash-completion/completions/{program}")
    function = re.search(r"^complete -F (\S+)", script, re.MULTILINE)
    assert function is not None
    quoted = " ".join(f"'{word}'" for word in (program, *words))
    called = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; {function[1]} 2>/dev/null"
    ask = f"{script}\n{called}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("program", PARSERS)
def test_bash_offers_every_command_and_its_options(built: Built, program: str) -> None:
    for words, flags in leaves(PARSERS[program]):
        assert flags <= bash_offers(built, program, *words, ""), words
        if words:
            assert words[-1] in bash_offers(built, program, *words[:-1], words[-1][:1])


def test_bash_passes_over_the_value_of_an_option(built: Built) -> None:
    assert bash_offers(built, "weighbridge-agent", "--config", "spool", "sp") == {"spool"}
    assert bash_offers(built, "weighbridge-collector", "import", "--format", "")
    assert "upgrade" in bash_offers(built, "weighbridge-probes", "u")


@pytest.mark.parametrize("program", PROGRAMS)
def test_fish_offers_the_commands_and_says_what_they_do(built: Built, program: str, tmp_path: Path) -> None:
    script = tmp_path / f"{program}.fish"
    script.write_text(text_of(built, program, f"/usr/share/fish/vendor_completions.d/{program}.fish"))
    fish = shutil.which("fish")
    assert fish, "./dev setup installs it"

    def offered(line: str) -> str:
        command = [fish, "--no-config", "--command", f"source {script}; complete -C '{line}'"]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    first = offered(f"{program} ")
    for words in {words[:1] for words, _ in leaves(PARSERS[program])} if program in PARSERS else [("load",)]:
        for word in words:
            assert re.search(rf"^{word}\t\S", first, re.MULTILINE), first
    if program == "weighbridge-agent":
        assert set(re.findall(r"^\w+", offered("weighbridge-agent spool "), re.MULTILINE)) == {
            "list",
            "export",
            "verify",
        }
    assert re.search(r"^--\S+\t\S", offered(f"{program} --"), re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_zsh_reads_its_functions(built: Built, program: str, tmp_path: Path) -> None:
    function = tmp_path / f"_{program}"
    function.write_text(text_of(built, program, f"/usr/share/zsh/vendor-completions/_{program}"))
    assert function.read_text().startswith(f"#compdef {program}\n")
    # Outside of a completion zsh has no _arguments; what it would be asked is written down.
    stub = '_arguments() { print -rl -- "$@"; state=command }\n_describe() { print -rl -- "${(@P)2}" }\n_files() { :; }\n'
    done = subprocess.run(
        ["zsh", "-f", "-c", f"{stub} source {function}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    if program in PARSERS:
        for words, flags in leaves(PARSERS[program]):
            if words:
                assert re.search(rf"^{words[0]}:", done.stdout, re.MULTILINE), words
            else:
                assert all(f"{flag}[" in done.stdout for flag in flags)
    else:
        assert re.search(r"^upgrade:", done.stdout, re.MULTILINE)
