"""The fault matrix, where ingest is what breaks (see test_matrix.py): killed, frozen, cut off, asked to stop.

One deployment for all: its Temporal suggests continue-as-new after three turns, and one of its agents hibernates as
soon as it is idle. Each test has keys of its own, and ends with the oracle over all that was ever sent.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from field import Field, Worker
from servers import AnyBroker, eventually
from stack import STORE
from temporalio.client import WorkflowExecutionStatus
from traffic import letter, workflow_of

from workers import dlq
from workers.settings import Settings
from workflows import names
from workflows.messages import Intervention

NAPPER = "napper"
_SPEC = """
name: napper
tenant: store
instructions: Answer, and go back to sleep.
hibernate_after_seconds: 0.5
"""
_CLOCK = Path(__file__).parent / "clock"
_SUGGEST_AFTER = 45
"""Events of a run's history; a turn makes some 17, so the third turn is a run's last."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def field(tmp_path_factory: pytest.TempPathFactory, new_broker: Callable[[], AnyBroker]) -> AsyncIterator[Field]:
    folder = tmp_path_factory.mktemp("ingest-faults")
    specs = shutil.copytree(STORE, folder / "specs")
    (specs / "napper.yaml").write_text(_SPEC)
    suggest = f"limit.historyCount.suggestContinueAsNew={_SUGGEST_AFTER}"
    with new_broker() as broker:
        async with Field(folder, broker, specs=specs, temporal=["--dynamic-config-value", suggest]) as field:
            yield field


@pytest.fixture
def ingest(field: Field) -> Worker:
    """The one that runs in all tests."""
    return field.ingests[0]


async def run_of(field: Field, workflow_id: str) -> tuple[str, bool]:
    """The agent's newest run, and whether it is closed."""
    about = await field.client.get_workflow_handle(workflow_id).describe()
    assert about.run_id
    return about.run_id, about.status is not WorkflowExecutionStatus.RUNNING


async def test_killed_after_temporal_has_it_and_before_the_commit(field: Field, ingest: Worker) -> None:
    """P1, cases 1 to 3: it is delivered again and dropped, by the same run, a later one, and a woken agent alike."""
    same, later, stopped = (workflow_of(key) for key in ("same", "later", "stopped"))
    asleep = workflow_of("asleep", NAPPER)
    agents = [same, later, stopped, asleep]
    for number in (1, 2):
        await field.send(letter("later", f"This is letter {number}."))
        await field.settled()
    before = {later: await run_of(field, later)}
    received = await ingest.metric("perennial_events_received_total")

    field.ingest_to_temporal.half_open()
    await field.send(*(letter(key, "Once?") for key in ("same", "later", "stopped")))
    await field.send(letter("asleep", "Once?", agent=NAPPER))
    await eventually(lambda: _reads(ingest, received + 4))
    field.ingest_to_broker.half_open()  # so there will be no commit
    field.ingest_to_temporal.mend()
    await eventually(lambda: not field.unanswered())
    ingest.kill()
    field.ingest_to_broker.mend()
    assert await field.lag() == 4

    me = Intervention(by="tester", reason="a test")
    await field.client.get_workflow_handle(stopped).execute_update(names.STOP, me)
    for agent in (stopped, asleep):
        await eventually(lambda agent=agent: _closed(field, agent))
    assert (await run_of(field, later)) != before[later], "it has continued as new"
    before = {agent: await run_of(field, agent) for agent in agents}
    turns = {agent: (await field.status(agent)).turn for agent in agents}

    await field.start(ingest)
    await field.settled()
    assert field.redelivered == 4
    for agent in agents:
        status = await field.status(agent)
        assert (status.duplicates, status.turn, status.replies) == (1, turns[agent], turns[agent])
    assert await run_of(field, same) == before[same]
    assert await run_of(field, later) == before[later]
    assert (await run_of(field, stopped))[0] != before[stopped][0], "it was woken, to find that there is nothing new"
    await eventually(lambda: _closed(field, asleep))
    assert (await run_of(field, asleep))[0] != before[asleep][0]


async def test_temporal_has_it_and_its_answer_is_lost(field: Field) -> None:
    """P1, case 4: the call times out and is made again; the agent drops what it has, however often it comes."""
    before = field.redelivered
    field.ingest_to_temporal.drop_answers()
    await field.send(*(letter(f"unheard-{number}", "Do you hear me?") for number in range(4)))
    await eventually(lambda: not field.unanswered())
    await eventually(lambda: field.redelivered > before)
    assert await field.lag() == 4
    field.ingest_to_temporal.mend()
    await field.settled()


