"""The local port: /metrics (OpenMetrics or text), /livez and /readyz, in a thread of its own.

Bounded, since whatever runs on the host may connect: connections, time and header sizes.
"""

from __future__ import annotations

import errno
import json
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from wire.daemon.settings import SettingsError

MAX_CONNECTIONS = 16
READ_TIMEOUT_SECONDS = 5.0

Reasons = Callable[[], Mapping[str, str]]
"""What is wrong now: reason -> sentence. Empty means all is well."""


class LocalPortError(SettingsError):
    """The port cannot be opened; the message names the setting to change."""


def new_registry() -> CollectorRegistry:
    """A registry that already tells of the process itself (process_*)."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    return registry


class LocalPort:
    """Serves until `close`. `live`: a reason here means restart me. `ready`: a reason means look at me."""

    def __init__(
        self, address: str, port: int, registry: CollectorRegistry, live: Reasons, ready: Reasons
    ) -> None:
        self._where = (address, port)
        self._registry = registry
        self._checks = {"/livez": live, "/readyz": ready}
        self._server: _Server | None = None

    def start(self) -> None:
        address, port = self._where
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._server = _Server(address.strip("[]"), port, family, self._registry, self._checks)
        except OSError as error:
            where = f"{address}:{port}"
            if error.errno == errno.EADDRINUSE:
                fix = "is in use; stop what listens there or set `local_port.port` to another"
            elif error.errno == errno.EACCES:
                fix = "needs privilege; set `local_port.port` to 1024 or above"
            else:
                fix = f"cannot be opened ({error.strerror}); set `local_port.address` to an address of this host"
            raise LocalPortError(f"local port {where} {fix}") from error
        threading.Thread(target=self._server.serve_forever, name="local-port", daemon=True).start()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.server_address[1])

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(ThreadingMixIn, TCPServer):
    # Not HTTPServer: that asks DNS for its own name before it listens.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(
        self, address: str, port: int, family: int, registry: CollectorRegistry, checks: dict[str, Reasons]
    ) -> None:
        self.address_family = family
        self.registry = registry
        self.checks = checks
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((address, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away or spoke nonsense is not the daemon's news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "weighbridge"
    sys_version = ""
    timeout = READ_TIMEOUT_SECONDS
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, encode(self.server.registry), content_type)
        elif path in self.server.checks:
            self._check(path)
        else:
            self._answer(404, b"try /metrics, /livez or /readyz\n", "text/plain; charset=utf-8")

    do_HEAD = do_GET  # noqa: N815 - the base class dispatches by this name

    def _check(self, path: str) -> None:
        try:
            reasons = dict(self.server.checks[path]())
        except Exception as error:  # noqa: BLE001 - a check that fails is itself the finding
            reasons = {"check_failed": f"{type(error).__name__}: {error}"}
        if not reasons:
            self._answer(200, b"ok\n", "text/plain; charset=utf-8")
            return
        body = json.dumps({"status": "not " + path.strip("/").removesuffix("z"), "reasons": reasons}) + "\n"
        self._answer(503, body.encode(), "application/json")

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Scrapes are not events."""
