"""The fault tests' deployment, without any fault: all of it works, and the oracle has nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from field import Field
from servers import AnyBroker
from traffic import letter, workflow_of

from workflows import names


async def test_a_deployment_without_faults(tmp_path: Path, new_broker: Callable[[], AnyBroker]) -> None:
    """Events of every fate: answered, sent twice, of no interest to anybody, and not to be understood."""
    uninteresting = b'{"specversion": "1.0", "id": "u", "source": "/s", "type": "store.unheard.of", "subject": "s"}'
    with new_broker() as broker:
        async with Field(tmp_path, broker, ingests=2) as field:
            for number in range(5):
                await field.send(*(letter(f"key-{key}", f"Number {number}", f"{key}/{number}") for key in range(6)))
            await field.send(letter("key-0", "Number 0", "0/0"), b"{ no event", letter("key-0", "Number 0", "0/0"))
            await field.send(uninteresting, topic="store.events")
            tally = await field.settled()
            assert not await field.committed_too_far()
            assert (tally.accepted, tally.duplicates, tally.dead_letters, tally.skipped) == (30, 2, 1, 1)
            assert field.redelivered == 0
            committed = await field.committed()
            assert sum(at for partition, at in committed.items() if partition.topic == names.EVENTS_TOPIC) == 33
            assert [await worker.stop() for worker in reversed(field.workers)] == [0] * 5


async def test_what_temporal_has_taken_and_shows_in_no_history_yet_is_accepted(
    tmp_path: Path, new_broker: Callable[[], AnyBroker]
) -> None:
    """While a worker is frozen in the midst of a workflow task, Temporal keeps what comes beside the history."""
    with new_broker() as broker:
        async with Field(tmp_path, broker) as field:
            await field.send(letter("first", "Hello."))
            await field.settled()
            field.agent.suspend()
            for number in range(3):  # the first is handed to the worker that sleeps, and opens the task
                await field.send(letter("first", f"Number {number}"))
                await field.no_lag()
            agent = workflow_of("first")
            assert not await field.committed_too_far()
            assert len(await field._in_history(agent)) < 4, "the history is not all"
            field.agent.resume()
            await field.settled()
