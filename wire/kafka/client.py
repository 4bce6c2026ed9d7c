"""librdkafka: how brokers are reached, and errors with their fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException


def connection(
    client_id: str, brokers: Sequence[str], client: Mapping[str, str | int | bool], timeout_seconds: float
) -> dict[str, Any]:
    """How brokers are reached: the same for who writes and who reads. `client`: what an operator passes through."""
    return {
        "client.id": client_id,
        "socket.keepalive.enable": True,
        "reconnect.backoff.max.ms": 2_000,
        "socket.timeout.ms": round(timeout_seconds * 1_000),
        # What it would print is in the journal, once, with its fix.
        "log_level": 0,
        **client,
        "bootstrap.servers": ",".join(brokers),
    }


class Explainer:
    """Errors as a person needs them: the cause the brokers or the network named, and the fix."""

    def __init__(self, section: str, fixes: Mapping[int, str]) -> None:
        """`section`: where `brokers` and `client` stand in the settings. `fixes`: what else is to be done about which
        error."""
        security = f"`{section}.client` has security.protocol, sasl.* and ssl.*"
        refused = f"the brokers refuse these credentials; {security}"
        self._unreachable = f"are the `{section}.brokers` up, reachable, and is it their protocol? {security}"
        self._fixes = {
            KafkaError._AUTHENTICATION: refused,
            KafkaError.SASL_AUTHENTICATION_FAILED: refused,
            KafkaError._SSL: "TLS failed: ssl.ca.location must hold the CA of the brokers' certificates, and the port"
            f" must be one with TLS; {security}",
            KafkaError._RESOLVE: f"the name is not known; see `{section}.brokers`",
            **fixes,
        }

    def explain(self, what: str, error: KafkaError | Exception, said: KafkaError | None) -> str:
        """`said`: what librdkafka was last told."""
        code = _kafka_error(error)
        # A time-out says only that nothing happened; what was last told says why.
        cause = said if said is not None and (code is None or code.code() not in self._fixes) else code
        # Without librdkafka's timings: the same trouble has the same words, and is one line in the journal.
        text = (text_of(error) if cause is None else cause.str()).partition(" (after ")[0]
        fix = self._unreachable if cause is None else self._fixes.get(cause.code(), self._unreachable)
        return f"{what}: {text}; {fix}"


class Told:
    """What librdkafka said last, as its `error_cb`."""

    def __init__(self) -> None:
        self.last: KafkaError | None = None

    def __call__(self, error: KafkaError) -> None:
        """That all brokers are down follows from what was said before."""
        if self.last is None or error.code() != KafkaError._ALL_BROKERS_DOWN:
            self.last = error


def text_of(error: KafkaError | Exception) -> str:
    known = _kafka_error(error)
    return str(error) if known is None else known.str()


def _kafka_error(error: KafkaError | Exception) -> KafkaError | None:
    if isinstance(error, KafkaException) and error.args and isinstance(error.args[0], KafkaError):
        return error.args[0]
    return error if isinstance(error, KafkaError) else None
