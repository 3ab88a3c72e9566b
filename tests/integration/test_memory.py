"""Memory on the real stack: remembered in one turn, recalled in a later one and by others as the scope says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from stack import PERENNIAL, Finished, Stack, run
from traffic import letter, workflow_of

from activities.entries import Entry, MemoryMessage, ToolMessage
from activities.ledger import Ledger

_SPEC = """
name: customer-service
tenant: {tenant}
team: front
instructions: You answer customers.
memory:
  read: [key, agent, team, tenant]
  write: [key, agent, team, tenant]
"""
KEY, SAME_AGENT, TEAM_MATE, OTHER_AGENT, OTHER_TENANT = (
    workflow_of("customer-1"),
    workflow_of("customer-2"),
    workflow_of("customer-1").replace("/customer-service/", "/chat/"),
    workflow_of("customer-1").replace("/customer-service/", "/desk/"),
    workflow_of("customer-1").replace("/store/", "/bank/"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("memory")
    specs = folder / "specs"
    specs.mkdir()
    for tenant in ("store", "bank"):
        (specs / f"{tenant}.yaml").write_text(_SPEC.format(tenant=tenant))
    store = _SPEC.format(tenant="store")
    (specs / "chat.yaml").write_text(store.replace("name: customer-service", "name: chat"))
    (specs / "desk.yaml").write_text(
        store.replace("name: customer-service", "name: desk").replace("team: front\n", "").replace("team, ", "")
    )
    async with Stack(folder / "state", specs=specs) as running:
        yield running


async def tell(stack: Stack, text: str, *agents: str) -> None:
    """Send a message to each of these agents, and wait for the answers."""
    for agent in agents:
        _, tenant, name, key = agent.split("/")
        event = json.loads(letter(key, text))
        await stack.send(json.dumps({**event, "tenant": tenant, "agent": name}).encode())
    await stack.all_answered()


async def command(stack: Stack, *arguments: str) -> Finished:
    """Run a `perennial` command beside the stack, with its specs: they say who is in which team."""
    variables = {"PERENNIAL_STATE_DIR": str(stack.settings.state_dir), "PERENNIAL_SPECS": str(stack.settings.specs)}
    return await run(str(PERENNIAL), *arguments, cwd=Path.cwd(), variables=variables, seconds=90)


async def last_turn(ledger: Ledger, agent: str) -> list[Entry]:
    (newest,) = await ledger.transcript(agent, limit=1)
    return await ledger.of_turn(agent, newest.turn)


async def reminded(ledger: Ledger, agent: str) -> set[str]:
    """Of which facts an agent was reminded in its last turn; only the first step of a turn brings any."""
    first, *rest = await last_turn(ledger, agent)
    assert not [message for entry in rest for message in entry.messages if isinstance(message, MemoryMessage)]
    return {fact.text for message in first.messages if isinstance(message, MemoryMessage) for fact in message.facts}


async def test_what_is_remembered_is_recalled_by_those_whose_it_is(stack: Stack, tmp_path: Path) -> None:
    """In a later turn: by the same key, another, one of the team, a stranger; each as far as the scope goes."""
    own = "Leave parcels with Okafor."
    shared = "Okafor is a neighbour's name."
    the_teams = "Okafor is away on Mondays."
    everybodys = "Okafor runs the warehouse."
    calls = " ".join(
        f"[[call remember {json.dumps({'text': text, 'scope': scope})}]]"
        for text, scope in [(own, "key"), (shared, "agent"), (the_teams, "team"), (everybodys, "tenant")]
    )
    await tell(stack, calls, KEY)
    await tell(stack, "[[say Fine.]] What has Okafor done?", KEY, SAME_AGENT, TEAM_MATE, OTHER_AGENT, OTHER_TENANT)
    async with stack.ledger() as ledger:
        assert await reminded(ledger, KEY) == {own, shared, the_teams, everybodys}
        assert await reminded(ledger, SAME_AGENT) == {shared, the_teams, everybodys}
        assert await reminded(ledger, TEAM_MATE) == {the_teams, everybodys}
        assert await reminded(ledger, OTHER_AGENT) == {everybodys}
        assert await reminded(ledger, OTHER_TENANT) == set()

        await tell(stack, '[[call recall {"query": "okafor"}]]', SAME_AGENT, TEAM_MATE, OTHER_TENANT)
        for agent, expected in [
            (SAME_AGENT, {shared, the_teams, everybodys}),
            (TEAM_MATE, {the_teams, everybodys}),
            (OTHER_TENANT, set()),
        ]:
            _, answered = await last_turn(ledger, agent)
            (result,) = [message for message in answered.messages if isinstance(message, ToolMessage)]
            found = json.loads(result.content)["facts"]
            assert {fact["text"] for fact in found} == expected
            first_turn = await ledger.of_turn(KEY, 1)
            for fact in found:
                assert (fact["kept_by"], fact["turn"]) == (KEY, 1)
                (step,) = [entry for entry in first_turn if entry.id == fact["entry"]]
                assert step.answer is not None
                assert fact["text"] in step.answer.tool_calls[0].arguments, "the entry in which it was decided"

        # A person looks, and has one forgotten.
        listed = await command(stack, "memory", "store/customer-service/customer-2", "--json")
        facts = {one["fact"]["text"]: one["fact"]["id"] for one in listed.json}
        assert set(facts) == {shared, the_teams, everybodys}
        mates = await command(stack, "memory", "store/chat/anybody", "--scope", "team")
        assert [line.split("  ")[-1].strip() for line in mates.out.splitlines()] == ["FACT", the_teams]
        lone = await command(stack, "memory", "store/desk/customer-1", "--scope", "team")
        assert lone.status == 2
        assert "store/desk/customer-1 is in no team" in lone.err
        gone = await command(
            stack,
            *("memory", "forget", "store/customer-service/customer-2", facts[everybodys], "--why", "he retired"),
        )
        assert (gone.status, gone.out) == (0, f"forgotten: {everybodys}\n")
        await tell(stack, "[[say Fine.]] And Okafor now?", KEY)
        assert await reminded(ledger, KEY) == {own, shared, the_teams}
    shown = await command(stack, "show", "store/customer-service/customer-1")
    assert f"recalls: {own} (key, " in shown.out


async def test_the_command_says_what_it_cannot_do(stack: Stack) -> None:
    """P14: one line, exit status 2, nothing forgotten; without a query the newest, with one the best."""
    agent = "store/customer-service/customer-9"
    await tell(
        stack,
        '[[call remember {"text": "Has a dog.", "scope": "key", "pinned": true}]] '
        '[[call remember {"text": "Likes tents.", "scope": "key"}]]',
        f"agent/{agent}",
    )
    plain = await command(stack, "memory", agent, "--scope", "key")
    assert [line.split("  ")[-1].strip() for line in plain.out.splitlines()] == [
        "FACT",
        "Likes tents.",
        "Has a dog. (pinned)",
    ]
    best = await command(stack, "memory", "list", agent, "--query", 'dogs "*(', "--json")
    (dog,) = [one["fact"] for one in best.json]
    assert dog["text"] == "Has a dog."
    empty = await command(stack, "memory", "store/customer-service/nobody", "--scope", "key")
    assert (empty.status, empty.out) == (0, "")
    for arguments, complaint in [
        (("memory", "forget", agent, "0" * 16, "--why", "x"), "There is no fact '0000000000000000'"),
        (("memory", "forget", "bank/customer-service/customer-9", dog["id"], "--why", "x"), "There is no fact"),
        (("memory", "forget", agent, dog["id"], "--why", " "), "Say why"),
        (("memory", agent, "--scope", "world"), "'world' is not one of"),
        (("memory", agent, "--query", "x", "--forgotten"), "--query"),
        (("memory", "forget", agent, dog["id"]), "--why"),
    ]:
        refused = await command(stack, *arguments)
        assert refused.status == 2, arguments
        assert complaint in refused.err
        assert "Traceback" not in refused.err
    assert (await command(stack, "memory", "forget", agent, dog["id"], "--why", "ran")).status == 0
    told = await command(stack, "memory", agent, "--forgotten", "--json")
    record = next(one["forgotten"] for one in told.json if one["fact"]["id"] == dog["id"])
    assert record["why"] == "ran"
    assert record["by"]
