"""A turn whose conversation has to be summed up first, on a Temporal server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from fakes import World, answer, sum_up
from fakes import event as mail
from talking import deliver
from temporalio.client import Client

from workflows import names
from workflows.messages import CompactRequest, Decision, Status, ThinkRequest
from workflows.spec import BudgetSpec, ControlSpec

Eventually = Callable[..., Awaitable[object]]


def crowded_once(request: ThinkRequest) -> Decision:
    """Has the conversation summed up whenever it may."""
    if request.may_compact:
        return Decision(head=request.head or "", compact=True)
    return answer("heard " + " ".join(event.id for event in request.events), request)


@pytest.mark.parametrize("error", [None, "the model wrote nothing"])
async def test_the_step_after_the_summary_is_told_what_is_new(
    client: Client, queue: str, agent_id: str, eventually: Eventually, error: str | None
) -> None:
    """The summary is a step of its own, with its head and its usage; nothing of the turn is lost or told twice."""

    def compact(request: CompactRequest) -> Decision:
        return sum_up(request).model_copy(update={"error": error})

    world = World(
        think_with=lambda request: crowded_once(request) if request.turn > 1 else answer("first", request),
        compact_with=compact,
        spec=ControlSpec(digest="s", compact=True),
    )
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, mail(1))
        await eventually(lambda: len(world.replies) == 1)
        await deliver(client, agent_id, queue, mail(2))
        await eventually(lambda: len(world.replies) == 2)
        status: Status = await handle.query(names.STATUS, result_type=Status)
    first, asked, after = world.thoughts
    (compaction,) = world.compactions
    assert (first.turn, compaction.turn, compaction.step, compaction.head) == (1, 2, 1, asked.head)
    assert (asked.step, asked.may_compact) == (1, True)
    assert (after.step, after.may_compact, after.head) == (2, False, sum_up(compaction).head)
    assert [event.id for event in after.events] == ["event-2"]
    reply = world.replies[1]
    assert (reply.text, reply.steps, reply.usage.input_tokens) == ("heard event-2", 2, 110)
    assert status.model_calls == 3
    assert any("summed up" in item.text for item in status.recent)


async def test_an_agent_whose_spec_does_not_say_so_is_never_summed_up(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Nor is it in the last step that a turn may take, which has to answer."""
    for spec in (
        ControlSpec(digest="s"),
        ControlSpec(digest="t", compact=True, budget=BudgetSpec(steps_per_turn=1)),
    ):
        world = World(think_with=crowded_once, spec=spec)
        async with world.workers(client, queue):
            await deliver(client, f"{agent_id}-{spec.digest}", queue, mail(1))
            await eventually(lambda world=world: len(world.replies) == 1)
        assert not world.compactions
