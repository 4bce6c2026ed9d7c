"""The command lines of the programs, as data: manual pages and completions are made from these."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from checkout import ROOT, PackagingError
from tree import PROGRAMS

_JSON = "as JSON, for programs"


@dataclass(frozen=True, slots=True)
class Option:
    """`value` is None for a switch. A value that is none of `choices` is a file, as far as a shell can know."""

    flags: tuple[str, ...]
    value: str | None
    text: str
    choices: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True, slots=True)
class Operand:
    """`name` is as a synopsis shows it: FILE ..., [TENANT]."""

    name: str
    text: str
    is_file: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A program, or one of its commands; `words` are what was typed to get here."""

    words: tuple[str, ...]
    text: str
    options: list[Option] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def walk(self) -> list[Command]:
        """This one and all below it."""
        return [self, *(inner for command in self.commands for inner in command.walk())]


def programs(part: str) -> list[Command]:
    """What this part has on the PATH."""
    found = []
    for name, module in PROGRAMS[part].items():
        parser = importlib.import_module(module)._parser()
        found.append(_from_parser((name,), parser, parser.description or ""))
    if part == "agent":
        done = subprocess.run(
            [ROOT / "bpf/build/weighbridge-probes", "--help"], capture_output=True, text=True, check=True
        )
        found.append(
            from_usage(
                "weighbridge-probes", "Loads, replaces and shows Weighbridge's kernel probes.", done.stdout
            )
        )
    return found


def _from_parser(words: tuple[str, ...], parser: argparse.ArgumentParser, text: str) -> Command:
    command = Command(words, text)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                command.commands.append(_from_parser((*words, name), inner, said.get(name, "")))
        elif action.option_strings:
            command.options.append(_option(words, action))
        else:
            command.operands.append(Operand(_shown(action), action.help or "", action.type is Path))
    return command


def _option(words: tuple[str, ...], action: argparse.Action) -> Option:
    text = action.help or {"json": _JSON}.get(action.dest)
    if not text:
        raise PackagingError(
            f"{' '.join(words)}: {action.option_strings[0]} does not say what it is: give it a `help`"
        )
    value = None if action.nargs == 0 else _shown(action)
    choices = tuple(map(str, action.choices or ()))
    return Option(tuple(action.option_strings), value, text, choices, action.required)


def _shown(action: argparse.Action) -> str:
    name = (action.metavar if isinstance(action.metavar, str) else action.dest).upper().replace("_", "-")
    how_many = {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} ..."}
    return how_many.get(str(action.nargs), name)


def from_usage(name: str, text: str, usage: str) -> Command:
    """Out of a usage text: a line `NAME COMMAND …  what it does` each, then lines `  --option VALUE  what it is`."""
    command = Command((name,), text)
    shared: list[Option] = []
    for line in re.sub(r"\n {20,}", " ", usage).splitlines():
        if match := re.fullmatch(rf"{name} (\S+)((?: \[[^\]]+\])*)\s{{2,}}(.+)", line):
            verb, operands, said = match.groups()
            inner = Command((name, verb), said)
            for operand in re.findall(r"\[([^\]]+)\]", operands):
                if operand.startswith("--"):
                    inner.options.append(Option((operand,), None, _JSON))
                elif not operand.startswith("OPTION"):
                    inner.operands.append(Operand(f"[{operand}]", "", is_file=True))
            command.commands.append(inner)
        elif match := re.fullmatch(r"  (--\S+)(?: (\S+))?\s{2,}(.+)", line):
            shared.append(Option((match[1],), match[2], match[3]))
        elif line.strip():
            raise PackagingError(f"{name} --help: a line of no known form: {line}")
    if not command.commands or not shared:
        raise PackagingError(f"{name} --help: no commands or no options")
    command.options.extend(
        [
            *shared,
            Option(("-h", "--help"), None, "show this"),
            Option(("--version",), None, "show the version"),
        ]
    )
    return command
