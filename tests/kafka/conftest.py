"""One real broker for all tests here. What a test stops or kills it starts again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bench.kafka_broker import KafkaBroker, missing


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    why = missing()
    if why and not os.environ.get("CI"):
        pytest.skip(why)
    assert not why, why
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.fixture
def shaken(broker: KafkaBroker) -> Iterator[KafkaBroker]:
    """The broker, for a test that stops it; running again afterwards."""
    yield broker
    if broker.process is None:
        broker.start()
    else:
        broker.resume()
