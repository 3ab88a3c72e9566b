"""Repair: an answer that does not fit is sent back, boundedly; then the turn fails and says why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from fakes import World, answer, event
from hypothesis import given
from hypothesis import strategies as st
from talking import ask, deliver
from temporalio.client import Client

from workflows import names, repair
from workflows.messages import Decision, Intervention, Status, ThinkRequest, ToolCall, ToolResult, TurnOutcome
from workflows.spec import BudgetSpec, ControlSpec, ToolControl
from workflows.state import CurrentTurn

Eventually = Callable[..., Awaitable[object]]
FAULT = "$.verdict: 'maybe' is not one of ['yes', 'no']"

counts = st.integers(0, 12)


def wrong(request: ThinkRequest, *faults: str) -> Decision:
    return answer("maybe", request).model_copy(update={"faults": list(faults or (FAULT,))})


def right(request: ThinkRequest) -> Decision:
    return answer('{"verdict": "yes"}', request).model_copy(update={"data": {"verdict": "yes"}})


def spec(repairs: int = 2, steps: int = 10) -> ControlSpec:
    tools = {"look": ToolControl()}
    return ControlSpec(digest="s", repairs=repairs, budget=BudgetSpec(steps_per_turn=steps), tools=tools)


async def stopped(client: Client, agent_id: str) -> Status:
    handle = client.get_workflow_handle(agent_id)
    by = Intervention(by="tester", reason="a test")
    status: Status = await handle.execute_update(names.STOP, by, result_type=Status)
    await handle.result()
    return status


# What is decided -----------------------------------------------------------------------------------------------------


@given(repairs=counts, steps=st.integers(1, 12), wrongs=counts)
def test_an_answer_is_sent_back_as_often_as_the_spec_and_the_budget_allow(
    repairs: int, steps: int, wrongs: int
) -> None:
    """P10: never a step more than the turn may take, and none after an answer that fits."""
    turn = CurrentTurn(number=1, started=datetime(2026, 11, 27, tzinfo=UTC))
    sent_back = 0
    for _ in range(wrongs):
        turn.step += 1  # as `AgentState.record_step` does
        if not repair.sent_back(spec(repairs, steps), turn, Decision(head="", faults=[FAULT])):
            break
        sent_back += 1
    assert sent_back == min(wrongs, repairs, steps - 1)
    assert turn.repairs == sent_back
    assert not repair.sent_back(spec(repairs, steps), turn, Decision(head="", text="fine"))


def test_the_model_is_told_what_was_wrong() -> None:
    """All faults, and how the message begins never changes: transcripts are read by it."""
    assert repair.message([FAULT, "$: 'reason' is missing"]) == (
        "(Your answer was not sent: it is not what was asked for.)\n"
        f"- {FAULT}\n- $: 'reason' is missing\n"
        "Answer again, with the JSON alone: no words around it."
    )


def test_an_answer_that_stayed_wrong_is_none() -> None:
    """Nobody takes it for one; the error says what did not fit. An answer that fits is left as it is."""
    failed = repair.settled(Decision(head="h", text="maybe", faults=[FAULT, "more"]))
    assert (failed.text, failed.error) == ("", f"the answer does not fit the agent's reply schema: {FAULT}; more")
    fine = Decision(head="h", text="{}", data={})
    assert repair.settled(fine) is fine


@given(steps=st.integers(1, 12), empties=counts)
def test_a_model_that_says_nothing_is_asked_once_more(steps: int, empties: int) -> None:
    """P10: if the turn may take another step; also by an agent whose spec knows no repairs."""
    turn = CurrentTurn(number=1, started=datetime(2026, 11, 27, tzinfo=UTC))
    asked_again = 0
    nothing = Decision(head="h", empty=True)
    for _ in range(empties):
        turn.step += 1
        if not repair.sent_back(spec(0, steps), turn, nothing):
            break
        asked_again += 1
        assert turn.repair == repair.SAY_SOMETHING
        assert turn.repair.startswith(f"{repair.WRONG}\n")
    assert asked_again == min(empties, 1, steps - 1)
    assert repair.settled(nothing).error == "the model has answered with nothing: no text and no tool call"


# The turn ------------------------------------------------------------------------------------------------------------


async def test_a_wrong_answer_is_repaired_in_a_step_of_its_own(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The step's only news is what was wrong; the reply has the answer as data, and counts the step."""
    world = World(think_with=lambda request: right(request) if request.repair else wrong(request), spec=spec())
    async with world.workers(client, queue):
        asked = await ask(client, agent_id, queue, "Is it?", "q-1")
        await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 2)
        status = await stopped(client, agent_id)
    assert (asked.text, asked.data, asked.outcome) == ('{"verdict": "yes"}', {"verdict": "yes"}, TurnOutcome.COMPLETED)
    assert [reply.data for reply in world.replies] == [{"verdict": "yes"}] * 2
    assert [reply.steps for reply in world.replies] == [2, 2]
    first, second, third, _ = world.thoughts
    assert (second.repair, second.events, second.results) == (repair.message([FAULT]), [], [])
    assert (first.repair, third.repair) == ("", ""), "a turn begins anew"
    assert second.head == wrong(first).head, "what was wrong stays in the conversation"
    assert (status.model_calls, status.failed_turns) == (4, 0)


