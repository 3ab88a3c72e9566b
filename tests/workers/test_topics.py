"""What is sent to Kafka and what is seen there: checked before it is sent, each event once when it is watched."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
import servers
from servers import Broker

from workers import topics
from workers.exits import BAD_INPUT, FAILED, CommandError
from workers.settings import Settings
from workers.topics import Line
from workflows import names
from workflows.spec import AgentSpec

SPEC = AgentSpec.model_validate(
    {
        "name": "logistics",
        "tenant": "acme",
        "instructions": "Be kind.",
        "subscriptions": [{"topic": "orders", "types": ["order.*"], "key": "data.order"}],
    }
)


def event(**fields: object) -> bytes:
    return json.dumps({"specversion": "1.0", "id": "1", "source": "/s", "type": "order.placed", **fields}).encode()


def settings_of(broker: Broker) -> Settings:
    return Settings(kafka_bootstrap=broker.bootstrap, kafka_idempotence=False, _env_file=None)


# Pure -------------------------------------------------------------------------------------------------------------


def test_lines_know_their_place() -> None:
    """Blank lines are skipped, and counted: the place is what an editor shows."""
    lines = topics.read_lines([b"one\n", b"  \n", b"two"], "f.jsonl")
    assert lines == [Line("f.jsonl:1", b"one"), Line("f.jsonl:3", b"two")]


def test_an_event_from_its_parts() -> None:
    """What is not given is not there; the id is made unless it is given; data is any JSON."""
    made = json.loads(topics.event_bytes("note", None, "[1, null]", None, None, "/s", None))
    assert made.keys() == {"specversion", "id", "source", "type", "time", "datacontenttype", "data"}
    assert made["data"] == [1, None]
    whole = json.loads(topics.event_bytes("note", "a", None, "logistics", "acme", "/s", "id-1"))
    assert (whole["subject"], whole["agent"], whole["tenant"], whole["id"]) == ("a", "logistics", "acme", "id-1")
    assert "data" not in whole


@pytest.mark.parametrize("data", ["Hello?", "", "NaN", '{"a": 1,}', '"open'])
def test_data_that_is_no_json_is_refused_with_the_remedy(data: str) -> None:
    """A newcomer forgets the quotes: the message shows them."""
    with pytest.raises(CommandError, match=r"--data is not JSON: .*'\"text\"'") as error:
        topics.event_bytes("note", None, data, None, None, "/s", None)
    assert error.value.status == BAD_INPUT


def test_the_key_is_the_subject_or_the_agents_key() -> None:
    """One agent's events share a partition, so that P2 can keep their order."""
    lines = [
        Line("f:1", event(subject="order-1", data={"order": "order-2"})),
        Line("f:2", event(data={"order": "order-2"})),
        Line("f:3", event(data={})),
    ]
    prepared, warnings = topics.prepare(lines, "orders", [SPEC])
    assert [record.key for record in prepared] == [b"order-1", b"order-2", None]
    assert [record.value for record in prepared] == [line.value for line in lines]
    assert len(warnings) == 1
    assert warnings[0].startswith("f:3: 'data.order'")
    assert names.DEAD_LETTER_TOPIC in warnings[0]


def test_without_specs_nothing_is_warned_of() -> None:
    """On a machine that only sends, the agents are not known."""
    assert topics.prepare([Line("f:1", event())], "orders", None)[1] == []


def test_all_faulty_lines_are_named_up_to_a_screenful() -> None:
    """And nothing is prepared; `raw` takes them as they stand, without a key."""
    lines = [Line(f"f:{number}", b"?") for number in range(1, 31)]
    with pytest.raises(CommandError) as error:
        topics.prepare([*lines, Line("f:31", event())], "orders", None)
    message = str(error.value)
    assert error.value.status == BAD_INPUT
    assert message.startswith("30 of 31 events are not valid, and nothing was sent:\n  f:1: the value is not JSON")
    assert "f:20: " in message
    assert "f:21: " not in message
    assert "\n  and 10 more\n" in message
    assert "--raw" in message
    prepared, _ = topics.prepare(lines[:1], "orders", None, raw=True)
    assert [(record.value, record.key, record.id) for record in prepared] == [(b"?", None, None)]


# On the broker ----------------------------------------------------------------------------------------------------


async def test_what_is_sent_is_watched_each_event_once(broker: Broker) -> None:
    """A reply that a retry published twice is shown once; what is no event is told of and does no harm."""
    settings, topic = settings_of(broker), "topics.once"
    await broker.create_topics(topic)
    lines = [Line(f"f:{number}", event(id=f"e{number % 3}", subject="a")) for number in range(6)]
    prepared, _ = topics.prepare([*lines, Line("f:7", b"?")], topic, None, raw=True)
    counted: list[int] = []
    await topics.send(
        settings,
        topic,
        [*prepared, *topics.prepare([Line("f:8", event(id="last"))], topic, None)[0]],
        on_progress=counted.append,
    )
    assert counted == list(range(1, 9))
    rejected: list[str] = []
    seen: list[str] = []
    watching = topics.watch(settings, (topic,), from_beginning=True, on_reject=rejected.append)

    async def watch() -> None:
        async with contextlib.aclosing(watching) as events:
            async for one in events:
                seen.append(one.id)  # noqa: PERF401  # it is looked at while it grows

    watcher = asyncio.ensure_future(watch())
    try:
        await servers.eventually(lambda: rejected and {"e0", "e1", "e2", "last"} <= set(seen))
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    assert sorted(seen) == ["e0", "e1", "e2", "last"]
    assert len(rejected) == 1
    assert rejected[0].startswith(f"{topic}/")
    assert "the value is not JSON" in rejected[0]


async def test_watching_begins_at_the_end_whatever_is_there_already(broker: Broker) -> None:
    """Twenty times: the consumer's own first reset must never win over the end that was asked for."""
    settings, topic = settings_of(broker), "topics.end"
    await broker.create_topics(topic)
    for number in range(20):
        ready = asyncio.Event()
        watching = topics.watch(settings, (topic,), on_ready=ready.set)
        async with contextlib.aclosing(watching) as events, asyncio.timeout(30):
            first = asyncio.ensure_future(anext(events))
            await ready.wait()
            prepared, _ = topics.prepare([Line("f:1", event(id=f"n{number}", subject=str(number)))], topic, None)
            await topics.send(settings, topic, prepared)
            assert (await first).id == f"n{number}"


async def test_a_topic_that_is_not_there_is_not_made(broker: Broker) -> None:
    """Brokers make what is mentioned; a mistyped name would swallow the events."""
    settings = settings_of(broker)
    await broker.create_topics("topics.there")
    prepared, _ = topics.prepare([Line("f:1", event())], "topics.their", None)
    with pytest.raises(CommandError, match=r"no topic 'topics.their'.*topics\.there") as error:
        await topics.send(settings, "topics.their", prepared)
    assert error.value.status == BAD_INPUT
    assert "topics.their" not in await topics.topics(settings)


async def test_kafka_away_is_one_message(tmp_path: Path) -> None:
    """For sending, listing and watching."""
    settings = Settings(kafka_bootstrap="127.0.0.1:1", state_dir=tmp_path, _env_file=None)
    for attempt in (topics.topics(settings), topics.send(settings, "t", []), anext(topics.watch(settings))):
        with pytest.raises(CommandError, match=r"Kafka at 127.0.0.1:1 does not answer.*PERENNIAL_KAFKA") as error:
            await attempt
        assert error.value.status == FAILED
