"""The fault matrix, where the consumer group is in trouble (see test_matrix.py): members that come, go and freeze.

Three ingest workers share the topics; all three run again when a test is over.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from field import Field
from servers import AnyBroker, eventually
from traffic import letter

KEYS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def field(tmp_path_factory: pytest.TempPathFactory, new_broker: Callable[[], AnyBroker]) -> AsyncIterator[Field]:
    with new_broker() as broker:
        async with Field(tmp_path_factory.mktemp("group-faults"), broker, ingests=3) as field:
            await field.balanced()
            yield field


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("number", "rounds"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 8, marks=pytest.mark.kafka),
        pytest.param(signal.SIGKILL, 4, marks=pytest.mark.kafka),
    ],
)
async def test_workers_come_and_go(field: Field, number: signal.Signals, rounds: int) -> None:
    """P1, P2, P3, case 8: one of three is taken away and brought back, again and again, in a stream of events."""
    async with field.commits_watched():
        async with field.stream(f"storm-{number.name}-{rounds}", pace=0.3):
            for turn in range(rounds):
                worker = field.ingests[turn % len(field.ingests)]
                worker.signal(number)
                assert await worker.ended() in {0, -signal.SIGKILL}
                await field.start(worker)
                assert not await field.committed_too_far()
        await field.settled()


async def test_a_worker_that_was_frozen_for_longer_than_its_session(field: Field) -> None:
    """P2, P3, case 9: others have its partitions when it goes on; what it still wants to commit or deliver is void.

    It is frozen with accepted events it has not committed, and with mail of the same agents that waits behind them.
    """
    frozen = field.ingests[0]
    await field.balanced()
    assert len(await field.members()) == 3
    received = await _received(field)
    async with field.commits_watched():
        field.ingest_to_temporal.half_open()
        for number in range(30):
            await field.send(*(letter(f"frozen-{key}", f"Number {number}") for key in range(KEYS)))
        await eventually(lambda: _all_read(field, received + 30 * KEYS))
        field.ingest_to_broker.half_open()
        field.ingest_to_temporal.mend()
        await eventually(lambda: _some_accepted(field, "frozen-"))
        frozen.suspend()
        try:
            field.ingest_to_broker.mend()
            await field.settled()
            assert len(await field.members()) == 2, "it is no member any more"
            async with field.stream("thawed", rounds=30):
                await field.some_answered("thawed")
                frozen.resume()
        finally:
            frozen.resume()
        await field.balanced()
        await field.settled()
    assert frozen.runs


async def _received(field: Field) -> float:
    return sum([await ingest.metric("perennial_events_received_total") for ingest in field.ingests])


async def _all_read(field: Field, records: float) -> bool:
    return await _received(field) >= records


async def _some_accepted(field: Field, prefix: str) -> bool:
    return any(prefix in pair.workflow_id for pair in await field.accepted())
