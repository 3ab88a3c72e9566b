"""P8: what an agent does when it is rewound or begins as a fork; on a Temporal server, with the world faked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fakes import World, answer, event
from talking import deliver
from temporalio import activity
from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowUpdateFailedError,
    WorkflowUpdateStage,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError
from typing_extensions import override

from workflows import names
from workflows.messages import (
    Decision,
    Intervention,
    RewindRecord,
    RewindRequest,
    Rewound,
    SpecRequest,
    Status,
    ThinkRequest,
)
from workflows.spec import ControlSpec
from workflows.state import AgentInput

Eventually = Callable[..., Awaitable[object]]
ME = Intervention(by="tester", reason="a test")


async def move(
    client: Client, agent_id: str, queue: str, entry: str, *, to: str = names.REWIND, **more: str
) -> Rewound:
    """Rewind or fork an agent as the command does: update-with-start."""
    start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
        names.WORKFLOW_TYPE,
        AgentInput(),
        id=agent_id,
        task_queue=queue,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
    )
    request = RewindRequest(entry=entry, by="ada", reason="wrong turning", **more)
    made: Rewound = await client.execute_update_with_start_workflow(
        to, request, start_workflow_operation=start, result_type=Rewound
    )
    return made


async def status(handle: WorkflowHandle[Any, Any]) -> Status:
    now: Status = await handle.query(names.STATUS, result_type=Status)
    return now


async def stop(handle: WorkflowHandle[Any, Any]) -> None:
    await handle.execute_update(names.STOP, ME, result_type=Status)
    await handle.result()


def entry_of(world: World, turn: int) -> str:
    """The entry that a turn of one step has made."""
    (thought,) = [request for request in world.thoughts if request.turn == turn]
    return answer("", thought).head


async def test_the_next_turn_goes_on_behind_the_entry(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Turns are numbered on; the branch that is left is not what the model is shown."""
    world = World()
    async with world.workers(client, queue):
        for number in range(1, 4):
            await deliver(client, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.replies) == number)
        made = await move(client, agent_id, queue, entry_of(world, 1))
        handle = await deliver(client, agent_id, queue, event(4))
        await eventually(lambda: len(world.replies) == 4)
        now = await status(handle)
        await stop(handle)
    assert (made.old_head, made.turn) == (entry_of(world, 3), 3)
    assert [request.head for request in world.thoughts] == [
        None,
        entry_of(world, 1),
        entry_of(world, 2),
        entry_of(world, 1),
    ]
    assert [request.turn for request in world.thoughts] == [1, 2, 3, 4]
    assert now.head == entry_of(world, 4)


async def test_who_rewound_and_why_is_told(client: Client, queue: str, agent_id: str, eventually: Eventually) -> None:
    """A lifecycle event under an id of its own, and a line in the Web UI."""
    world = World()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1), event(2))
        await eventually(lambda: len(world.replies) == 1)
        for _ in range(2):
            await move(client, agent_id, queue, entry_of(world, 1))
        await eventually(lambda: len(world.lifecycle(names.AGENT_REWOUND_TYPE)) == 2)
        now = await status(handle)
        await stop(handle)
    told = world.lifecycle(names.AGENT_REWOUND_TYPE)
    assert [message.id for message in told] == [f"{agent_id}/1/rewound-1", f"{agent_id}/1/rewound-2"]
    made = Rewound.model_validate(told[0].data)
    assert (made.by, made.reason, made.head) == ("ada", "wrong turning", entry_of(world, 1))
    assert "rewound by ada to entry" in now.recent[-1].text
    assert now.recent[-1].text.endswith("wrong turning")


