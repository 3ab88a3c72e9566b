"""Servers that all tests share; they are started when the first test asks for one.

A test that stops or kills a server starts its own (`servers.TemporalServer`, `new_broker()`).

Tests that ask for `broker`, `fresh_broker` or `new_broker` run on either broker: the embedded one (`make test`), or
Apache Kafka (`make test-kafka`, which is `pytest --broker kafka` and leaves out all other tests). What only Apache
Kafka can do is marked `kafka`; without it, such tests are not collected. `make test-kafka` is the whole form, and also
runs what is marked `whole`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator

import hypothesis
import pytest
import servers

hypothesis.settings.register_profile("perennial", deadline=None)  # no test asserts a time: machines are noisy
hypothesis.settings.load_profile("perennial")

_BROKER_FIXTURES = {"broker", "fresh_broker", "new_broker"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--broker",
        choices=("embedded", "kafka"),
        default=os.environ.get("PERENNIAL_TEST_BROKER", "embedded"),
        help="the broker to test on: the embedded one, or Apache Kafka, which needs Java 17 and Maven",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kafka: needs Apache Kafka")
    config.addinivalue_line("markers", "whole: takes minutes, so only `make test-kafka` runs it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_kafka = config.getoption("--broker") == "kafka"

    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("kafka") or item.get_closest_marker("whole"):
            return on_kafka
        return not on_kafka or not _BROKER_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))

    if left_out := [item for item in items if not wanted(item)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted(item)]


@pytest.fixture(scope="session")
def temporal_server() -> Iterator[servers.TemporalServer]:
    """Temporal's dev server: `address`, `ui`."""
    with servers.TemporalServer() as server:
        yield server


@pytest.fixture(scope="session")
def new_broker(request: pytest.FixtureRequest) -> Callable[[], servers.AnyBroker]:
    """Makes a broker of the test's own, to stop or kill; use it in a `with`."""
    if request.config.getoption("--broker") == "embedded":
        return servers.Broker
    from apache_kafka import ApacheKafka  # noqa: PLC0415  # it is not there without Java

    return ApacheKafka


@pytest.fixture(scope="session")
def broker(new_broker: Callable[[], servers.AnyBroker]) -> Iterator[servers.AnyBroker]:
    """The broker that tests share: `bootstrap`, `create_topics`. Others' topics may be there."""
    with new_broker() as server:
        yield server


@pytest.fixture
async def fresh_broker(
    request: pytest.FixtureRequest, new_broker: Callable[[], servers.AnyBroker]
) -> AsyncIterator[servers.AnyBroker]:
    """A broker without topics, not to be stopped. Apache Kafka is slow to start: the shared one, emptied."""
    if new_broker is servers.Broker:
        with new_broker() as server:
            yield server
    else:
        server = request.getfixturevalue("broker")
        await server.delete_topics()
        yield server


@pytest.fixture
def eventually() -> Callable[..., object]:
    """Asks a check until its answer is true."""
    return servers.eventually
