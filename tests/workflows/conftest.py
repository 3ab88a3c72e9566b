"""A time-skipping Temporal server, and an agent of one's own per test."""

from __future__ import annotations

import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment


@pytest.fixture(scope="session")
async def skipping() -> AsyncIterator[WorkflowEnvironment]:
    """A server that skips waiting time."""
    server = Path(sys.executable).with_name("temporal-test-server")
    env = await WorkflowEnvironment.start_time_skipping(
        data_converter=pydantic_data_converter, test_server_existing_path=str(server)
    )
    async with env:
        yield env


@pytest.fixture
def client(skipping: WorkflowEnvironment) -> Client:
    """A client of the time-skipping server."""
    return skipping.client


@pytest.fixture
def queue() -> str:
    """A task queue of the test's own."""
    return f"test-{uuid.uuid4()}"


@pytest.fixture
def agent_id() -> str:
    """The workflow id of an agent of the test's own."""
    return f"agent/acme/tester/{uuid.uuid4()}"


@pytest.fixture
def eventually():
    import asyncio
    import inspect

    async def wait(check, timeout=30):
        async with asyncio.timeout(timeout):
            while True:
                v = check()
                if inspect.isawaitable(v):
                    v = await v
                if v:
                    return v
                await asyncio.sleep(0.05)

    return wait
