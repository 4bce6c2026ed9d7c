"""Completions for bash, zsh and fish, out of the command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from programs import Command, Option

_BASH = """\
# bash completion for {name}
{function}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} path="" word i skip="" choices=""
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        if [ -n "$skip" ]; then skip="" && continue; fi
        case "$path $word" in
            {paths}) path="$path $word" && continue ;;
        esac
        case $word in
            {takers}) skip=$word ;;
        esac
    done
    case "$path $skip" in
{values}
    esac
    if [ -n "$skip" ] && [ -z "$choices" ]; then
        compopt -o default
        return
    fi
    if [ -z "$skip" ]; then
        case $path in
{words}
        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$cur")
}}
complete -F {function} {name}
"""


def bash(program: Command) -> str:
    """For /usr/share/bash-completion/completions/NAME."""
    (name,) = program.words
    nodes = program.walk()
    takers = sorted(
        {flag for node in nodes for option in node.options if option.value for flag in option.flags}
    )
    values, words = [], []
    for node in nodes:
        path = _path(node)
        for option in node.options:
            if option.choices:
                patterns = "|".join(shlex.quote(f"{path} {flag}") for flag in option.flags)
                values.append(f"        {patterns}) choices={shlex.quote(' '.join(option.choices))} ;;")
        offered = [inner.words[-1] for inner in node.commands] + [option.flags[-1] for option in node.options]
        files = " compopt -o default;" if any(operand.is_file for operand in node.operands) else ""
        words.append(f"            {shlex.quote(path)}){files} choices={shlex.quote(' '.join(offered))} ;;")
    return _BASH.format(
        name=name,
        function=_function(name),
        paths="|".join(shlex.quote(_path(node)) for node in nodes if node is not program) or "-",
        takers="|".join(takers) or "-",
        values="\n".join(values) or "        -) ;;",
        words="\n".join(words),
    )


def zsh(program: Command) -> str:
    """For a directory of $fpath, as _NAME: a function for each command, the program's own last."""
    (name,) = program.words
    functions = [_zsh_function(node) for node in reversed(program.walk())]
    return f"#compdef {name}\n\n" + "\n".join(functions) + f'\n{_function(name)} "$@"\n'


def _zsh_function(node: Command) -> str:
    arguments = [_zsh_option(option) for option in node.options]
    lines = [f"{_function(*node.words)}() {{"]
    if node.commands:
        entries = " ".join(shlex.quote(f"{inner.words[-1]}:{inner.text}") for inner in node.commands)
        arguments += ["'1: :->command'", "'*:: :->rest'"]
        lines += [
            "    local context state state_descr line",
            "    typeset -A opt_args",
            "    local -a commands",
            f"    commands=({entries})",
            f"    _arguments -C {' '.join(arguments)}",
            "    case $state in",
            "        command) _describe command commands ;;",
            "        rest)",
            "            case $line[1] in",
            *(f"                {inner.words[-1]}) {_function(*inner.words)} ;;" for inner in node.commands),
            "            esac",
            "            ;;",
            "    esac",
        ]
    else:
        arguments += [
            f"'*:{_colons(operand.name)}:{'_files' if operand.is_file else ' '}'" for operand in node.operands
        ]
        lines.append(f"    _arguments {' '.join(arguments)}")
    return "\n".join([*lines, "}", ""])


def _zsh_option(option: Option) -> str:
    said = option.text.replace("[", "(").replace("]", ")").replace(":", "\\:")
    flag = option.flags[-1]
    if option.value is None:
        return shlex.quote(f"{flag}[{said}]")
    what = f"({' '.join(option.choices)})" if option.choices else "_files"
    return shlex.quote(f"*{flag}[{said}]:{_colons(option.value)}:{what}")


def _colons(text: str) -> str:
    return text.replace(":", "\\:").lower()


def fish(program: Command) -> str:
    """For vendor_completions.d, as NAME.fish."""
    (name,) = program.words
    lines = [f"# fish completion for {name}", f"complete -c {name} -f"]
    for node in program.walk():
        condition = _fish_condition(node)
        lines += [
            f"complete -c {name}{condition} -a {inner.words[-1]} -d {_fish(inner.text)}"
            for inner in node.commands
        ]
        lines += [f"complete -c {name}{condition} {_fish_option(option)}" for option in node.options]
        if any(operand.is_file for operand in node.operands):
            lines.append(f"complete -c {name}{condition} -F")
    return "\n".join([*lines, ""])


def _fish_condition(node: Command) -> str:
    """Where the words of this command were typed and none of those below it."""
    tests = [f"__fish_seen_subcommand_from {word}" for word in node.words[1:]]
    if node.commands:
        tests.append(
            f"not __fish_seen_subcommand_from {' '.join(inner.words[-1] for inner in node.commands)}"
        )
    return f" -n {shlex.quote('; and '.join(tests))}" if tests else ""


def _fish_option(option: Option) -> str:
    words = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags]
    if option.choices:
        words.append(f"-x -a {shlex.quote(' '.join(option.choices))}")
    elif option.value is not None:
        words.append("-r -F")
    return f"{' '.join(words)} -d {_fish(option.text)}"


def _fish(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _path(node: Command) -> str:
    return "".join(f" {word}" for word in node.words[1:])


def _function(*words: str) -> str:
    return "_" + re.sub(r"\W", "_", "_".join(words))


def files(program: Command, kind: str) -> Iterator[tuple[str, str]]:
    """Where each shell looks, and what for. zsh looks elsewhere on Debian than everywhere else."""
    (name,) = program.words
    functions = "vendor-completions" if kind == "deb" else "site-functions"
    yield f"usr/share/bash-completion/completions/{name}", bash(program)
    yield f"usr/share/zsh/{functions}/_{name}", zsh(program)
    yield f"usr/share/fish/vendor_completions.d/{name}.fish", fish(program)
