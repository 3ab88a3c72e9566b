"""Repeats: the same call with the same result is made three times in a row, and no more; then the model must answer."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fakes import World, answer
from hypothesis import given
from hypothesis import strategies as st
from talking import ask
from temporalio.client import Client

from workflows import names, repeats
from workflows.messages import (
    Decision,
    Intervention,
    Status,
    ThinkRequest,
    ToolCall,
    ToolOutcome,
    ToolRequest,
    ToolResult,
    TurnOutcome,
)
from workflows.repeats import MOST, Repeat
from workflows.spec import BudgetSpec, ControlSpec, ToolControl

LOOK = ToolCall(id="c", name="look", arguments='{"order_id": "order-1", "limit": 2}')
small = st.integers(0, 2)


def came_to(call: ToolCall, content: object, outcome: ToolOutcome = ToolOutcome.OK) -> ToolResult:
    return ToolResult(call_id=call.id, name=call.name, content=str(content), outcome=outcome)


# What is noted -------------------------------------------------------------------------------------------------------


@given(st.lists(small, max_size=12))
def test_only_the_same_result_in_a_row_counts(results: Sequence[int]) -> None:
    """Polling that comes to something else counts anew."""
    before: list[Repeat] = []
    expected = 0
    for number, result in enumerate(results):
        expected = expected + 1 if number and results[number - 1] == result else 1
        before = repeats.noted(before, [LOOK], [came_to(LOOK, result)])
        assert repeats.times(before, LOOK) == expected
        assert not repeats.insists(before)


@given(st.lists(st.lists(st.tuples(small, small), max_size=4), max_size=6))
def test_what_is_kept_is_of_one_step(steps: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Small, however long the turn: a call that a step does not make is forgotten."""
    before: list[Repeat] = []
    for step in steps:
        calls = [ToolCall(id="c", name=f"tool-{name}") for name, _ in step]
        before = repeats.noted(before, calls, [came_to(call, r) for call, (_, r) in zip(calls, step, strict=True)])
        assert len(before) == len({name for name, _ in step})


def test_the_same_call_is_known_however_it_is_written() -> None:
    """Another order of arguments is the same; other values or another tool are not, and nor is what is no JSON."""
    before = repeats.noted([], [LOOK], [came_to(LOOK, 1)])
    turned = json.dumps(dict(reversed(json.loads(LOOK.arguments).items())))
    assert repeats.times(before, LOOK.model_copy(update={"arguments": turned, "id": "other"})) == 1
    for other in ('{"order_id": "order-2", "limit": 2}', "{", "[" * 100_000, ""):
        assert repeats.times(before, LOOK.model_copy(update={"arguments": other})) == 0
    assert repeats.times(before, LOOK.model_copy(update={"name": "act"})) == 0
    assert repeats.times(repeats.noted([], [LOOK], [came_to(LOOK, 1, ToolOutcome.ERROR)]), LOOK) == 1


def test_a_model_that_does_not_listen_insists() -> None:
    """So often as it was let call, so often it is told; then it gets no tools."""
    before = repeats.noted([], [LOOK], [came_to(LOOK, 1)])
    for told in range(1, MOST + 1):
        before = repeats.noted(before, [LOOK], [came_to(LOOK, repeats.refusal(LOOK), ToolOutcome.ERROR)])
        assert repeats.insists(before) == (told == MOST)
        assert repeats.times(before, LOOK) == 1, "what it came to stands"


# The turn ------------------------------------------------------------------------------------------------------------


def looping(request: ThinkRequest) -> Decision:
    """A model that looks as long as it may."""
    if request.tools_allowed:
        return answer("", request, LOOK)
    return answer("I do not know.", request)


def seen(request: ToolRequest) -> ToolResult:
    return came_to(request.call, "seen")


def spec(steps: int = 100, **look: object) -> ControlSpec:
    tools = {"look": ToolControl.model_validate(look)}
    return ControlSpec(digest="s", budget=BudgetSpec(steps_per_turn=steps), tools=tools)


async def stopped(client: Client, agent_id: str) -> Status:
    handle = client.get_workflow_handle(agent_id)
    status: Status = await handle.execute_update(
        names.STOP, Intervention(by="tester", reason="a test"), result_type=Status
    )
    await handle.result()
    return status


async def test_a_model_that_loops_is_told_and_then_has_to_answer(client: Client, queue: str, agent_id: str) -> None:
    """Three calls are made, three are not; then no tools are offered. All of it is told; the next turn begins anew."""
    world = World(think_with=looping, tool=seen, spec=spec())
    async with world.workers(client, queue):
        first = await ask(client, agent_id, queue, "Is it?", "q-1")
        again = await ask(client, agent_id, queue, "Is it?", "q-2")
        status = await stopped(client, agent_id)
    assert (first.text, first.outcome, first.steps) == ("I do not know.", TurnOutcome.COMPLETED, 2 * MOST + 1)
    assert (again.steps, again.tool_calls) == (first.steps, 2 * MOST)
    assert len(world.tool_requests) == 2 * MOST
    told = [result.content for request in world.thoughts for result in request.results if request.turn == 1]
    assert told == ["seen"] * MOST + [repeats.refusal(LOOK)] * MOST
    assert [request.tools_allowed for request in world.thoughts if request.turn == 1] == [True] * 2 * MOST + [False]
    summary = world.lifecycle(names.TURN_COMPLETED_TYPE)[0]
    assert summary.data["not_repeated"] == MOST
    assert any(line.text.startswith("look not made again") for line in status.recent)


async def test_what_comes_to_something_else_is_not_stopped(client: Client, queue: str, agent_id: str) -> None:
    """Nor is a tool whose spec says that it is there to be asked again and again."""
    changing = World(
        think_with=looping,
        tool=lambda request: came_to(request.call, request.idempotency_key),
        spec=spec(steps=8),
    )
    async with changing.workers(client, queue):
        await ask(client, agent_id, queue, "Is it?", "q-1")
        await stopped(client, agent_id)
    assert len(changing.tool_requests) == 7
    polled = World(think_with=looping, tool=seen, spec=spec(steps=8, polls=True))
    async with polled.workers(client, queue):
        await ask(client, f"{agent_id}-2", queue, "Is it?", "q-1")
        await stopped(client, f"{agent_id}-2")
    assert len(polled.tool_requests) == 7


async def test_beside_a_call_that_is_not_repeated_others_are_made(client: Client, queue: str, agent_id: str) -> None:
    """Results stand in the order of the calls, also where a call waits for approval or its answer."""

    def think(request: ThinkRequest) -> Decision:
        if request.step > MOST + 1:
            return answer("done", request)
        act = ToolCall(id="a", name="act", arguments=json.dumps({"n": request.step}))
        return answer("", request, LOOK, act, ToolCall(id="f", name="fly"))

    world = World(think_with=think, tool=seen, spec=spec())
    world.spec.tools["act"] = ToolControl()
    async with world.workers(client, queue):
        await ask(client, agent_id, queue, "Is it?", "q-1")
        await stopped(client, agent_id)
    last = [(result.name, result.content) for result in world.thoughts[-1].results]
    fly = ToolCall(id="f", name="fly")
    assert last == [("look", repeats.refusal(LOOK)), ("act", "seen"), ("fly", repeats.refusal(fly))]
    assert [request.call.name for request in world.tool_requests].count("act") == MOST + 1
