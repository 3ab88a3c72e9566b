"""P7: long turns and long lives cost what short ones do. Real activities, ledger and servers; the model is scripted.

The case that ends others (temporalio/sdk-python issue 1890): a conversation of about 209,000 tokens, and a turn of 100
tool calls with results of 5 KB, which carries the conversation through the history and reaches 50 MB at the 53rd call.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from uuid import uuid4

import pytest
from chat_server import Server, said, serving
from servers import Broker, TemporalServer, eventually
from talking import deliver
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from activities.endpoints import ModelsConfig, PoolConfig, Pools
from activities.entries import AssistantMessage, Entry, UserMessage
from activities.ledger import Ledger
from activities.mcp_servers import Servers
from activities.publish import Publish
from activities.specs import load_specs
from workers import kafka
from workers.agent import agent_worker
from workers.model import model_worker
from workers.settings import Settings
from workflows import names
from workflows.events import Event, EventReference
from workflows.messages import Status
from workflows.names import Address

CONVERSATION_CHARACTERS = 209_000 * 4
RESULT_CHARACTERS = 5000

SPEC = """
name: researcher
tenant: acme
instructions: Read all of it.
tools: [{{python: "reading:read_page"}}]
budget: {{steps_per_turn: {steps}}}
context: {{tokens: {tokens}}}
mailbox: {{events_per_turn: 1}}
"""
TOOL = """
def read_page(number: int) -> str:
    '''A page of the book.'''
    return f"{{number}} ".ljust({characters}, "x")
"""


@dataclass
class Researcher:
    """The agent, and what became of its one turn."""

    client: Client
    ledger: Ledger
    server: Server
    queue: str
    id: str

    async def histories(self) -> list[list[HistoryEvent]]:
        """The events of its runs, oldest first."""
        runs: list[list[HistoryEvent]] = []
        run_id = self.first_run
        while run_id:
            history = await self.client.get_workflow_handle(self.id, run_id=run_id).fetch_history()
            runs.append(list(history.events))
            run_id = history.events[-1].workflow_execution_continued_as_new_event_attributes.new_execution_run_id
        return runs

    async def converse(self, characters: int, turns: int = 20) -> None:
        """Have had a conversation of this length."""
        parent: str | None = None
        for turn in range(1, turns + 1):
            entry = Entry(
                workflow_id=self.id,
                turn=turn,
                step=1,
                parent=parent,
                messages=[UserMessage(text="Go on."), AssistantMessage(text="y" * (characters // turns))],
                answers=[EventReference(source="test", id=f"before-{turn}")],
                recorded_at="2026-11-24T12:00:00+00:00",
            )
            parent = (await self.ledger.append(entry)).id

    async def _newest(self) -> Entry | None:
        """The newest entry."""
        return next(iter(await self.ledger.transcript(self.id, limit=1)), None)

    async def read(self) -> Status:
        """Take the one turn."""
        return await self.take(1)

    async def take(self, turns: int) -> Status:
        """Take so many turns, of an event each."""
        events = [Event(id=f"e{number}", source="test", type="read.all") for number in range(turns)]
        started = await deliver(self.client, self.id, self.queue, *events)
        assert started.first_execution_run_id
        self.first_run = started.first_execution_run_id
        handle = self.client.get_workflow_handle(self.id)
        newest = await self._newest()
        last_turn = turns + (newest.turn if newest else 0)

        async def answered() -> Status | None:
            # The ledger is asked first: a query that comes while the agent works takes a workflow task of its own.
            nonlocal newest
            newest = await self._newest()
            if newest is None or newest.turn < last_turn or newest.answer is None or newest.answer.tool_calls:
                return None
            status: Status = await handle.query(names.STATUS, result_type=Status)
            return status if status.replies >= turns else None

        status = await eventually(answered, 60, progress=lambda: newest)
        assert status
        return status


@contextlib.asynccontextmanager
async def researcher(
    folder: Path, temporal: TemporalServer, *, calls: int, context_tokens: int
) -> AsyncIterator[Researcher]:
    """An agent whose model calls a tool in each of so many steps, and then answers."""
    (folder / "researcher.yaml").write_text(SPEC.format(steps=min(1000, calls + 5), tokens=context_tokens))
    (folder / "reading.py").write_text(TOOL.format(characters=RESULT_CHARACTERS))
    asked = [said(None, (f"c{n}", "read_page", f'{{"number": {n}}}')) for n in range(1, calls)]
    with Broker() as broker:
        await broker.create_topics(names.REPLIES_TOPIC, names.ACTIVITY_TOPIC)
        async with serving(*asked, said("I have read it."), keep=False) as server:
            pools = Pools(ModelsConfig(pools={"here": PoolConfig(model="openai-chat:m", base_url=server.url)}), {})
            settings = Settings(
                temporal_address=temporal.address,
                task_queue=f"long-{uuid4()}",
                kafka_bootstrap=broker.bootstrap,
                kafka_idempotence=False,
                ledger_url=f"sqlite:///{folder}/ledger.db",
                specs=folder,
                state_dir=folder,
            )
            client = await Client.connect(temporal.address, data_converter=pydantic_data_converter)
            publisher = Publish(kafka.reached_by(settings))
            specs = load_specs(folder)
            async with (
                Ledger(settings.ledger_url) as ledger,
                pools,
                contextlib.aclosing(publisher),
                Servers(lambda _: {}) as servers,
                agent_worker(client, settings, specs, ledger, publisher, servers),
                model_worker(client, settings, ledger, pools),
            ):
                agent_id = names.workflow_id(Address("acme", "researcher", str(uuid4())))
                yield Researcher(client, ledger, server, settings.task_queue, agent_id)


def think_bytes(events: list[HistoryEvent]) -> list[int]:
    """The sizes of the requests for a model call, in the order of the steps."""
    scheduled = [event for event in events if event.HasField("activity_task_scheduled_event_attributes")]
    return [
        event.ByteSize()
        for event in scheduled
        if event.activity_task_scheduled_event_attributes.activity_type.name == "think"
    ]


@pytest.mark.timeout(300)
async def test_a_hundred_calls_on_a_long_conversation_keep_the_history_small(
    tmp_path: Path, temporal_server: TemporalServer
) -> None:
    """Issue 4, point 11: all 100 calls are made, each with the whole conversation, under 2 MB of history."""
    async with researcher(tmp_path, temporal_server, calls=100, context_tokens=400_000) as agent:
        await agent.converse(CONVERSATION_CHARACTERS)
        status = await agent.read()
        histories = await agent.histories()
    assert (status.failed_turns, status.tool_calls) == (0, 99)
    assert len(agent.server.sizes) == 100, "each call was made once"
    assert agent.server.sizes[0] > CONVERSATION_CHARACTERS, "the model was shown all of it"
    assert agent.server.sizes[-1] > CONVERSATION_CHARACTERS + 95 * RESULT_CHARACTERS
    events = [event for history in histories for event in history]
    assert sum(event.ByteSize() for event in events) < 2_000_000
    requests = think_bytes(events)[1:]  # the first carries the event, the others a result each
    assert max(requests) - min(requests) < RESULT_CHARACTERS / 50, "each call adds the same"


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_thousand_calls_of_one_turn_go_through_several_runs(
    tmp_path: Path, temporal_server: TemporalServer
) -> None:
    """Issue 4, point 11: it continues as new in its middle, makes no call again, and each hundred costs the same."""
    async with researcher(tmp_path, temporal_server, calls=1000, context_tokens=8000) as agent:
        status = await agent.read()
        histories = await agent.histories()
    assert (status.failed_turns, status.tool_calls, status.turn) == (0, 999, 1)
    assert len(agent.server.sizes) == 1000, "each call was made once"
    assert len(histories) > 1, "it went on in another run"
    requests = [size for history in histories for size in think_bytes(history)]
    hundreds = [sum(requests[start : start + 100]) for start in range(0, 1000, 100)]
    assert max(hundreds) < 1.1 * min(hundreds)
    assert agent.server.sizes[-1] < 1.1 * agent.server.sizes[100]


WORKFLOW_TASK = {
    value.number for name, value in EventType.DESCRIPTOR.values_by_name.items() if "_WORKFLOW_TASK_" in name
}


HANDOVER = {
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW,
}


def workflow_tasks_by_turn(events: list[HistoryEvent]) -> list[int]:
    """How many workflow tasks ended between one turn's request for a model call and the next."""
    counts = [0]
    for event in events:
        if event.activity_task_scheduled_event_attributes.activity_type.name == "think":
            counts.append(0)
        counts[-1] += event.HasField("workflow_task_completed_event_attributes")
    return counts[1:-1]


