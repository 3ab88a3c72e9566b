"""Static membership (KIP-345): a member that is started again within the session time, and the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from recorders import QUICK, Rig, numbered
from servers import AnyBroker, TemporalServer, eventually

from workers.ingest import Ingest, IngestError


@pytest.fixture
async def rig(temporal_server: TemporalServer, fresh_broker: AnyBroker) -> AsyncIterator[Rig]:
    rig = Rig(temporal_server, fresh_broker)
    async with rig.recording():
        yield rig


def share(ingest: Ingest) -> set[object]:
    return set(ingest._consumer.assignment()) if hasattr(ingest, "_consumer") else set()


def generation(ingest: Ingest) -> int:
    number: int = ingest._consumer._coordinator.generation
    return number


@pytest.mark.kafka
async def test_a_named_member_that_comes_back_has_its_partitions_and_the_others_notice_nothing(rig: Rig) -> None:
    """Issue 3: a deploy restarts one worker after the other, and no rebalance stops the world each time."""
    async with rig.ingesting(kafka_instance_id="two") as second:
        async with rig.ingesting(kafka_instance_id="one") as first:
            await eventually(lambda: len(share(first)) == len(share(second)) == 4)
            before, of_first, of_second = generation(second), share(first), share(second)
            for number in range(4):
                await rig.order(f"key-{number}", 0, partition=number)
        async with rig.ingesting(kafka_instance_id="one") as again:
            await eventually(lambda: share(again) == of_first)
            for number in range(4):
                await rig.order(f"key-{number}", 1, partition=number)
                assert await rig.arrive(f"key-{number}", 2) == numbered(f"key-{number}", range(2))
            assert (generation(second), share(second)) == (before, of_second)


@pytest.mark.kafka
async def test_two_members_with_one_name_do_not_push_each_other_out_for_ever(rig: Rig) -> None:
    """A setting that was copied: whoever notices first ends, with a status other than 0, and says what to do."""
    settings = rig.settings.model_copy(update={"kafka_instance_id": "one"})
    stop = asyncio.Event()
    twins = [
        asyncio.create_task(Ingest(await rig.connect(), settings, [rig.spec], limits=QUICK).run(stop)) for _ in range(2)
    ]
    ended, _ = await asyncio.wait(twins, timeout=60, return_when=asyncio.FIRST_EXCEPTION)
    stop.set()
    await asyncio.wait(twins)
    assert ended
    error = ended.pop().exception()
    assert isinstance(error, IngestError)
    assert "PERENNIAL_KAFKA_INSTANCE_ID of its own" in str(error)


async def test_a_name_is_borne_on_either_broker(rig: Rig) -> None:
    """Whatever the broker makes of it, events arrive, and a restart loses none."""
    for number in range(2):
        async with rig.ingesting(kafka_instance_id="one"):
            await rig.order("a", number)
            assert await rig.arrive("a", number + 1, seconds=45) == numbered("a", range(number + 1))
