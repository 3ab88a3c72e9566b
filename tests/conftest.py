"""Servers that all tests share; they are started when the first test asks for one.

A test that stops or kills a server starts its own (`servers.TemporalServer`, `servers.Broker`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import servers


@pytest.fixture(scope="session")
def temporal_server() -> Iterator[servers.TemporalServer]:
    """Temporal's dev server: `address`, `ui`."""
    with servers.TemporalServer() as server:
        yield server


@pytest.fixture(scope="session")
def broker() -> Iterator[servers.Broker]:
    """The embedded broker: `bootstrap`, `create_topics`."""
    with servers.Broker() as server:
        yield server


@pytest.fixture
def eventually() -> Callable[..., object]:
    """Asks a check until its answer is true."""
    return servers.eventually