TURNS = 400
"""More than fit into one run, however few workflow tasks they take."""


@dataclass
class Costs:
    """What turns cost, on average.

    How many workflow tasks a turn takes depends on the machine, too: what completes meanwhile is taken by one of them.
    Their number is a turn's median, therefore, and what they add to the history is left out of the rest; how often an
    agent continues as new depends on it as well, so what that takes is counted as if it were once in these turns.
    """

    history_bytes: float
    """With what is carried from run to run, such as the ids of the events that were taken."""
    history_events: float
    workflow_tasks: float
    ledger_bytes: float
    shown_bytes: float
    """Of the request to the model."""


async def costs_after(folder: Path, temporal: TemporalServer, *, before: int, turns: int) -> Costs:
    """The costs of turns in a life that has had so many before."""
    async with researcher(folder, temporal, calls=1, context_tokens=1000) as agent:
        await agent.converse(400 * before, before)
        status = await agent.take(turns)
        histories = await agent.histories()
        entries = await agent.ledger.since(agent.id, before, limit=turns)
    assert (status.turn, status.failed_turns, len(entries)) == (before + turns, 0, turns)
    assert len(histories) > 1, "it continued as new"
    events = [event for history in histories for event in history]
    handovers = [event for event in events if event.event_type in HANDOVER]
    rest = [event for event in events if event.event_type not in WORKFLOW_TASK | HANDOVER]
    carried = max(event.ByteSize() for event in handovers)
    return Costs(
        history_bytes=(sum(event.ByteSize() for event in rest) + 2 * carried) / turns,  # it leaves one run, begins one
        history_events=len(rest) / turns,
        workflow_tasks=median(workflow_tasks_by_turn(events)),
        ledger_bytes=sum(len(entry.encode()) for entry in entries) / turns,
        shown_bytes=sum(agent.server.sizes[-100:]) / 100,
    )


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_ten_thousandth_turn_costs_what_the_hundredth_does(
    tmp_path_factory: pytest.TempPathFactory, temporal_server: TemporalServer
) -> None:
    """P7, issue 4, point 11: history, workflow tasks and ledger per turn, with continue-as-new on the way.

    The turns before are in the ledger, and the agent begins behind them, as it does when its workflow was terminated.
    """
    young = await costs_after(tmp_path_factory.mktemp("young"), temporal_server, before=100, turns=TURNS)
    old = await costs_after(tmp_path_factory.mktemp("old"), temporal_server, before=9600, turns=TURNS)
    for name, cost in asdict(young).items():
        assert asdict(old)[name] < 1.1 * cost, (name, young, old)
