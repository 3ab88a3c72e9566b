"""A time-skipping Temporal server, and an agent of one's own per test."""

from __future__ import annotations

import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from workers.wiring import SEARCH_ATTRIBUTES


@pytest.fixture
async def skipping() -> AsyncIterator[WorkflowEnvironment]:
    """A server that skips waiting time; each test has its own, since what one leaves open stops time for all."""
    server = Path(sys.executable).with_name("temporal-test-server")
    env = await WorkflowEnvironment.start_time_skipping(
        data_converter=pydantic_data_converter, test_server_existing_path=str(server)
    )
    async with env:
        keyword = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
        await env.client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(
                namespace=env.client.namespace, search_attributes=dict.fromkeys(SEARCH_ATTRIBUTES, keyword)
            )
        )
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