async def test_what_was_answered_on_the_branch_that_is_left_stays_answered(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P1: an event is not answered twice because somebody rewound the agent."""
    world = World()
    async with world.workers(client, queue):
        for number in (1, 2):
            await deliver(client, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.replies) == number)
        await move(client, agent_id, queue, entry_of(world, 1))
        handle = await deliver(client, agent_id, queue, event(2), event(3))
        await eventually(lambda: len(world.replies) == 3)
        await stop(handle)
    assert [e.id for e in world.thoughts[-1].events] == ["event-3"]
    assert [message.data["id"] for message in world.lifecycle(names.DUPLICATE_TYPE)] == ["event-2"]


async def test_the_turn_in_progress_is_finished_first_and_mail_waits(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Its answer is published, its entry is what is left, and what waits is taken behind the entry rewound to."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def think(request: ThinkRequest) -> Decision:
        if request.turn == 2:
            begun.set()
            await go_on.wait()
        return answer(f"turn {request.turn}", request)

    world = World(think_with=think)
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        handle = await deliver(client, agent_id, queue, event(2))
        await begun.wait()
        rewinding = await handle.start_update(
            names.REWIND,
            RewindRequest(entry=entry_of(world, 1)),
            wait_for_stage=WorkflowUpdateStage.ACCEPTED,
            result_type=Rewound,
        )
        await deliver(client, agent_id, queue, event(3))
        assert not world.rewinds
        go_on.set()
        made = await rewinding.result()
        await eventually(lambda: len(world.replies) == 3)
        await stop(handle)
    assert [reply.text for reply in world.replies] == ["turn 1", "turn 2", "turn 3"]
    assert (made.old_head, made.turn) == (entry_of(world, 2), 2)
    assert world.thoughts[-1].head == entry_of(world, 1)
    assert [e.id for e in world.thoughts[-1].events] == ["event-3"]


@dataclass
class Counting(World):
    """Counts how often an agent looks for its spec, which it does before each turn."""

    looked: int = 0

    @override
    @activity.defn(name="load_spec")
    async def load_spec(self, request: SpecRequest) -> ControlSpec | None:
        self.looked += 1
        return await super().load_spec(request)


async def test_no_turn_begins_while_a_rewind_is_being_recorded(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """It would build on the entry that is left."""
    recording, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_: RewindRecord) -> None:
        recording.set()
        await go_on.wait()

    world = Counting(rewind_with=slowly)
    async with world.workers(client, queue):
        for number in (1, 2):
            handle = await deliver(client, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.replies) == number)
        rewinding = asyncio.create_task(move(client, agent_id, queue, entry_of(world, 1)))
        await recording.wait()
        await deliver(client, agent_id, queue, event(3))
        await eventually(lambda: world.looked == 3)
        go_on.set()
        await rewinding
        await eventually(lambda: len(world.replies) == 3)
        await stop(handle)
    assert world.thoughts[-1].head == entry_of(world, 1)


async def test_an_agent_that_sleeps_is_woken_and_rewound_and_keeps_it(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Stopped or hibernated: the rewind is in its snapshot when it sleeps again."""
    world = World()
    async with world.workers(client, queue):
        for number in (1, 2):
            handle = await deliver(client, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.replies) == number)
        await stop(handle)
        await move(client, agent_id, queue, entry_of(world, 1))
        await stop(client.get_workflow_handle(agent_id))
        assert world.snapshots[agent_id].head == entry_of(world, 1)
        assert world.snapshots[agent_id].rewound == 1
        handle = await deliver(client, agent_id, queue, event(3))
        await eventually(lambda: len(world.replies) == 3)
        await stop(handle)
    assert world.thoughts[-1].head == entry_of(world, 1)


async def test_a_rewind_in_the_moment_of_closing_is_kept_and_told(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The snapshot that was being written did not know of it: another is written."""
    writing, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        writing.set()
        await go_on.wait()

    world = World()
    async with world.workers(client, queue):
        for number in (1, 2):
            handle = await deliver(client, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.replies) == number)
        world.before_snapshot = slowly
        await handle.execute_update(names.STOP, ME, result_type=Status)
        await writing.wait()
        await move(client, agent_id, queue, entry_of(world, 1))
        go_on.set()
        await handle.result()
    assert world.snapshots[agent_id].head == entry_of(world, 1)
    assert len(world.lifecycle(names.AGENT_REWOUND_TYPE)) == 1


async def test_a_request_made_again_has_no_further_effect(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Whoever lost the answer asks again, also when the agent has taken turns since: it is not thrown back again."""
    world = World()
    async with world.workers(client, queue):
        for number in (1, 2):
            await deliver(client, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.replies) == number)
        first = await move(client, agent_id, queue, entry_of(world, 1), id="r-1")
        handle = await deliver(client, agent_id, queue, event(3))
        await eventually(lambda: len(world.replies) == 3)
        again = await move(client, agent_id, queue, entry_of(world, 1), id="r-1")
        now = await status(handle)
        await stop(handle)
    assert again.number == first.number == 1
    assert now.head == entry_of(world, 3)
    assert len(world.lifecycle(names.AGENT_REWOUND_TYPE)) == 1