async def test_an_answer_that_stays_wrong_fails_the_turn(client: Client, queue: str, agent_id: str) -> None:
    """Bounded and visible: so many repairs, then the turn's error says what does not fit; the next turn is taken."""
    answers: list[Callable[[ThinkRequest], Decision]] = [wrong, wrong, wrong, right]

    def think(request: ThinkRequest) -> Decision:
        return answers.pop(0)(request)

    world = World(think_with=think, spec=spec(repairs=2))
    async with world.workers(client, queue):
        failed = await ask(client, agent_id, queue, "Is it?", "q-1")
        fine = await ask(client, agent_id, queue, "And now?", "q-2")
        status = await stopped(client, agent_id)
    assert (failed.outcome, failed.text, failed.data, failed.steps) == (TurnOutcome.FAILED, "", None, 3)
    assert failed.error == f"the answer does not fit the agent's reply schema: {FAULT}"
    assert failed.entry == wrong(world.thoughts[2]).head, "the raw text is in the ledger"
    assert fine.data == {"verdict": "yes"}
    assert status.failed_turns == 1
    (told,) = world.lifecycle(names.TURN_FAILED_TYPE)
    assert told.data["error"] == failed.error


async def test_repairs_are_steps_of_the_budget(client: Client, queue: str, agent_id: str) -> None:
    """P10: with two steps a turn there is one repair, whatever the spec would allow; it may not call tools."""
    world = World(think_with=wrong, spec=spec(repairs=5, steps=2))
    async with world.workers(client, queue):
        failed = await ask(client, agent_id, queue, "Is it?", "q-1")
        await stopped(client, agent_id)
    assert (failed.outcome, failed.steps) == (TurnOutcome.FAILED, 2)
    assert [request.tools_allowed for request in world.thoughts] == [True, False]


async def test_a_model_that_answers_with_nothing_is_asked_once_more(client: Client, queue: str, agent_id: str) -> None:
    """It says something then; or it does not, and the turn fails, visibly, and the next one is taken."""
    said = ["", "I was away.", "", "", "Here."]

    def think(request: ThinkRequest) -> Decision:
        text = said.pop(0)
        return answer(text, request).model_copy(update={"empty": not text})

    world = World(think_with=think)
    async with world.workers(client, queue):
        replies = [await ask(client, agent_id, queue, "Is it?", f"q-{n}") for n in range(3)]
        status = await stopped(client, agent_id)
    assert [(reply.text, reply.outcome, reply.steps) for reply in replies] == [
        ("I was away.", TurnOutcome.COMPLETED, 2),
        ("", TurnOutcome.FAILED, 2),
        ("Here.", TurnOutcome.COMPLETED, 1),
    ]
    assert replies[1].error == repair.NOTHING
    assert [request.repair for request in world.thoughts] == ["", repair.SAY_SOMETHING] * 2 + [""]
    (told,) = world.lifecycle(names.TURN_FAILED_TYPE)
    assert told.data["error"] == repair.NOTHING
    assert status.failed_turns == 1


async def test_a_repair_may_look_again(client: Client, queue: str, agent_id: str) -> None:
    """A model that is told what was wrong may call a tool first; that is no further repair."""

    def think(request: ThinkRequest) -> Decision:
        if request.repair:
            return answer("", request, ToolCall(id="c", name="look"))
        return right(request) if request.results else wrong(request)

    world = World(
        think_with=think,
        tool=lambda request: ToolResult(call_id=request.call.id, name="look", content="seen"),
        spec=spec(repairs=1),
    )
    async with world.workers(client, queue):
        reply = await ask(client, agent_id, queue, "Is it?", "q-1")
        await stopped(client, agent_id)
    assert (reply.data, reply.steps, reply.tool_calls) == ({"verdict": "yes"}, 3, 1)
