"""The demo's carrier, asked as an agent worker asks it: a process of its own, over stdio."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from activities.mcp_servers import Servers
from workers.spawn import launcher
from workflows.messages import ToolOutcome
from workflows.spec import McpServer

CARRIER = McpServer(command=[sys.executable, "-m", "activities.demo_carrier"])


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    async with Servers(lambda _: {}, folder=Path(__file__).parents[2], launcher=launcher()) as running:
        yield running


async def test_it_offers_one_tool_that_only_reads(servers: Servers) -> None:
    (tool,), _ = await servers.list_tools("carrier", CARRIER)
    assert (tool.name, tool.repeatable, list(tool.parameters["properties"])) == ("track_parcel", True, ["tracking"])


async def test_a_parcel_was_last_seen_at_the_same_place_whoever_asks(servers: Servers) -> None:
    asked = [await servers.call("carrier", CARRIER, "track_parcel", {"tracking": "R100111150042"}, key) for key in "ab"]
    (text, outcome), again = asked
    assert (text, outcome) == again
    assert outcome is ToolOutcome.OK
    assert json.loads(text)["tracking"] == "R100111150042"


@pytest.mark.parametrize(
    ("number", "says"), [("order-1001", "String should match pattern"), ("S100800000020", "no scan")]
)
async def test_what_it_does_not_know_it_says(servers: Servers, number: str, says: str) -> None:
    text, outcome = await servers.call("carrier", CARRIER, "track_parcel", {"tracking": number}, "key")
    assert outcome is ToolOutcome.ERROR
    assert says in text
