"""Who this collector is to the others: a name that stays with its log, so that after a restart its claims are its own."""

from __future__ import annotations

import uuid
from pathlib import Path

from collector.errors import CollectorError
from wire.daemon.files import replace_durably

OWNER_FILE = "collector.id"


def owner_of(path: Path) -> bytes:
    """16 bytes, made once. CollectorError when the file cannot be used."""
    try:
        if not path.exists():
            replace_durably(path, f"{uuid.uuid4()}\n".encode(), 0o640)
        return uuid.UUID(path.read_text().strip()).bytes
    except OSError as error:
        raise CollectorError(f"{path}: {error.strerror}; make it readable for this user") from error
    except ValueError:
        raise CollectorError(
            f"{path} is no UUID: move it away, a new one is made; what this collector has claimed waits for a minute then"
        ) from None