async def test_a_refused_rewind_says_why_and_changes_nothing(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P14: the ledger's reason reaches whoever asked, and the agent lives on."""

    async def refuse(_: RewindRecord) -> None:
        raise ApplicationError("There is no entry x in the ledger.", type=names.REFUSED, non_retryable=True)

    world = World(rewind_with=refuse)
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await move(client, agent_id, queue, "x")
        handle = await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 2)
        await stop(handle)
    assert isinstance(refused.value.cause, ApplicationError)
    assert (refused.value.cause.message, refused.value.cause.type) == (
        "There is no entry x in the ledger.",
        names.REFUSED,
    )
    assert world.thoughts[-1].head == entry_of(world, 1)
    assert not world.lifecycle(names.AGENT_REWOUND_TYPE)


async def test_a_paused_agent_can_be_rewound_and_stays_paused(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """How one rewinds an agent that is never idle: pause, rewind, resume."""
    world = World()
    async with world.workers(client, queue):
        for number in (1, 2):
            handle = await deliver(client, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.replies) == number)
        await handle.execute_update(names.PAUSE, ME, result_type=Status)
        await deliver(client, agent_id, queue, event(3))
        await move(client, agent_id, queue, entry_of(world, 1))
        assert (await status(handle)).state == "paused"
        await handle.execute_update(names.RESUME, ME, result_type=Status)
        await eventually(lambda: len(world.replies) == 3)
        await stop(handle)
    assert world.thoughts[-1].head == entry_of(world, 1)


# Forks ---------------------------------------------------------------------------------------------------------------


async def test_a_fork_begins_behind_the_entry_with_nothing_spent(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Its first turn is number 1, on the other's conversation; mail that comes meanwhile waits for that."""
    recording, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_: RewindRecord) -> None:
        recording.set()
        await go_on.wait()

    world = World(rewind_with=slowly)
    async with world.workers(client, queue):
        forking = asyncio.create_task(move(client, agent_id, queue, "of another", to=names.FORK))
        await recording.wait()
        handle = await deliver(client, agent_id, queue, event(1))
        go_on.set()
        made = await forking
        await eventually(lambda: len(world.replies) == 1)
        now = await status(handle)
        await stop(handle)
    assert made.old_head is None
    assert [(request.turn, request.head) for request in world.thoughts] == [(1, "of another")]
    assert (now.turn, now.model_calls, now.usage.input_tokens) == (1, 1, 10)
    (told,) = world.lifecycle(names.AGENT_FORKED_TYPE)
    assert told.data["head"] == "of another"


async def test_an_agent_that_has_lived_is_no_fork(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """A key that is in use keeps its conversation; a fork that is asked for again with its id is what it was."""
    world = World()
    async with world.workers(client, queue):
        first = await move(client, agent_id, queue, "of another", to=names.FORK, id="f-1")
        again = await move(client, agent_id, queue, "of another", to=names.FORK, id="f-1")
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await move(client, agent_id, queue, "of a third", to=names.FORK, id="f-2")
        handle = client.get_workflow_handle(agent_id)
        now = await status(handle)
        await stop(handle)
        other = f"{agent_id}-other"
        handle = await deliver(client, other, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        with pytest.raises(WorkflowUpdateFailedError):
            await move(client, other, queue, "of another", to=names.FORK)
        await stop(handle)
    assert again.number == first.number
    assert isinstance(refused.value.cause, ApplicationError)
    assert refused.value.cause.type == names.REFUSED
    assert now.head == "of another"
    described = await client.get_workflow_handle(agent_id).describe()
    assert described.status is WorkflowExecutionStatus.COMPLETED
