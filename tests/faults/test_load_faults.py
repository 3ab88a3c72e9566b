"""The fault matrix, where what is sent is the trouble (see test_matrix.py): poison, and too much for one agent.

Temporal's limits are scaled down: a run takes 30 signals, no more than five wait for a workflow task, and
continue-as-new is suggested after 60 events.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from field import Field
from servers import AnyBroker, eventually
from stack import STORE
from temporalio.api.enums.v1 import EventType, WorkflowTaskFailedCause
from traffic import letter, workflow_of

from workers import dlq
from workers.settings import Settings
from workers.tally import Pair

BUSY = "busy"
_SPEC = """
name: busy
tenant: store
instructions: Answer as many at once as you can.
mailbox:
  events_per_turn: 100
"""
_LIMITS = {
    "history.maximumSignalsPerExecution": 30,
    "history.maximumBufferedEventsBatch": 5,
    "limit.historyCount.suggestContinueAsNew": 60,
}
OTHERS = 6
_RATE = 200
"""Events a second for one agent."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def field(tmp_path_factory: pytest.TempPathFactory, new_broker: Callable[[], AnyBroker]) -> AsyncIterator[Field]:
    folder = tmp_path_factory.mktemp("load-faults")
    specs = shutil.copytree(STORE, folder / "specs")
    (specs / "busy.yaml").write_text(_SPEC)
    limits = [word for key, value in _LIMITS.items() for word in ("--dynamic-config-value", f"{key}={value}")]
    with new_broker() as broker:
        async with Field(folder, broker, specs=specs, temporal=limits) as field:
            yield field


async def test_poison_of_all_kinds_between_good_letters(field: Field) -> None:
    """P4, P14, case 12: one dead letter each, with its bytes and the reason; its neighbours do not notice."""
    event = b'{"specversion": "1.0", "source": "/s", "type": "t", "agent": "customer-service", "tenant": "store"'
    poison: list[tuple[bytes | None, str]] = [
        (b"\xff\xfe\x00", "not_utf8"),
        (b"{ not json", "not_json"),
        (b"[1]", "not_an_object"),
        (None, "no_value"),
        (b"", "not_json"),
        (event + b', "subject": "k"}', "missing_attribute"),
        (event + b', "id": "", "subject": "k"}', "missing_attribute"),
        (event + b', "id": 7, "subject": "k"}', "bad_attribute"),
        (event + b', "id": "no-key"}', "no_key"),
        (event.replace(b"customer-service", b"nobody") + b', "id": "nobody", "subject": "k"}', "unknown_agent"),
        (event + b', "id": "large", "subject": "k", "data": "' + b"x" * 3_000_000 + b'"}', "too_large"),
    ]
    wanted = {}
    for number, (value, reason) in enumerate(poison):
        await field.send(letter("neighbour", f"Number {number}"), value, key=b"one partition for all")
        wanted[field.sent[-1].place] = (value, reason)
    await field.send(letter("neighbour", "the last"), key=b"one partition for all")
    assert len({record.partition for record in field.sent}) == 1
    tally = await field.settled()
    assert (tally.accepted, tally.dead_letters) == (len(poison) + 1, len(poison))
    letters = [found.letter for found in await dlq.read(Settings(kafka_bootstrap=field.broker.bootstrap))]
    found = {
        (dead.original.topic, dead.original.partition, dead.original.offset): (dead.original.value, dead.reason)
        for dead in letters
    }
    assert found == wanted
    assert len(letters) == len(poison)


async def test_one_hot_agent_does_not_keep_others_waiting(field: Field) -> None:
    """P2, P5, case 13: 200 events a second for one whose answers take long, while others have theirs."""
    async with asyncio.TaskGroup() as tasks:
        calm = asyncio.Event()
        tasks.create_task(_flood(field, "hot", "[[latency 1]] Quick!", calm, at_least=4 * _RATE))
        for number in range(10):
            await field.send(*(letter(f"calm-{key}", f"Number {number}") for key in range(OTHERS)))
            await asyncio.sleep(0.2)
        await eventually(lambda: not [pair for pair in field.unanswered() if "calm" in pair.workflow_id])
        assert [pair for pair in field.unanswered() if "hot" in pair.workflow_id], "the hot one is far from done"
        calm.set()
    await field.settled()
    assert "does not take our requests" not in field.ingests[0].log.read_text()


async def test_more_for_one_agent_than_temporal_takes_for_a_run(field: Field) -> None:
    """P1, P4, P5, case 13: it waits for the next run, and no longer; what comes for others is accepted meanwhile.

    The agent worker is frozen: the run can't end, and what it is told piles up before its workflow task.
    """
    hot = workflow_of("piled", BUSY)
    await field.send(letter("piled", "Are you there?", agent=BUSY))
    await field.settled()
    first_run = (await field.client.get_workflow_handle(hot).describe()).run_id
    field.agent.suspend()
    async with asyncio.TaskGroup() as tasks:
        limit = asyncio.Event()
        tasks.create_task(_flood(field, "piled", "And now?", limit))
        await eventually(lambda: "exceeded workflow execution limit for signal events" in _log(field), 60)
        limit.set()
    busy_partition = field.sent[-1].partition  # full, if the flood was fast enough
    await field.send(*(letter(f"meanwhile-{key}", "And we?") for key in range(OTHERS)))
    others = {
        pair
        for pair, index in field.expected.pairs.items()
        if "meanwhile" in pair.workflow_id and field.sent[index].partition != busy_partition
    }
    assert others
    await eventually(lambda: _are_accepted(field, others))
    assert await field.lag() > 0
    assert not await field.committed_too_far()
    field.agent.resume()
    await field.settled(90)
    last_run = (await field.client.get_workflow_handle(hot).describe()).run_id
    assert first_run != last_run
    history = await field.client.get_workflow_handle(hot, run_id=first_run).fetch_history()
    signals = [e for e in history.events if e.event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED]
    forced = [
        e
        for e in history.events
        if e.workflow_task_failed_event_attributes.cause
        == WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_FORCE_CLOSE_COMMAND
    ]
    assert len(signals) == _LIMITS["history.maximumSignalsPerExecution"]
    assert forced


async def _flood(field: Field, key: str, text: str, enough: asyncio.Event, *, at_least: int = 0) -> None:
    """Letters for one agent, at a steady pace, until there are enough."""
    loop = asyncio.get_running_loop()
    began, sent = loop.time(), 0
    while sent < at_least or not enough.is_set():
        due = int((loop.time() - began) * _RATE) - sent
        await field.send(*(letter(key, f"{text} {sent + number}", agent=BUSY) for number in range(due)))
        sent += due
        await asyncio.sleep(0.02)


def _log(field: Field) -> str:
    return field.ingests[0].log.read_text()


async def _are_accepted(field: Field, pairs: set[Pair]) -> bool:
    return pairs <= await field.accepted()
