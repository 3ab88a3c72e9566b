"""Stream: what a model says, as it says it; never in the way of the call itself."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import aclosing
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from servers import AnyBroker, eventually

from activities.kafka import Kafka
from activities.stream import Telling
from activities.stream_topic import StreamTopic
from workers.ports import free_port
from workflows import names
from workflows.events import EventReference, Outgoing
from workflows.messages import Delta, DeltaKind

AGENT = "agent/hotel/concierge/room-7"
ASKED = EventReference(source="perennial/ask", id="q-1", type=names.ASK_TYPE)


def telling(put: Any, attempt: int = 1, agent: str = AGENT) -> Telling:
    return Telling(put, agent, turn=3, step=2, attempt=attempt, answers=[ASKED])


def deltas(told: list[Outgoing]) -> list[Delta]:
    return [Delta.model_validate(one.data) for one in told]


def heard(told: list[Delta]) -> str:
    """The text since the last start, which has an end."""
    starts = [number for number, delta in enumerate(told) if delta.kind is DeltaKind.START]
    assert told[-1].kind is DeltaKind.END
    return "".join(delta.text for delta in told[starts[-1] :] if delta.kind is DeltaKind.TEXT)


def dropped() -> float:
    return REGISTRY.get_sample_value("perennial_stream_records_total", {"outcome": "dropped"}) or 0.0


def sent() -> float:
    return REGISTRY.get_sample_value("perennial_stream_records_total", {"outcome": "sent"}) or 0.0


# What is told --------------------------------------------------------------------------------------------------------


@given(
    said=st.lists(st.none() | st.text(max_size=2000), max_size=8),
    recorded=st.none() | st.text(max_size=5000),
)
async def test_what_is_told_since_the_last_start_is_the_answer(said: list[str | None], recorded: str | None) -> None:
    """Whatever the model says in however many calls (None: another one): in small parts, and in the end right."""
    told: list[Outgoing] = []
    last = ""
    with telling(told.append) as tells:
        for text in said:
            if text is None:
                tells.begin()
                last = ""
            else:
                tells.text(text)
                last += text
        text = last if recorded is None else recorded
        tells.finish(text)
    parts = deltas(told)
    assert heard(parts) == text
    assert [delta.sequence for delta in parts] == [*range(len(parts))]
    assert all(len(delta.text) <= 3072 for delta in parts)
    assert [one.id for one in told] == [names.delta_id(AGENT, 3, 2, 1, number) for number in range(len(parts))]
    if recorded is None and said and said[0] is None:
        calls = sum(one is None for one in said)
        assert sum(delta.kind is DeltaKind.START for delta in parts) == calls, "what was told rightly is told once"


async def test_what_comes_together_is_told_together() -> None:
    """A word at a time is no record at a time; and nothing waits for more when no more comes."""
    told: list[Outgoing] = []
    with telling(told.append) as tells:
        tells.begin()
        for word in ("It ", "is ", "on ", "its "):
            tells.text(word)
        assert [delta.kind for delta in deltas(told)] == [DeltaKind.START]
        await eventually(lambda: len(told) == 2)
        tells.text("way")
        tells.tool_call("look")
        tells.text("x" * 1024)
        parts = deltas(told)
        tells.finish("It is on its way" + "x" * 1024)
    assert [(delta.kind.value, delta.text) for delta in parts] == [
        ("start", ""),
        ("text", "It is on its "),
        ("text", "way"),
        ("tool_call", "look"),
        ("text", "x" * 1024),
    ]
    assert parts[0].answers == [ASKED]
    assert deltas(told)[-1].kind is DeltaKind.END


async def test_of_a_call_that_failed_nothing_more_is_told() -> None:
    """What waited is void: the call that is made in its place says it anew."""
    told: list[Outgoing] = []
    with telling(told.append) as tells:
        tells.begin()
        tells.text("half an ans")
    await asyncio.sleep(0.15)  # longer than words are kept to go together
    assert [delta.kind for delta in deltas(told)] == [DeltaKind.START]


# The way to the topic ------------------------------------------------------------------------------------------------


async def test_parts_are_on_the_topic_in_order_under_the_agent(broker: AnyBroker) -> None:
    """As CloudEvents whose key is the agent: whoever reads one agent's partition reads its answer."""
    await broker.create_topics(names.STREAM_TOPIC)
    agent = f"agent/hotel/concierge/{uuid.uuid4()}"
    text = " ".join(map(str, range(2000)))
    before = sent()
    async with aclosing(StreamTopic(Kafka(broker.bootstrap, idempotence=broker.idempotent))) as topic:
        with telling(topic.put, agent=agent) as tells:
            tells.begin()
            for word in text.split(" "):
                tells.text(f"{word} ")
            tells.finish(f"{text} ")
    consumer = AIOKafkaConsumer(
        names.STREAM_TOPIC, bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    try:
        mine: list[Any] = []

        async def all_there() -> bool:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                mine.extend(record for record in records if record.key == agent.encode())
            return bool(mine) and json.loads(mine[-1].value)["data"]["kind"] == "end"

        await eventually(all_there)
    finally:
        await consumer.stop()
    events = [json.loads(record.value) for record in mine]
    assert heard([Delta.model_validate(event["data"]) for event in events]) == f"{text} "
    assert len({record.partition for record in mine}) == 1
    assert (events[0]["type"], events[0]["subject"], events[0]["agent"]) == (
        "perennial.stream.v1",
        agent.rpartition("/")[2],
        "concierge",
    )
    assert sent() - before == len(mine)


async def test_a_broker_that_is_away_stops_nothing() -> None:
    """What can't be told is dropped and counted, at once, within bounded memory; closing takes no time either."""
    before = dropped()
    async with aclosing(StreamTopic(Kafka(f"127.0.0.1:{free_port()}"), waiting=10)) as topic:
        with telling(topic.put) as tells:
            tells.begin()
            for _ in range(100):
                tells.text("x" * 1024)
            tells.finish("x" * 102_400)
        assert dropped() - before >= 90
        await eventually(lambda: dropped() - before > 92)  # some that waited, when it could not connect


@pytest.mark.parametrize("text", ["", "\ud83d", "a\ud83d\ude00b"])
async def test_odd_text_can_be_told(text: str) -> None:
    """Half a surrogate pair, as some servers cut their chunks: what is told can be encoded."""
    told: list[Outgoing] = []
    with telling(told.append) as tells:
        tells.begin()
        for character in text:
            tells.text(character)
        tells.finish("recorded")
    assert heard(deltas(told)) == "recorded"
    json.dumps([one.data for one in told], ensure_ascii=False).encode()
