"""The tools remember, recall and forget, run as activities are: within the scopes of the spec, once for each call."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from temporalio.testing import ActivityEnvironment

from activities.ledger import Ledger
from activities.mcp_servers import Servers
from activities.memory import Memory
from activities.memory_tools import memory_tools
from activities.tools import Tools
from workflows.messages import ToolCall, ToolOutcome, ToolRequest, ToolResult
from workflows.spec import MemorySpec, Scope

AGENT = "agent/store/desk/customer-1"
OTHER = "agent/store/desk/customer-2"
SPEC = MemorySpec(read=[Scope.KEY, Scope.AGENT], write=[Scope.KEY])


class Agent:
    """Calls tools as an agent's workflow does; each call under a key of its own, unless one is given."""

    def __init__(self, ledger: Ledger, spec: MemorySpec, workflow_id: str = AGENT, team: str | None = None) -> None:
        tools = {tool.name: tool for tool in memory_tools(spec, team)}
        nobody = Servers(lambda _: {})
        workspace = Path("/some/workspace")
        self._tools = Tools(lambda _, name: tools.get(name), workspace, ledger, nobody, Memory(ledger))
        self._workflow_id = workflow_id
        self._calls = 0

    async def call(self, tool: str, key: str = "", **arguments: Any) -> ToolResult:
        self._calls += 1
        call = ToolCall(id=f"c{self._calls}", name=tool, arguments=json.dumps(arguments))
        request = ToolRequest(
            workflow_id=self._workflow_id,
            turn=7,
            call=call,
            spec_digest="s",
            idempotency_key=key or f"{self._workflow_id}/7/{self._calls}/0",
        )
        return await ActivityEnvironment().run(self._tools.run_tool, request)

    async def ok(self, tool: str, key: str = "", **arguments: Any) -> Any:
        result = await self.call(tool, key, **arguments)
        assert result.outcome is ToolOutcome.OK, result
        return json.loads(result.content) if result.content.startswith("{") else result.content

    async def refused(self, tool: str, **arguments: Any) -> str:
        result = await self.call(tool, **arguments)
        assert result.outcome is ToolOutcome.ERROR, result
        assert len(result.content) < 400
        return result.content


@pytest.fixture
async def sqlite_ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        yield ledger


async def test_a_fact_is_remembered_recalled_and_forgotten(sqlite_ledger: Ledger) -> None:
    """What is recalled says where it comes from; what is forgotten is not recalled."""
    agent = Agent(sqlite_ledger, SPEC)
    kept = await agent.ok("remember", text="Has a dog.", scope="key", pinned=True)
    found = await agent.ok("recall", query="dogs")
    assert found["facts"] == [kept]
    assert (kept["kept_by"], kept["turn"], kept["scope"], kept["pinned"]) == (AGENT, 7, "key", True)
    assert set(kept) == {"id", "text", "scope", "pinned", "kept_at", "kept_by", "turn", "entry"}
    assert await agent.ok("forget", id=kept["id"], why="it ran away") == "Forgotten: Has a dog."
    assert (await agent.ok("recall", query="dogs"))["facts"] == []


async def test_a_try_after_the_first_has_no_further_effect(sqlite_ledger: Ledger) -> None:
    """P9: the same call, the same fact; the same forgetting is no complaint."""
    agent = Agent(sqlite_ledger, SPEC)
    first = await agent.ok("remember", key="k", text="Has a dog.", scope="key")
    assert await agent.ok("remember", key="k", text="Has a dog.", scope="key") == first
    for _ in range(2):
        await agent.ok("forget", key="f", id=first["id"], why="it ran away")
    assert "forgotten already" in await agent.refused("forget", id=first["id"], why="once more")


