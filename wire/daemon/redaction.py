"""What may be shown of settings, and the last net under everything else that leaves a host.

Two independent layers. `shown` is a whitelist: a text in the settings is shown only where its key is declared harmless, so
a key that somebody adds tomorrow is hidden until somebody decides. `Scrubber` takes what is known to be secret, and what
looks like it, out of any text: a journal repeats what an error message quoted.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import msgspec
import yaml

from wire.daemon.settings import SettingsError, files_of

T = TypeVar("T", bound=msgspec.Struct)

HIDDEN = "[hidden]"
LEAST_CHARACTERS = 6
"""Shorter ones cannot be told from ordinary words."""
MAX_FILE_BYTES = 1 << 20

_SECRET_NAME = re.compile(r"pass|secret|token|key|credential|auth", re.IGNORECASE)
_PATTERNS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\bwb1\.[A-Za-z0-9_-]{8,}"),
    # The user information of a URL.
    re.compile(r"(?<=://)[^\s/@\"']*(?:/[^\s@\"']*)?@"),
    re.compile(
        r"(?<![\w-])[\w.-]*(?:password|passwd|secret|token|api_?key|authorization|bearer)(?!_file)[\w.-]*"
        r"[\"']?\s*[:=]\s*[\"']?(?:bearer |basic )?(?P<value>[^\s\"',;}]{6,})",
        re.IGNORECASE,
    ),
)


def settings_and_secrets(
    read: Callable[[Path | None], T],
    file: Path | None,
    default_file: Path,
    defaults: T,
    harmless: Collection[str],
) -> tuple[T, str, list[str]]:
    """The settings, or the defaults and why they cannot be used; and the secrets that they and the environment hold."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    try:
        settings, trouble = read(file), ""
    except SettingsError as error:
        settings, trouble = defaults, str(error)
        secrets += scalars(files_of(file or default_file))
    return settings, trouble, [*secrets, *hidden(settings, harmless)]


def shown(settings: msgspec.Struct, harmless: Collection[str], endpoints: Collection[str]) -> dict[str, Any]:
    """Dotted key -> value. Text is hidden but for the keys in `harmless` (`*` for any); of those in `endpoints`, which
    are URLs, scheme, host and port are left. Paths, numbers and switches are shown, unless they stand in a map whose
    keys the settings do not know.
    """
    out: dict[str, Any] = {}
    for key, value, free in _leaves(settings, "", free=False):
        if _is_shown(key, value, free, harmless):
            out[key] = value
        else:
            out[key] = _endpoint(value) if key in endpoints else HIDDEN
    return out


def hidden(settings: msgspec.Struct, harmless: Collection[str]) -> Iterator[str]:
    """The texts that `shown` does not show, whole and, of URLs, in their parts."""
    for key, value, free in _leaves(settings, "", free=False):
        if not _is_shown(key, value, free, harmless):
            yield str(value)
            if "://" in str(value):
                yield from _parts_of_url(str(value))


def _leaves(value: Any, path: str, free: bool) -> Iterator[tuple[str, Any, bool]]:
    """(dotted key, value, whether it stands in a map of free keys) of everything that is no section, list or map."""
    if isinstance(value, msgspec.Struct):
        children = [(name, getattr(value, name), False) for name in value.__struct_fields__]
    elif isinstance(value, Mapping):
        children = [(str(key), inner, True) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(str(index), inner, free) for index, inner in enumerate(value)]
    else:
        yield path, value, free
        return
    for key, inner, inner_free in children:
        yield from _leaves(inner, f"{path}.{key}".lstrip("."), inner_free)


def _is_shown(key: str, value: Any, free: bool, harmless: Collection[str]) -> bool:
    if value is None or isinstance(value, bool) or value == "":
        return True
    if any(fnmatchcase(key, pattern) for pattern in harmless):
        return True
    return not free and not isinstance(value, str)


def _endpoint(url: str) -> str:
    """scheme://host:port of a URL, if it is beyond doubt which part is which."""
    try:
        split = urlsplit(url)
        port = f":{split.port}" if split.port else ""
        rest = f"{split.path}{split.query}{split.fragment}"
    except ValueError:
        return HIDDEN
    if not split.scheme or "@" in rest:
        return HIDDEN
    return f"{split.scheme}://{split.hostname or ''}{port}{f'/{HIDDEN}' if rest.strip('/') else ''}"


def _parts_of_url(url: str) -> Iterator[str]:
    authority, _, rest = url.partition("://")[2].rpartition("@")
    for part in (*authority.split(":", 1), *re.split(r"[/?&#=]", rest)[1:]):
        yield part
        yield unquote(part)


def scalars(files: Iterable[Path]) -> Iterator[str]:
    """Every value in settings files that cannot be used, but for paths that are there: which of them is a secret,
    nobody can tell.
    """
    for file in files:
        with contextlib.suppress(OSError, yaml.YAMLError):
            with file.open("rb") as handle:
                text = handle.read(MAX_FILE_BYTES).decode(errors="replace")
            before: yaml.Token | None = None
            for token in yaml.scan(text, Loader=yaml.CSafeLoader):
                value = str(token.value) if isinstance(token, yaml.ScalarToken) else ""
                if value and not isinstance(before, yaml.KeyToken) and not os.path.exists(value):
                    yield value
                before = token


def secrets_in_file(path: Path | None) -> Iterator[str]:
    """What a key or secret file holds, whole and line by line. Nothing if this user cannot read it."""
    if path is None:
        return
    try:
        with path.open("rb") as handle:
            text = handle.read(MAX_FILE_BYTES).decode(errors="replace")
    except OSError:
        return
    yield text
    public = False
    for line in text.splitlines():
        public = line.startswith("-----BEGIN CERTIFICATE") or (public and not line.startswith("-----END"))
        if not public and not line.startswith("-----"):
            yield line


class Scrubber:
    """Takes secrets out of text."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {
            form
            for secret in secrets
            if len(secret.strip()) >= LEAST_CHARACTERS
            for form in _forms(secret.strip())
        }
        # The longest first: a part of one that is gone is no trace of it.
        self._forms = sorted(forms, key=len, reverse=True)

    def text(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        for pattern in _PATTERNS:
            text = pattern.sub(_hide, text)
        return text


def _hide(match: re.Match[str]) -> str:
    if "value" not in match.re.groupindex:
        return HIDDEN
    start, end = (at - match.start() for at in match.span("value"))
    return f"{match[0][:start]}{HIDDEN}{match[0][end:]}"


def _forms(secret: str) -> Iterator[str]:
    """A text as it is, and as journals, URLs and headers write it."""
    yield secret
    yield json.dumps(secret)[1:-1]
    yield quote(secret, safe="")
    data = secret.encode()
    yield data.hex()
    for shift in range(3):
        # Of base64 within something longer, the characters that only this text decides.
        coded = base64.b64encode(b"\0" * shift + data).decode().rstrip("=")
        inner = coded[(8 * shift + 5) // 6 : (8 * (shift + len(data))) // 6]
        if len(inner) >= LEAST_CHARACTERS:
            yield inner
            yield inner.translate({ord("+"): "-", ord("/"): "_"})
