"""Where reading a topic begins, and reading a stretch of it once more. Recorders, unlike agents, drop no duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from recorders import ORDERS, QUICK, Rig, numbered
from servers import AnyBroker, TemporalServer

from activities.entries import AssistantMessage, Entry
from activities.ledger import Ledger
from workers import dlq
from workers.exits import CommandError
from workers.replay import Stretch, place, replay
from workflows import names
from workflows.events import EventReference
from workflows.names import Address
from workflows.spec import AgentSpec, Subscription


@pytest.fixture
async def rig(temporal_server: TemporalServer, fresh_broker: AnyBroker, tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(temporal_server, fresh_broker, ledger_url=f"sqlite:///{tmp_path}/ledger.db")
    async with rig.recording():
        yield rig


def starting(rig: Rig, start: Any) -> None:
    rig.spec = rig.spec.model_copy(
        update={"subscriptions": [Subscription(topic=ORDERS, key="data.order_id", start=start)]}
    )


NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


def minutes(number: int) -> int:
    """Of noon, in milliseconds since 1970."""
    return int(NOON.timestamp() * 1000) + number * 60_000


async def test_a_topic_may_start_at_a_time(rig: Rig) -> None:
    """Issue 3: at the first record of that time or later; where there is none yet, with the next one that comes."""
    for number in range(6):
        await rig.order("a", number, written_ms=minutes(number - 3))
        await rig.order("old", number, partition=1, written_ms=minutes(number - 60))
    starting(rig, NOON)
    async with rig.ingesting(replace(QUICK, commit_seconds=3600)) as ingest:
        assert await rig.arrive("a", 3) == numbered("a", range(3, 6))
        if rig.broker.remembers:  # the embedded broker looks for times by when it was given a record
            assert ingest._handover.counts.read == 3, "it looked for the place, and did not read what was before"
        await rig.order("old", 6, partition=1)
        assert await rig.arrive("old", 1) == ["old-6"]
    await rig.order("a", 6)
    async with rig.ingesting():
        assert await rig.arrive("a", 4) == numbered("a", range(3, 7))


async def test_each_subscription_starts_where_it_says(rig: Rig) -> None:
    """A topic is read once for all, from where the first starts; who starts later is spared what was before."""
    late = rig.spec.model_copy(
        update={
            "name": "late",
            "subscriptions": [Subscription(topic=ORDERS, key="data.order_id", start=NOON + timedelta(minutes=2))],
        }
    )
    starting(rig, NOON)
    for number in range(6):
        await rig.order("a", number, written_ms=minutes(number - 1))
    async with rig.ingesting(others=[late]):
        assert await rig.arrive("a", 5) == numbered("a", range(1, 6))
        await rig.order("end", 0)
        await rig.arrive("end", 1)
    rig.spec = late
    assert await rig.ids("a") == numbered("a", range(3, 6))


@pytest.mark.kafka
async def test_a_partition_that_comes_later_is_read_from_its_first_record(rig: Rig) -> None:
    """It was made after the start, so all that is in it is; also what came before ingest knew of it."""
    starting(rig, datetime.now(UTC))
    async with rig.ingesting():
        await rig.order("a", 0)
        await rig.arrive("a", 1)
    admin = AIOKafkaAdminClient(bootstrap_servers=rig.broker.bootstrap)
    await admin.start()
    try:
        await admin.create_partitions({ORDERS: NewPartitions(total_count=5)})
    finally:
        await admin.close()
    await rig.producer.client.force_metadata_update()
    await rig.order("new", 0, partition=4)
    async with rig.ingesting():
        assert await rig.arrive("new", 1) == ["new-0"]


async def test_a_stretch_that_is_replayed_reaches_only_who_has_not_taken_it(rig: Rig) -> None:
    """Issue 3: what the ledger says was taken is left out, however long ago; the group notices nothing; P4 neither."""
    for number in range(10):
        await rig.order("a", number)
    await rig.producer.send_and_wait(ORDERS, b"poison", partition=0)
    await rig.order("b", 0, partition=1)
    async with rig.ingesting():
        await rig.arrive("a", 10)
        await rig.arrive("b", 1)
        await rig.dead_letters(1)
    before = [await rig.committed(ORDERS, partition) for partition in range(2)]
    await taken(rig, "a", range(6))
    told = await replay(rig.settings, [rig.spec], Stretch(ORDERS, "earliest"), limits=QUICK)
    assert (told.read, told.accepted, told.known, told.rejected, told.skipped) == (12, 5, 6, 1, 0)
    assert await rig.ids("a") == numbered("a", [*range(10), *range(6, 10)])
    assert await rig.ids("b") == ["b-0", "b-0"]
    assert [await rig.committed(ORDERS, partition) for partition in range(2)] == before == [11, 1]
    assert len(await dlq.read(rig.settings)) == 1


async def taken(rig: Rig, key: str, numbers: range) -> None:
    """The ledger has an entry that answers these orders."""
    answers = [EventReference(source="/store", id=f"{key}-{number}") for number in numbers]
    async with Ledger(rig.settings.ledger_url) as ledger:
        await ledger.append(
            Entry(
                workflow_id=names.workflow_id(Address(rig.spec.tenant, rig.spec.name, key)),
                turn=1,
                step=1,
                parent=None,
                messages=[AssistantMessage(text="Done.")],
                answers=answers,
                recorded_at="2026-11-24T12:00:00+00:00",
            )
        )


async def test_a_stretch_is_cut_by_offsets_of_one_partition_or_by_times(rig: Rig) -> None:
    """`--from` and `--until`: the latter is the first record that is left out; what was deleted since is not there."""
    for number in range(8):
        await rig.order("a", number, written_ms=1_000_000 * (number + 1))
        await rig.order("b", number, partition=1, written_ms=1_000_000 * (number + 1))

    async def replayed(start: Any, end: Any = "latest", partition: int | None = None) -> list[str]:
        before = [*await rig.ids("a"), *await rig.ids("b")]
        told = await replay(rig.settings, [rig.spec], Stretch(ORDERS, start, end, partition), limits=QUICK)
        after = [*await rig.ids("a"), *await rig.ids("b")]
        assert len(after) - len(before) == told.accepted == told.read
        return sorted((Counter(after) - Counter(before)).elements())

    assert await replayed(2, 4, partition=0) == numbered("a", [2, 3])
    assert await replayed(datetime.fromtimestamp(7000, UTC)) == ["a-6", "a-7", "b-6", "b-7"]
    if rig.broker.remembers:  # as above
        until = datetime.fromtimestamp(4000, UTC)
        assert await replayed(datetime.fromtimestamp(1500, UTC), until) == ["a-1", "a-2", "b-1", "b-2"]
    told = await replay(rig.settings, [rig.spec], Stretch(ORDERS, 5, 99, 0), limits=QUICK)
    assert told.read == 3
    told = await replay(rig.settings, [rig.spec], Stretch(ORDERS, "latest"), limits=QUICK)
    assert told.read == 0


async def test_an_agent_that_comes_later_is_brought_what_was_before(rig: Rig) -> None:
    """`--agent`: the others are handed nothing; more than a window goes through, in order."""
    for number in range(120):
        await rig.order("a", number)
    async with rig.ingesting():
        await rig.arrive("a", 120)
    late = AgentSpec(
        name="late",
        tenant=rig.spec.tenant,
        instructions="Record.",
        subscriptions=[Subscription(topic=ORDERS, key="data.order_id")],
    )
    seen: list[tuple[int, int]] = []
    told = await replay(
        rig.settings,
        [rig.spec, late],
        Stretch(ORDERS, "earliest"),
        agent="late",
        limits=replace(QUICK, window_records=20),
        on_progress=lambda done, of: seen.append((done, of)),
    )
    assert told.accepted == 120
    assert seen[-1] == (120, 120)
    assert len(await rig.ids("a")) == 120
    rig.spec = late
    assert await rig.ids("a") == numbered("a", range(120))


@pytest.mark.parametrize(
    ("stretch", "agent", "said"),
    [
        (Stretch("nowhere", "earliest"), None, "no topic 'nowhere' at .*; there are: .*store.orders"),
        (Stretch(ORDERS, "earliest", partition=9), None, "no partition 9; it has 0 to 3"),
        (Stretch(ORDERS, 5), None, "4 partitions, and an offset means another record in each"),
        (Stretch(ORDERS, "earliest"), "nobody", "no agent 'nobody'. Known are: t.*/recorder"),
    ],
)
async def test_what_cannot_be_replayed_is_said(rig: Rig, stretch: Stretch, agent: str | None, said: str) -> None:
    """P14: what was wrong, and what there is."""
    with pytest.raises(CommandError, match=said) as refused:
        await replay(rig.settings, [rig.spec], stretch, agent=agent)
    assert refused.value.status == 2


def test_places_are_read_as_people_write_them() -> None:
    """A time without a zone is UTC."""
    november = datetime(2026, 11, 1, tzinfo=UTC)
    assert [place(text) for text in ("earliest", "latest", "0", "1200")] == ["earliest", "latest", 0, 1200]
    assert [place(text) for text in ("2026-11-01", "2026-11-01T00:00:00Z", "2026-11-01T01:00+01:00")] == [november] * 3
    for wrong in ("yesterday", "", "-5", "12:00"):
        with pytest.raises(CommandError, match="is no place in a topic"):
            place(wrong)
