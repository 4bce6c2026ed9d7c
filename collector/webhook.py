"""Notices to somebody's HTTP server: signed, in order, again until they are taken. One thread of its own.

    POST <webhook.url>
    Content-Type: application/json
    Weighbridge-Signature: t=<unix seconds>,v1=<hex of HMAC-SHA256(secret, "<t>.<body>")>
    {"id": "<the same at each attempt>", "host": "...", "events": [{...}, ...]}

2xx is taken. 408, 425, 429, 5xx and silence are tried again, after a pause that doubles up to a minute, with full jitter.
Anything else says that the request will never be taken: its events are given up, and counted.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import os
import random
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from collector import __version__
from collector.config import WebhookSettings
from collector.errors import CollectorError
from collector.notices import Notices
from wire.daemon.journal import Journal

EVENTS_AT_ONCE = 100
LOOK_SECONDS = 1.0
FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 1.0, 60.0
_AGAIN = frozenset((408, 425, 429))

log = Journal("collector.webhook")


class WebhookSender:
    """Sends what `notices` gathers, between `start` and `close`. CollectorError when the secret cannot be read."""

    def __init__(self, settings: WebhookSettings, notices: Notices) -> None:
        assert settings.secret_file is not None
        self._settings = settings
        self._secret_file = settings.secret_file
        self._notices = notices
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self.delivered = 0
        """Events (notices) that were taken."""
        self.given_up = 0
        """Notices that the other end will never take."""
        self.failures = 0
        """Attempts without success."""
        self.trouble = ""
        read_secret(self._secret_file)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """What is on its way gets the time of one attempt."""
        self._stop.set()
        self._notices.told.set()
        self._thread.join(self._settings.timeout.ns / 1e9)

    def _run(self) -> None:
        while True:
            is_last = self._stop.is_set()
            events = self._notices.take(time.monotonic_ns(), EVENTS_AT_ONCE)
            if events:
                body = {"id": str(uuid.uuid4()), "host": os.uname().nodename, "events": events}
                self._deliver(msgspec.json.encode(body), len(events))
            elif is_last:
                return
            elif len(self._notices):
                # There is something, but nothing is due.
                self._stop.wait(LOOK_SECONDS)
            else:
                self._notices.told.wait()
                self._notices.told.clear()

    def _deliver(self, body: bytes, events: int) -> None:
        """Until it is taken, given up, or the collector ends."""
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            trouble, again = self._post(body)
            if not trouble:
                self.delivered += events
                if self.trouble:
                    log.info("webhook_recovered", url=self._settings.url)
                self.trouble = ""
                return
            self.failures += 1
            if trouble != self.trouble:
                log.warning("webhook_unavailable", url=self._settings.url, trouble=trouble, tried_again=again)
            self.trouble = trouble
            if not again:
                self.given_up += events
                return
            if self._stop.wait(random.uniform(0, pause_seconds)):  # noqa: S311 - jitter
                self.given_up += events
                return
            pause_seconds = min(2 * pause_seconds, MOST_PAUSE_SECONDS)

    def _post(self, body: bytes) -> tuple[str, bool]:
        """One attempt: what is wrong (empty: taken), and whether another one may help."""
        url = urlsplit(self._settings.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=self._settings.timeout.ns / 1e9)
        try:
            now = int(time.time())
            headers = {
                "Content-Type": "application/json",
                "User-Agent": f"weighbridge-collector/{__version__}",
                "Weighbridge-Signature": f"t={now},v1={signature(read_secret(self._secret_file), now, body)}",
            }
            path = f"{url.path or '/'}?{url.query}" if url.query else url.path or "/"
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            answer.read(1 << 16)
        except (OSError, http.client.HTTPException, CollectorError) as error:
            return f"{type(error).__name__}: {error}", True
        finally:
            connection.close()
        if 200 <= answer.status < 300:
            return "", False
        return f"status {answer.status}", answer.status in _AGAIN or answer.status >= 500


def signature(secret: bytes, unix_seconds: int, body: bytes) -> str:
    """What the receiver computes as well, and compares."""
    return hmac.new(secret, b"%d.%b" % (unix_seconds, body), hashlib.sha256).hexdigest()


def read_secret(path: Path) -> bytes:
    """Read for each attempt, so that a new one needs no restart."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise CollectorError(
            f"webhook.secret_file {path}: {error.strerror}; make it readable for this user"
        ) from error
    if len(secret) < 16:
        raise CollectorError(
            f"webhook.secret_file {path}: at least 16 bytes, such as of `openssl rand -hex 32`"
        )
    return secret
