"""Budgets on the real stack: agents that are over theirs wait, people see it, allow more, and nothing was lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from servers import eventually
from stack import PERENNIAL, Finished, Stack, run
from traffic import letter

_SPEC = """
name: {name}
tenant: store
instructions: You answer customers.
budget:
  limits:
    - {{scope: key, per: day, turns: 100, tokens: 1000000}}
    - {{scope: tenant, per: month, turns: 1}}
"""
ONE, OTHER = "store/customer-service/customer-1", "store/desk/customer-1"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("budget")
    specs = folder / "specs"
    specs.mkdir()
    for name in ("customer-service", "desk"):
        (specs / f"{name}.yaml").write_text(_SPEC.format(name=name))
    async with Stack(folder / "state", specs=specs) as running:
        yield running


async def perennial(stack: Stack, *arguments: str) -> Finished:
    """Run a command that knows of the stack and of its specs."""
    variables = {"PERENNIAL_STATE_DIR": str(stack.settings.state_dir), "PERENNIAL_SPECS": str(stack.specs)}
    return await run(str(PERENNIAL), *arguments, variables=variables)


async def states(stack: Stack) -> dict[str, str]:
    """The state of each agent in a word, as `perennial agents` has it."""
    listed = await perennial(stack, "agents", "--json")
    return {one["agent"]: one["state"] for one in listed.json}


async def test_two_agents_of_a_tenant_share_its_budget_and_a_person_lifts_it(stack: Stack, tmp_path: Path) -> None:
    """One turn a month for both: the second waits with its mail; what one is allowed is for the tenant."""
    await stack.send(letter("customer-1", "[[say One.]] Hello?"))
    await stack.all_answered()
    await stack.send(letter("customer-1", "[[say Two.]] Hello again?"))
    await stack.send(letter("customer-1", "[[say Three.]] Hello?", agent="desk"))

    async def both_wait() -> bool:
        return await states(stack) == {ONE: "over budget", OTHER: "over budget"}

    await eventually(both_wait)
    shown = await perennial(stack, "show", OTHER)
    assert "over budget; turn 1, step 1 waits: the tenant's budget of 1 turn a month: 1 turn spent" in shown.out
    before = await accounts(stack, ONE)
    assert (before["agent/store", "month"]["spent"]["turns"], before["agent/store", "day"]["limit"]) == (1, None)
    assert before["agent/store/customer-service/customer-1", "day"]["limit"]["turns"] == 100

    allowed = await perennial(stack, "budget", "lift", OTHER, "--turns", "2", "--reason", "a sale")
    assert allowed.status == 0, allowed.err
    assert f"{OTHER} may spend 2 turns more for the tenant this month until" in allowed.out
    assert "1 other agent that waited" in allowed.err
    await stack.all_answered()
    after = await accounts(stack, ONE)
    month = after["agent/store", "month"]
    assert (month["spent"]["turns"], month["lifted"]["turns"], month["limit"]["turns"]) == (3, 2, 1)

    async def both_active() -> bool:
        return await states(stack) == {ONE: "active", OTHER: "active"}

    await eventually(both_active)
    told = await perennial(stack, "tail", "--from-beginning", "--agent", "desk", "--count", "4")
    assert "waits: the tenant's budget" in told.out
    assert "2 turns more for the tenant this month" in told.out
    assert (await stack.tally()).kept
    tenant = await perennial(stack, "budget", "show", "--tenant", "store")
    assert [line.split()[0] for line in tenant.out.splitlines()] == [
        "WHO",
        *["store"] * 3,
        "store/customer-service",
        "store/desk",
    ]


async def accounts(stack: Stack, agent: str) -> dict[tuple[str, str], Any]:
    """What `perennial budget show` has, by place and window."""
    shown = await perennial(stack, "budget", "show", agent, "--json")
    return {(one["place"], one["per"]): one for one in shown.json}


async def test_the_command_says_what_it_cannot_do(stack: Stack) -> None:
    """P14: one line, exit status 2 or 1, and nothing is allowed."""
    new = "store/desk/customer-2"
    for status, arguments, complaint in [
        (2, ("show",), "name an agent, or a --tenant"),
        (2, ("show", new, "--tenant", "store"), "name an agent, or a --tenant"),
        (2, ("lift", new), "how much more"),
        (2, ("lift", new, "--usd", "many"), "no amount of US dollars"),
        (2, ("lift", new, "--usd", "0.0000001"), "no amount of US dollars"),
        (2, ("lift", new, "--turns", "1", "--scope", "key"), "--scope and --per"),
        (2, ("lift", new, "--turns", "1", "--scope", "world", "--per", "day"), "'world' is not one of"),
        (1, ("lift", new, "--turns", "1"), "waits for no limit of its budget"),
    ]:
        refused = await perennial(stack, "budget", *arguments)
        assert refused.status == status, (arguments, refused.err)
        assert complaint in refused.err
        assert "Traceback" not in refused.err
    named = await perennial(
        stack, *("budget", "lift", new, "--usd", "0.25", "--scope", "key", "--per", "day", "--json")
    )
    assert named.json["lifted"]["micro_usd"] == 250_000