async def test_what_a_producer_sends_again_is_dropped(field: Field) -> None:
    """P1, case 10: with a new offset, at once or later, by another partition, also to an agent that is asleep."""
    before = field.redelivered
    again = letter("again", "Is this the first time?", "again/1")
    asleep = letter("asleep-again", "And this?", "again/2", agent=NAPPER)
    await field.send(again, again, asleep)
    await field.settled()
    await eventually(lambda: _closed(field, workflow_of("asleep-again", NAPPER)))
    repeated = field.expected.repeated
    await field.send(again, asleep)
    for key in (b"a", b"b", b"c", b"d", b"e"):
        await field.send(again, asleep, key=key)
    assert len({record.place.partition for record in field.sent[-10:] if record.place}) > 1
    await field.settled()
    assert field.expected.repeated == repeated + 12
    assert field.redelivered == before


async def test_asked_to_stop_it_drains_and_leaves_and_commits_all_that_it_may(field: Field, ingest: Worker) -> None:
    """P3, case 19: SIGTERM in the midst of a stream, with deliveries on their way to a slow Temporal.

    What was delivered behind an event that was not can't be committed: it is delivered again, and dropped.
    """
    before = field.redelivered
    field.ingest_to_temporal.delay(0.15)
    async with field.stream("drained", rounds=60):
        await field.some_answered("drained")
        assert await ingest.stop() == 0, ingest.log.read_text()[-3000:]
        assert await field.members() == set()
    field.ingest_to_temporal.mend()
    committed = await field.committed()
    accepted = {pair for pair in await field.accepted() if "drained" in pair.workflow_id}
    assert 0 < len(accepted) < 60 * 6, "it was stopped in the midst of it"
    places = {pair: field.sent[index] for pair, index in field.expected.pairs.items() if "drained" in pair.workflow_id}
    for partition in filter(None, {record.partition for record in places.values()}):
        here = {pair: record.offset for pair, record in places.items() if record.partition == partition}
        missing = [offset for pair, offset in here.items() if pair not in accepted]
        frontier = min(missing, default=max(here.values()) + 1)
        assert committed[partition] == frontier, "all up to the first that is not delivered, and no more"
    ahead = [pair for pair in accepted if (at := places[pair]).partition and at.offset >= committed[at.partition]]
    await field.start(ingest)
    await field.settled()
    assert field.redelivered == before + len(ahead)


@pytest.mark.kafka  # it takes long
async def test_clocks_that_are_wrong(field: Field, ingest: Worker) -> None:
    """Case 17: ingest's is an hour fast, those of the other workers an hour slow; nothing comes of it."""
    field.clocks_agree = False  # for good: what they have recorded stays
    workers = {ingest: 3600, field.agent: -3600, field.model: -3600}
    for worker, seconds in workers.items():
        assert await worker.stop() == 0
        worker.variables["PYTHONPATH"] = os.pathsep.join([str(_CLOCK), os.environ.get("PYTHONPATH", "")])
        worker.variables["CLOCK_IS_FAST_BY"] = str(seconds)
    await field.start(*workers)
    before = field.redelivered
    async with field.stream("fast-and-slow", rounds=20):
        await field.some_answered("fast-and-slow")
        assert await ingest.stop() == 0
        await field.start(ingest)
    again = [record.value for record in field.sent if b"fast-and-slow" in record.value]
    await field.send(*again, b"{ no event")
    await field.settled()
    assert field.redelivered == before
    (buried,) = await dlq.read(Settings(kafka_bootstrap=field.broker.bootstrap))
    entries = [entry for agent, of in (await field.recorded()).items() if "fast-and-slow" in agent for entry in of]
    told = [datetime.fromisoformat(entry.recorded_at) for entry in entries] + [buried.letter.last_failed]
    now = datetime.now(UTC)
    assert {round((at - now) / timedelta(hours=1)) for at in told} == {-1, 1}, "they did believe in their clocks"
    for worker in workers:
        assert await worker.stop() == 0
        del worker.variables["PYTHONPATH"], worker.variables["CLOCK_IS_FAST_BY"]
    await field.start(*workers)


async def _closed(field: Field, workflow_id: str) -> bool:
    return (await run_of(field, workflow_id))[1]


async def _reads(ingest: Worker, records: float) -> bool:
    return await ingest.metric("perennial_events_received_total") >= records
