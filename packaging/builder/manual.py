"""Manual pages, section 8, out of the command lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime

from checkout import Target
from programs import Command, Option

_FILES = {
    "weighbridge-agent": {
        "/etc/weighbridge/agent.yaml": "settings; every default is in the program, so it may be empty",
        "/etc/weighbridge/agent.d/*.yaml": "drop-ins, read after it in lexical order",
        "/var/lib/weighbridge": "identity and spool",
        "/run/weighbridge/agent.sock": "control socket, for status, top and explain",
    },
    "weighbridge-probes": {
        "/etc/weighbridge/internal-networks": "which peers are internal: a CIDR a line, !CIDR for external after all",
        "/run/weighbridge/bpf": "pinned programs and maps",
        "/usr/lib/weighbridge/bpf/bcc": "the helper of engine bcc",
    },
    "weighbridge-collector": {
        "/etc/weighbridge/collector.yaml": "settings; every default is in the program, so it may be empty",
        "/etc/weighbridge/collector.d/*.yaml": "drop-ins, read after it in lexical order",
        "/var/lib/weighbridge-collector": "log, certificate authority, state, audit log, control socket",
    },
    "weighbridge-ledger": {
        "/etc/weighbridge/ledger.yaml": "settings; every default is in the program, so it may be empty",
        "/etc/weighbridge/ledger.d/*.yaml": "drop-ins, read after it in lexical order",
        "/var/lib/weighbridge-ledger": "the database, state, control socket",
        "/usr/share/weighbridge/schema.sql": "the tables, to read",
    },
    "usage-replay": {"/etc/weighbridge/collector.yaml": "settings of the collector to send to"},
}
_EXITS = {
    "0": "success",
    "1": "a finding: not ready, unsound, rejected",
    "2": "wrong usage, settings or environment",
}
_PROBES_EXITS = {
    "0": "success",
    "1": "it could not be done; the reason is on standard error",
    "2": "wrong usage",
    "3": "of status: nothing is loaded",
}


def page(program: Command, others: list[str], target: Target) -> str:
    """Roff, for man(1)."""
    (name,) = program.words
    date = datetime.fromtimestamp(target.epoch_seconds, UTC).date().isoformat()
    summary = program.text.rstrip(".").replace("\n", " ")
    return "\n".join(
        [
            f'.TH {_plain(name.upper())} 8 {date} "Weighbridge {target.version}" Weighbridge',
            ".SH NAME",
            f"{_plain(name)} \\- {_plain(summary[:1].lower() + summary[1:])}",
            ".SH SYNOPSIS",
            *_synopsis(program),
            *_options("OPTIONS", program),
            *_commands(program),
            ".SH FILES",
            *_tagged(_FILES[name]),
            ".SH EXIT STATUS",
            *_tagged(_PROBES_EXITS if name == "weighbridge-probes" else _EXITS),
            ".SH SEE ALSO",
            " ,\n".join(f".BR {_plain(other)} (8)" for other in others if other != name),
            "",
        ]
    )


def _synopsis(program: Command) -> Iterator[str]:
    """A line for each command; what all of them take is in OPTIONS."""
    for command in program.walk():
        if command.commands:
            continue
        words = [f"\\fB{_plain(word)}\\fR" for word in command.words]
        if command is program:
            words.append("[\\fIOPTION\\fR ...]")
        else:
            words += [_in_synopsis(option) for option in command.options if "--help" not in option.flags]
        words += [f"\\fI{_plain(operand.name)}\\fR" for operand in command.operands]
        yield " ".join(words)
        yield ".br"


def _in_synopsis(option: Option) -> str:
    return _shown(option) if option.required else f"[{_shown(option)}]"


def _options(title: str, program: Command) -> Iterator[str]:
    yield f".SH {title}"
    for option in program.options:
        yield from _one(_shown(option), _said(option))


def _commands(program: Command) -> Iterator[str]:
    leaves = [c for c in program.walk() if not c.commands and c is not program]
    if leaves:
        yield ".SH COMMANDS"
    for command in leaves:
        yield ".SS " + _plain(" ".join(command.words[1:]))
        yield _sentence(command.text)
        for operand in command.operands:
            if operand.text:
                yield from _one(f"\\fI{_plain(operand.name)}\\fR", operand.text)
        for option in command.options:
            if "--help" not in option.flags:
                yield from _one(_shown(option), _said(option))


def _tagged(entries: dict[str, str]) -> Iterator[str]:
    for name, text in entries.items():
        yield from _one(f"\\fI{_plain(name)}\\fR" if "/" in name else _plain(name), text)


def _one(tag: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield tag
    yield _sentence(text)


def _said(option: Option) -> str:
    if option.choices:
        return f"{option.text} ({', '.join(option.choices)})"
    return option.text


def _shown(option: Option) -> str:
    flags = ", ".join(f"\\fB{_plain(flag)}\\fR" for flag in option.flags)
    return flags if option.value is None else f"{flags} \\fI{_plain(option.value)}\\fR"


def _sentence(text: str) -> str:
    """A line of text, never one that roff takes for a request."""
    plain = _plain(text[:1].upper() + text[1:] if re.match(r"[a-z]+[ ,.;:]", text) else text)
    return plain if plain.endswith((".", "?")) else f"{plain}."


def _plain(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("'", "\\(aq")
    return f"\\&{escaped}" if escaped.startswith((".", "\\(aq")) else escaped
