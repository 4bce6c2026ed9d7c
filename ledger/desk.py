"""What may be asked of a ledger, by name: requests as the control socket brings them -> calls -> JSON-able answers.

The same commands are answered by the daemon and, where none runs, by the command itself, so that they cannot differ. A
request comes from whoever may open the socket: every key is checked, and one that is wrong is a LedgerError.
"""

from __future__ import annotations

import pwd
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, cast

from ledger.config import Settings
from ledger.errors import LedgerError
from ledger.tally import Tally
from ledger.times import iso, unix_ns
from wire.measures import MEASURES

MAX_TEXT_CHARACTERS = 1_000
MAX_ROWS = 50_000
"""Of one answer: the control socket takes 64 MiB."""
MAX_UNIX_NS = 1 << 63
MAX_EXACT = 1 << 53
"""Of JSON's numbers, where they are read as floats (RFC 8259, 6)."""

By = Literal["tenant", "hour", "day", "unit"]
BY: tuple[By, ...] = ("tenant", "hour", "day", "unit")
Request = Mapping[str, Any]
Answer = dict[str, Any]


class Books(Protocol):
    """`ledger.ledger.Ledger`, as its edges see it. All of one thread; every call may take long but `recorded`."""

    trouble: dict[str, str]

    def consume(self, wait_seconds: float) -> int: ...
    def roll_up(self) -> int: ...
    def take_up(self, settings: Settings) -> None: ...
    def recorded(self) -> Tally: ...
    def status(self) -> Answer: ...
    def reconcile(self) -> Answer: ...
    def verify(self) -> Answer: ...
    def usage(
        self, start_unix_ns: int, end_unix_ns: int, by: By, tenant: str | None, limit: int
    ) -> list[Answer]: ...
    def periods(self) -> list[Answer]: ...
    def close_period(self, name: str, by: str) -> Answer: ...
    def waive(self, period: str, blockers: list[str], reason: str, by: str) -> Answer: ...
    def retire(self, agent_id: str, at_unix_ns: int, reason: str, by: str) -> Answer: ...
    def manifest(self, name: str) -> Answer: ...
    def export(self, name: str) -> list[Answer]: ...
    def reread(self) -> None: ...
    def close(self) -> None: ...


class Asked(NamedTuple):
    """A request that has been checked: what to do with the books, and the user who asked."""

    request: Request
    by: str

    def text(self, key: str) -> str:
        value = self.request.get(key)
        if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT_CHARACTERS:
            raise LedgerError(
                f"{key}: a text of at most {MAX_TEXT_CHARACTERS} characters, and not an empty one"
            )
        return value

    def names(self, key: str) -> list[str]:
        values = self.request.get(key)
        if not isinstance(values, list) or not values or not all(isinstance(one, str) for one in values):
            raise LedgerError(f"{key}: a list of names, and not an empty one")
        return values

    def instant(self, key: str) -> int:
        value = self.request.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_UNIX_NS:
            raise LedgerError(f"{key}: nanoseconds since 1970")
        return value


def _usage(books: Books, asked: Asked) -> Answer:
    by = asked.request.get("by", "tenant")
    if by not in BY:
        raise LedgerError(f"by: one of {', '.join(BY)}")
    start, end = asked.instant("start_unix_ns"), asked.instant("end_unix_ns")
    if start >= end:
        raise LedgerError(f"from {iso(start)} to {iso(end)} is no time; --to is after --from")
    tenant = None if asked.request.get("tenant") is None else asked.text("tenant")
    # One more than is shown tells whether there are more.
    rows = books.usage(start, end, cast("By", by), tenant, MAX_ROWS + 1)
    return {"rows": [_exact(row) for row in rows[:MAX_ROWS]], "more": len(rows) > MAX_ROWS}


def _exact(row: Answer) -> Answer:
    """What readers of JSON may hold as a float becomes text."""
    large = {name: str(row[name]) for name in MEASURES if abs(int(row.get(name) or 0)) > MAX_EXACT}
    return {**row, **large}


def _retire(books: Books, asked: Asked) -> Answer:
    return books.retire(asked.text("agent_id"), asked.instant("at_unix_ns"), asked.text("reason"), asked.by)


def _reread(books: Books, _asked: Asked) -> Answer:
    books.reread()
    return {}


Command = Callable[[Books, Asked], Answer]
COMMANDS: dict[str, Command] = {
    "status": lambda books, _: books.status(),
    "usage": _usage,
    "periods": lambda books, _: {"periods": books.periods()},
    "close": lambda books, asked: books.close_period(asked.text("period"), asked.by),
    "waive": lambda books, asked: books.waive(
        asked.text("period"), asked.names("blockers"), asked.text("reason"), asked.by
    ),
    "retire": _retire,
    "reconcile": lambda books, _: books.reconcile(),
    "verify": lambda books, _: books.verify(),
    "export": lambda books, asked: {"lines": books.export(asked.text("period"))},
    "manifest": lambda books, asked: books.manifest(asked.text("period")),
    "reread": _reread,
}


def answer(books: Books, request: Request, uid: int) -> Answer:
    """Do what is asked by the user `uid`. LedgerError for what cannot be done, or is not known."""
    return command_of(request)(books, Asked(request, user_name(uid)))


def command_of(request: Request) -> Command:
    """LedgerError if there is none of that name."""
    name = request.get("command")
    command = COMMANDS.get(name) if isinstance(name, str) else None
    if command is None:
        raise LedgerError(f"commands: {', '.join(COMMANDS)}, reload")
    return command


def user_name(uid: int) -> str:
    """As it is written down beside what a person decided."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def instant(text: str) -> int:
    """`unix_ns` for what a person typed. LedgerError if it is none."""
    try:
        return unix_ns(text)
    except ValueError as error:
        raise LedgerError(str(error)) from None
