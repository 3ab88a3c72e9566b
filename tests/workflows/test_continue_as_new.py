"""P1, P7: continue-as-new is invisible. On a dev server that suggests it every few turns, with the world faked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import temporalio.client
import temporalio.worker
from fakes import World, answer, event
from servers import TemporalServer, eventually
from talking import ask, deliver
from temporalio import activity, workflow
from temporalio.client import Client, WorkflowUpdateFailedError
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import (
    ContinueAsNewInput,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
    WorkflowOutboundInterceptor,
)
from typing_extensions import override

from workflows import names, repair
from workflows.budget import Lifted, LiftRequest, LimitScope, Measure, Per, Refusal
from workflows.messages import (
    Decision,
    Intervention,
    Reply,
    RewindRequest,
    Rewound,
    Status,
    ThinkRequest,
    ToolCall,
    ToolResult,
)
from workflows.spec import BudgetSpec, ControlSpec, MailboxSpec, ToolControl

SUGGEST_AFTER = 40
"""History events after which this server suggests to continue as new; a turn makes some fifteen."""
ME = Intervention(by="tester", reason="a test")

AtContinue = Callable[[], None]


class Meddler(temporalio.client.Interceptor, temporalio.worker.Interceptor):
    """Does something at the very moment when a run has decided to continue as new: its workflow task is still open."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        """Runs that have continued as new, or tried to."""
        self.act: AtContinue = lambda: None

    @override
    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> type[WorkflowInboundInterceptor]:
        meddler = self

        class Outbound(WorkflowOutboundInterceptor):
            @override
            def continue_as_new(self, input: ContinueAsNewInput) -> None:  # type: ignore[override]  # never returns
                run = workflow.info().run_id
                if run not in meddler.runs:
                    meddler.runs.append(run)
                    meddler.act()
                super().continue_as_new(input)

        class Inbound(WorkflowInboundInterceptor):
            @override
            def init(self, outbound: WorkflowOutboundInterceptor) -> None:
                super().init(Outbound(outbound))

        return Inbound


@pytest.fixture(scope="module")
def brief_server() -> Iterator[TemporalServer]:
    """A server that suggests continue-as-new early."""
    suggest = f"limit.historyCount.suggestContinueAsNew={SUGGEST_AFTER}"
    with TemporalServer(arguments=["--dynamic-config-value", suggest]) as server:
        yield server


@pytest.fixture
def meddler() -> Meddler:
    """What happens at continue-as-new; nothing, until a test sets `act`."""
    return Meddler()


@pytest.fixture
async def brief(brief_server: TemporalServer, meddler: Meddler) -> Client:
    """A client of that server."""
    return await Client.connect(brief_server.address, data_converter=pydantic_data_converter, interceptors=[meddler])


async def stop(client: Client, agent_id: str) -> Status:
    """Stop the agent, and say what it has come to."""
    handle = client.get_workflow_handle(agent_id)
    status = await handle.execute_update(names.STOP, ME, result_type=Status)
    await handle.result()
    return status


def answered(world: World) -> list[str]:
    return [reference.id for reply in world.replies for reference in reply.answers]


def one_by_one() -> ControlSpec:
    return ControlSpec(digest="s", mailbox=MailboxSpec(events_per_turn=1))


def many_steps(steps: int) -> tuple[Callable[[ThinkRequest], Decision], ControlSpec]:
    """A model that calls a tool in every step of a turn until this many, and the spec that lets it."""

    def think(request: ThinkRequest) -> Decision:
        if request.step < steps:
            return answer("", request, ToolCall(id=f"call-{request.step}", name="look"))
        return answer(f"after {request.step} steps", request)

    return think, ControlSpec(digest="s", tools={"look": ToolControl()}, budget=BudgetSpec(steps_per_turn=steps + 1))


def look(name: str, call_id: str) -> ToolResult:
    return ToolResult(call_id=call_id, name=name, content=f"seen {call_id}")


async def test_an_agent_goes_on_through_many_runs_as_if_they_were_one(brief: Client, queue: str, agent_id: str) -> None:
    """P1, P7: turns, heads and counts go on; what was seen in an early run is a duplicate in a late one."""
    runs: list[str] = []

    def think(request: ThinkRequest) -> Decision:
        runs.append(activity.info().workflow_run_id)
        return answer("ok", request)

    world = World(think_with=think, spec=one_by_one())
    numbers = range(1, 13)
    async with world.workers(brief, queue):
        for number in numbers:
            await deliver(brief, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.replies) == number)
        await deliver(brief, agent_id, queue, *map(event, numbers))
        await eventually(lambda: len(world.lifecycle(names.DUPLICATE_TYPE)) == len(numbers))
        status = await stop(brief, agent_id)
    assert len(set(runs)) >= 3
    assert answered(world) == [f"event-{number}" for number in numbers]
    assert [request.turn for request in world.thoughts] == list(numbers)
    assert [request.head for request in world.thoughts[1:]] == [answer("", r).head for r in world.thoughts[:-1]]
    assert (status.accepted, status.duplicates, status.replies) == (len(numbers), len(numbers), len(numbers))


async def test_mail_that_arrives_in_the_moment_of_continue_as_new_is_not_lost(
    brief: Client, queue: str, agent_id: str, meddler: Meddler
) -> None:
    """P1: a signal that comes while the last workflow task of a run is open is taken, once."""
    loop = asyncio.get_running_loop()
    late: list[str] = []

    def act() -> None:
        mail = event(f"late-{len(meddler.runs)}")
        late.append(mail.id)
        asyncio.run_coroutine_threadsafe(deliver(brief, agent_id, queue, mail, event(1)), loop).result(1.5)

    meddler.act = act
    world = World(spec=one_by_one())
    numbers = range(1, 10)
    async with world.workers(brief, queue):
        for number in numbers:
            await deliver(brief, agent_id, queue, event(number))
            await eventually(lambda number=number: f"event-{number}" in answered(world))
        await eventually(lambda: set(late) <= set(answered(world)))
        status = await stop(brief, agent_id)
    assert len(meddler.runs) >= 2
    assert len(late) == len(meddler.runs)
    assert sorted(answered(world)) == sorted([*late, *(f"event-{number}" for number in numbers)])
    assert status.duplicates == len(late)


async def test_a_flood_of_mail_through_many_runs_is_answered_once_and_in_order(
    brief: Client, queue: str, agent_id: str, meddler: Meddler
) -> None:
    """P1, P2: several senders at once, every event sent twice, while the agent continues as new again and again."""
    world = World(spec=one_by_one())
    senders, each = 3, 8

    async def send(source: str) -> None:
        for number in range(each):
            mail = event(f"{source}-{number}", source=source)
            await deliver(brief, agent_id, queue, mail)
            await deliver(brief, agent_id, queue, mail)

    async with world.workers(brief, queue):
        await asyncio.gather(*(send(f"s{n}") for n in range(senders)))
        await eventually(lambda: len(world.replies) >= senders * each, seconds=60)
        await eventually(lambda: len(world.lifecycle(names.DUPLICATE_TYPE)) >= senders * each)
        status = await stop(brief, agent_id)
    assert len(meddler.runs) >= 4
    for source in (f"s{n}" for n in range(senders)):
        of_source = [one for one in answered(world) if one.startswith(f"event-{source}-")]
        assert of_source == [f"event-{source}-{number}" for number in range(each)]
    assert (status.accepted, status.duplicates) == (senders * each, senders * each)


async def test_a_turn_with_tools_goes_on_in_the_next_run(
    brief: Client, queue: str, agent_id: str, meddler: Meddler
) -> None:
    """P6, P9: no step and no tool call is made again or left out, and mail that came meanwhile has the next turn."""
    think, spec = many_steps(12)
    world = World(think_with=think, tool=lambda request: look(request.call.name, request.call.id), spec=spec)
    loop = asyncio.get_running_loop()

    def act() -> None:  # the event in hand, again, and another; twice within the first turn
        if (count := len(meddler.runs)) <= 2:
            mail = deliver(brief, agent_id, queue, event(1), event(f"late-{count}"))
            asyncio.run_coroutine_threadsafe(mail, loop).result(1.5)

    meddler.act = act
    async with world.workers(brief, queue):
        await deliver(brief, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 2)
        status = await stop(brief, agent_id)
    assert len(meddler.runs) >= 3
    assert answered(world) == ["event-1", "event-late-1", "event-late-2"]
    assert (status.accepted, status.duplicates) == (3, 2)
    assert [(r.turn, r.step) for r in world.thoughts] == [(turn, step) for turn in (1, 2) for step in range(1, 13)]
    keys = [request.idempotency_key for request in world.tool_requests]
    assert keys == [f"{agent_id}/{turn}/{step}/0" for turn in (1, 2) for step in range(1, 12)]
    assert [[r.content for r in request.results] for request in world.thoughts[1:12]] == [
        [f"seen call-{step}"] for step in range(1, 12)
    ]
    assert [reply.steps for reply in world.replies] == [12, 12]
    assert [[e.id for e in request.events] for request in world.thoughts if request.step == 1] == [
        ["event-1"],
        ["event-late-1", "event-late-2"],
    ]


async def test_a_question_that_takes_many_steps_is_answered_and_then_the_run_ends(
    brief: Client, queue: str, agent_id: str, meddler: Meddler
) -> None:
    """`ask` holds its run open until it is answered; asked again in a later run, the reply of then comes back."""
    think, spec = many_steps(8)
    world = World(think_with=think, tool=lambda request: look(request.call.name, request.call.id), spec=spec)
    async with world.workers(brief, queue):
        first = await ask(brief, agent_id, queue, "well?", "q-1")
        await eventually(lambda: len(meddler.runs) == 1)
        again = await ask(brief, agent_id, queue, "well?", "q-1")
        other = await ask(brief, agent_id, queue, "well?", "q-2")
        await stop(brief, agent_id)
    assert (first.text, first.turn) == ("after 8 steps", 1)
    assert again == first
    assert (other.text, other.turn) == ("after 8 steps", 2)
    assert answered(world) == ["q-1", "q-2"]
    assert [request.turn for request in world.recalled] == [1]


async def test_a_question_asked_in_the_moment_of_continue_as_new_is_answered(
    brief: Client, queue: str, agent_id: str, meddler: Meddler
) -> None:
    """The person does not notice that the agent has just gone on to its next run."""
    loop = asyncio.get_running_loop()
    asked: list[asyncio.Future[Reply]] = []

    def begin() -> None:
        asked.append(asyncio.ensure_future(ask(brief, agent_id, queue, "well?", f"q-{len(meddler.runs)}"), loop=loop))

    def act() -> None:
        if len(meddler.runs) > 2:
            return  # a question asked while the test ends would be answered, or not, with nobody to wait for it
        loop.call_soon_threadsafe(begin)
        # Open long enough for the question to reach the server, or else it would come after this moment.
        asyncio.run_coroutine_threadsafe(brief.get_workflow_handle(agent_id).describe(), loop).result(1.5)

    meddler.act = act
    world = World(spec=one_by_one())
    async with world.workers(brief, queue):
        number = 0
        while len(asked) < 2 and number < 50:
            number += 1
            await deliver(brief, agent_id, queue, event(number))
            await eventually(lambda number=number: f"event-{number}" in answered(world))
        replies = await asyncio.gather(*asked)
        await stop(brief, agent_id)
    assert [reply.answers[0].id for reply in replies] == ["q-1", "q-2"]
    assert len(answered(world)) == len(set(answered(world))) == number + 2


async def test_a_pause_goes_along_into_the_next_run(brief: Client, queue: str, agent_id: str, meddler: Meddler) -> None:
    """Paused is paused: a run that ends on mail alone changes nothing."""
    world = World()
    async with world.workers(brief, queue):
        handle = await deliver(brief, agent_id, queue, event(0))
        await eventually(lambda: len(world.replies) == 1)
        await handle.execute_update(names.PAUSE, ME, result_type=Status)
        sent = 0

        async def one_more() -> bool:
            nonlocal sent
            sent += 1
            await deliver(brief, agent_id, queue, event(sent))
            return len(meddler.runs) >= 1

        await eventually(one_more)
        paused: Status = await handle.query(names.STATUS, result_type=Status)
        assert len(world.replies) == 1
        await handle.execute_update(names.RESUME, ME, result_type=Status)
        await eventually(lambda: len(answered(world)) == sent + 1)
        await stop(brief, agent_id)
    assert (paused.state, paused.doing) == ("paused", f"paused by tester: a test; {sent} events wait")


async def test_a_stop_in_the_middle_of_a_turn_is_kept_through_continue_as_new(
    brief: Client, queue: str, agent_id: str, meddler: Meddler
) -> None:
    """Stopped is stopped: the turn in progress is finished, in whatever run, and then the agent closes."""
    think, spec = many_steps(12)
    world = World(tool=lambda request: look(request.call.name, request.call.id), spec=spec)
    at_step = asyncio.Event()
    stopped = asyncio.Event()

    async def patient(request: ThinkRequest) -> Decision:
        if request.step == 2:
            at_step.set()
            await stopped.wait()
        return think(request)

    world.think_with = patient
    async with world.workers(brief, queue):
        handle = await deliver(brief, agent_id, queue, event(1))
        await at_step.wait()
        await handle.execute_update(names.STOP, ME, result_type=Status)
        stopped.set()
        await eventually(lambda: len(world.replies) == 1)
        assert len(meddler.runs) >= 1
        try:
            async with asyncio.timeout(5):
                await handle.result()
        finally:
            if agent_id not in world.snapshots:
                await stop(brief, agent_id)


async def test_a_rewind_that_waits_for_a_long_turn_does_not_hold_its_run_open(
    brief: Client, queue: str, agent_id: str, meddler: Meddler
) -> None:
    """P7, P8: the turn goes on in the next run, whoever asked asks again there, and is served when the turn is over."""
    think, spec = many_steps(12)
    at_step = asyncio.Event()
    asked = asyncio.Event()

    async def patient(request: ThinkRequest) -> Decision:
        if (request.turn, request.step) == (2, 2):
            at_step.set()
            await asked.wait()
        return think(request) if request.turn == 2 else answer("ok", request)

    world = World(think_with=patient, tool=lambda request: look(request.call.name, request.call.id), spec=spec)
    refused: list[str] = []

    async def rewind(entry: str) -> Rewound:
        while True:
            handle = brief.get_workflow_handle(agent_id)
            try:
                made: Rewound = await handle.execute_update(
                    names.REWIND, RewindRequest(entry=entry, id="r-1"), result_type=Rewound
                )
            except WorkflowUpdateFailedError as error:
                refused.append(getattr(error.cause, "type", str(error.cause)))
            else:
                return made

    async with world.workers(brief, queue):
        await deliver(brief, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        first = world.thoughts[0]
        await deliver(brief, agent_id, queue, event(2))
        await at_step.wait()
        rewinding = asyncio.create_task(rewind(answer("", first).head))
        asked.set()
        made = await rewinding
        await eventually(lambda: len(world.replies) == 2)
        assert len(meddler.runs) >= 1
        await deliver(brief, agent_id, queue, event(3))
        await eventually(lambda: len(world.replies) == 3)
        await stop(brief, agent_id)
    assert set(refused) == {names.MOVING}
    assert made.turn == 2
    assert world.thoughts[-1].head == answer("", first).head
    assert [r.turn for r in world.thoughts if r.step == 1] == [1, 2, 3]


async def test_a_repair_goes_on_in_the_next_run(brief: Client, queue: str, agent_id: str, meddler: Meddler) -> None:
    """P6: what is wrong with an answer goes along, and how often it was sent back is not forgotten."""
    think, spec = many_steps(12)

    def thinking(request: ThinkRequest) -> Decision:
        decided = think(request)
        return decided if decided.tool_calls else decided.model_copy(update={"faults": ["no"]})

    world = World(think_with=thinking, tool=lambda request: look(request.call.name, request.call.id))
    world.spec = spec.model_copy(update={"repairs": 9, "budget": BudgetSpec(steps_per_turn=30)})
    async with world.workers(brief, queue):
        await deliver(brief, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await stop(brief, agent_id)
    assert len(meddler.runs) >= 3
    (reply,) = world.replies
    assert (reply.steps, reply.error) == (21, repair.failure(["no"]))
    assert [bool(request.repair) for request in world.thoughts] == [False] * 12 + [True] * 9


async def test_a_turn_waits_for_its_budget_through_many_runs(
    brief: Client, queue: str, agent_id: str, meddler: Meddler
) -> None:
    """P10: it looks again for so long that the run grows old; the turn goes on in a later one, where it was."""
    limit = Refusal(scope=LimitScope.KEY, per=Per.TOTAL, measure=Measure.TURNS, limit=1, spent=1, needed=1, until=None)

    def think(request: ThinkRequest) -> Decision:
        if not world.lifts:
            return Decision(head=request.head or "", refused=limit)
        return answer("ok", request)

    world = World(think_with=think, spec=one_by_one())
    numbers = range(1, 13)
    handle = brief.get_workflow_handle(agent_id)
    async with world.workers(brief, queue):
        for number in numbers:
            await deliver(brief, agent_id, queue, event(number))
            await eventually(lambda number=number: len(world.thoughts) >= number)
            await handle.signal(names.CHECK_BUDGET)
        while len(meddler.runs) < 2:  # two signals may have come at once
            seen = len(world.thoughts)
            await handle.signal(names.CHECK_BUDGET)
            await eventually(lambda seen=seen: len(world.thoughts) > seen)
        await handle.execute_update(names.LIFT_BUDGET, LiftRequest(turns=100), result_type=Lifted)
        await eventually(lambda: len(world.replies) == len(numbers))
        await stop(brief, agent_id)
    assert answered(world) == [f"event-{number}" for number in numbers]
    assert len(world.lifecycle(names.BUDGET_EXCEEDED_TYPE)) == 1
    assert {request.turn for request in world.thoughts if not request.results} == set(numbers)