async def test_an_agent_keeps_to_the_scopes_of_its_spec(sqlite_ledger: Ledger) -> None:
    """What it may not, it is told, with what it may; a scope that is none is a wrong argument."""
    agent = Agent(sqlite_ledger, SPEC)
    owner = Agent(sqlite_ledger, MemorySpec(read=list(Scope), write=list(Scope)))
    shared = await owner.ok("remember", text="Dogs may come in.", scope="agent")
    await owner.ok("remember", text="Dogs of the tenant.", scope="tenant")
    assert "You may not remember facts in scope agent; the scopes for that are: key." in await agent.refused(
        "remember", text="Dogs.", scope="agent"
    )
    assert "may not recall facts of scope tenant" in await agent.refused("recall", query="dog", scope="tenant")
    assert [fact["text"] for fact in (await agent.ok("recall", query="dogs"))["facts"]] == ["Dogs may come in."]
    assert "of scope agent" in await agent.refused("forget", id=shared["id"], why="why not")
    assert "Input should be 'key', 'agent', 'team' or 'tenant'" in await agent.refused(
        "remember", text="x", scope="world"
    )


async def test_scope_key_stays_with_the_key_and_scope_agent_does_not(sqlite_ledger: Ledger) -> None:
    """Two customers of one agent: what is the agent's both know, what is one's the other does not."""
    spec = MemorySpec(read=[Scope.KEY, Scope.AGENT], write=[Scope.KEY, Scope.AGENT])
    one, other = Agent(sqlite_ledger, spec), Agent(sqlite_ledger, spec, OTHER)
    own = await one.ok("remember", text="Has a dog.", scope="key")
    await one.ok("remember", text="Dogs may come in.", scope="agent")
    found = (await other.ok("recall", query="dog"))["facts"]
    assert [(fact["text"], fact["kept_by"]) for fact in found] == [("Dogs may come in.", AGENT)]
    assert "no fact" in await other.refused("forget", id=own["id"], why="why not")


async def test_what_makes_no_sense_is_answered_briefly(sqlite_ledger: Ledger) -> None:
    """P14: a megabyte, nothing, arguments that are none."""
    agent = Agent(sqlite_ledger, SPEC)
    assert "1,000 characters" in await agent.refused("remember", text="x" * 1_000_000, scope="key")
    assert "empty" in await agent.refused("remember", text="", scope="key")
    assert "no fact" in await agent.refused("forget", id="x" * 1_000_000, why="why not")
    assert "Wrong arguments: scope" in await agent.refused("remember", text="x")
    assert (await agent.ok("recall", query='"*(' + "x" * 1_000_000))["facts"] == []


async def test_many_facts_make_a_short_answer(sqlite_ledger: Ledger) -> None:
    """Some of them, and how many more there are."""
    agent = Agent(sqlite_ledger, SPEC)
    for number in range(60):
        await agent.ok("remember", text=f"dog {number} " + "x" * 900, scope="key")
    result = await agent.call("recall", query="dog")
    assert len(result.content) < 15_000
    told = json.loads(result.content)
    assert len(told["facts"]) + told["more"] == 60
    assert told["note"].startswith("60 facts")


async def test_a_team_shares_its_facts(sqlite_ledger: Ledger) -> None:
    """Another agent that names the team recalls and forgets them; who names another one, or none, does not."""
    spec = MemorySpec(read=[Scope.KEY, Scope.TEAM], write=[Scope.TEAM])
    follower, clerk, stranger = (
        Agent(sqlite_ledger, spec, f"agent/store/{name}/1", team)
        for name, team in [("logistics", "parcels"), ("desk", "parcels"), ("security", "accounts")]
    )
    kept = await follower.ok("remember", text="Lyon is on strike.", scope="team")
    (shown,) = (await clerk.ok("recall", query="strike in Lyon"))["facts"]
    assert shown == kept
    assert (shown["scope"], shown["kept_by"]) == ("team", "agent/store/logistics/1")
    assert (await stranger.ok("recall", query="strike"))["facts"] == []
    assert "no fact" in await stranger.refused("forget", id=kept["id"], why="why not")
    assert await clerk.ok("forget", id=kept["id"], why="it is over") == "Forgotten: Lyon is on strike."
    assert (await follower.ok("recall", query="strike"))["facts"] == []


async def test_an_agent_in_no_team_is_told_so(sqlite_ledger: Ledger) -> None:
    """P14: a spec like that is refused when it is read; here nothing breaks, and nothing is kept elsewhere."""
    lone = Agent(sqlite_ledger, MemorySpec(read=[Scope.TEAM], write=[Scope.TEAM]))
    assert "is in no team" in await lone.refused("remember", text="Lyon is on strike.", scope="team")
    assert (await lone.ok("recall", query=""))["facts"] == []
