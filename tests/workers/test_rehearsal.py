"""The rehearsal endpoint over HTTP, with the client that the agents use and without, and as a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from operator import mul
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from servers import eventually
from temporalio.exceptions import ApplicationError

from activities.endpoints import Answer, FinalError, ModelsConfig, PoolConfig, Pools
from activities.entries import Entry, Message, ToolMessage, UserMessage
from workers.ports import free_port
from workers.rehearsal import Counts, main, serving
from workers.rehearsal_rules import Rules
from workers.settings import Settings
from workflows.messages import ToolOutcome
from workflows.spec import ToolDefinition

RULES = Rules.model_validate(
    yaml.safe_load("""
    rules:
      - when: {event: shop.lost}
        calls: [{tool: look, with: {order_id: "{data.order_id}"}}]
        say: ["{data.order_id} is {look.status}", "could not look: {look.error}"]
    """)
)
LOST = 'Event shop.lost (id 1, from /shop)\n{"order_id":"order-1"}'
SCHEMA = {"type": "object", "properties": {"order_id": {"type": "string"}}, "required": ["order_id"]}
LOOK = ToolDefinition(name="look", description="Look it up.", parameters=SCHEMA, python="tools:look")


@asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=url.removesuffix("/v1"), timeout=30) as http:
        yield http


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "rehearsal", "messages": [{"role": "user", "content": text}], **more}


async def post(url: str, content: Any, key: str | None = None) -> httpx2.Response:
    async with client(url) as http:
        headers = {"Idempotency-Key": key} if key else {}
        return await http.post("/v1/chat/completions", json=content, headers=headers)


async def counted(url: str) -> dict[str, tuple[int, int]]:
    async with client(url) as http:
        calls = (await http.get("/rehearsal/calls")).json()
    return {call["key"]: (call["asked"], call["answered"]) for call in calls}


def events(stream: str) -> list[dict[str, Any]]:
    *chunks, done, rest = stream.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


# The agents' own client ----------------------------------------------------------------------------------------------


class Agent:
    """Talks through the client that the model worker uses."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.entries: list[Entry] = []

    async def step(self, *messages: Message, **options: Any) -> Answer:
        answer = await self._pools.call(
            "default",
            instructions="Be brief.",
            context=self.entries,
            messages=messages,
            tools=[LOOK],
            key=options.pop("key", f"agent/t/a/k/{len(self.entries)}"),
            **options,
        )
        new = [*messages, answer.message]
        self.entries.append(Entry(workflow_id="agent/t/a/k", turn=1, step=1, parent=None, messages=new, recorded_at=""))
        return answer


@asynccontextmanager
async def talking(**options: Any) -> AsyncIterator[tuple[Agent, str]]:
    async with serving(RULES) as url:
        pool = PoolConfig.model_validate({"model": "openai-chat:rehearsal", "base_url": url, **options})
        async with Pools(ModelsConfig(pools={"rehearsal": pool}), {}) as pools:
            yield Agent(pools), url


@pytest.mark.parametrize(
    ("content", "outcome", "said"),
    [
        ('{"status": "lost"}', ToolOutcome.OK, "order-1 is lost"),
        ("its worker died", ToolOutcome.UNKNOWN, "could not look: Outcome unknown: its worker died"),
        ("order_id: Field required", ToolOutcome.ERROR, "could not look: order_id: Field required"),
    ],
)
async def test_an_agent_is_answered_by_the_rules(content: str, outcome: ToolOutcome, said: str) -> None:
    """The whole way of a turn: call, result, answer; marked as rehearsal, with usage; errors are understood."""
    async with talking() as (agent, url):
        first = await agent.step(UserMessage(text=LOST))
        (call,) = first.message.tool_calls
        assert (call.name, json.loads(call.arguments)) == ("look", {"order_id": "order-1"})
        last = await agent.step(ToolMessage(call_id=call.id, name="look", content=content, outcome=outcome))
        assert last.message.text == said
        assert last.rehearsal
        assert last.model == "rehearsal"
        assert last.usage.input_tokens > first.usage.input_tokens > 0
        assert last.usage.output_tokens == -(-len(said) // 4)
        assert await counted(url) == {"agent/t/a/k/0": (1, 1), "agent/t/a/k/1": (1, 1)}


async def test_an_agent_that_may_not_call_is_answered() -> None:
    """The last step of a turn."""
    async with talking() as (agent, _):
        answer = await agent.step(UserMessage(text=LOST), tools_allowed=False)
    assert not answer.message.tool_calls
    assert answer.message.text


async def test_errors_on_demand_mean_to_the_client_what_they_say() -> None:
    """P11: a rate limit is retried later, as asked; then it answers. A refusal is final. What is cut is no answer."""
    async with talking() as (agent, url):
        for _ in range(2):
            with pytest.raises(ApplicationError) as limited:
                await agent.step(UserMessage(text="[[error 429 retry-after=2 times=2]] Hello"), key="limited")
            assert limited.value.next_retry_delay is not None
            assert limited.value.next_retry_delay.total_seconds() == 2
        assert (
            await agent.step(UserMessage(text="[[error 429 retry-after=2 times=2]] Hello"), key="limited")
        ).rehearsal
        with pytest.raises(FinalError, match="400"):
            await agent.step(UserMessage(text="[[error 400]]"), key="refused")
        with pytest.raises(ApplicationError, match="No pool"):
            await agent.step(UserMessage(text="[[cut]]"), key="cut")
        with pytest.raises(FinalError, match="expected is"):
            await agent.step(UserMessage(text="[[error soon]]"), key="wrong")
        assert await counted(url) == {"limited": (3, 1), "refused": (1, 0), "cut": (1, 0), "wrong": (1, 0)}


async def test_a_call_that_hangs_runs_into_the_clients_timeout() -> None:
    """And is not counted as answered."""
    async with talking(timeout_seconds=0.2) as (agent, url):
        with pytest.raises(ApplicationError, match="No pool"):
            await agent.step(UserMessage(text="[[hang]]"), key="hung")
        assert await counted(url) == {"hung": (1, 0)}


# The protocol --------------------------------------------------------------------------------------------------------


async def test_an_answer_has_the_shape_of_openais() -> None:
    """Whatever model is asked for, the answer says that it is a rehearsal."""
    async with serving(Rules()) as url:
        answer = (await post(url, body("[[say Hello there]]", model="gpt-9"), "k")).json()
        async with client(url) as http:
            listed = (await http.get("/v1/models")).json()
    (choice,) = answer["choices"]
    assert answer["model"] == listed["data"][0]["id"] == "rehearsal"
    assert answer["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "Hello there", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


async def test_a_stream_says_what_an_answer_says() -> None:
    """Text in pieces, the finish, usage only when asked for, and the end mark."""
    asked = body("[[say one two three]]", stream=True)
    async with serving(Rules()) as url:
        plain = events((await post(url, asked)).text)
        response = await post(url, {**asked, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *with_usage, last = events(response.text)
    for chunks in (plain, with_usage):
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert [delta["content"] for delta in deltas[1:-1]] == ["one ", "two ", "three"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert all("usage" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


async def test_a_stream_can_call_tools() -> None:
    """The deltas of a call add up to it."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
    async with serving(RULES) as url:
        chunks = events((await post(url, body(LOST, stream=True, tools=tools))).text)
    parts = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert parts[0]["id"].startswith("call_")
    assert parts[0]["function"]["name"] == "look"
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"order_id": "order-1"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_cut_breaks_off(stream: bool) -> None:
    """The client sees the beginning of a body, and a broken connection; then, if it was to last so long, an answer."""
    asked = body("[[cut times=1]] [[say one two three four five]]", stream=stream)
    async with serving(Rules()) as url:
        with pytest.raises(httpx2.RemoteProtocolError):
            await post(url, asked, "k")
        assert (await post(url, asked, "k")).status_code == 200
        assert await counted(url) == {"k": (2, 1)}


async def test_a_stream_comes_as_slowly_as_it_is_asked_to() -> None:
    """The answer as a whole takes its latency, and some of it is there before; who leaves in between got no answer."""
    asked = body("[[latency 30]] [[say one two three]]", stream=True)
    async with serving(Rules()) as url, client(url) as http:
        async with http.stream("POST", "/v1/chat/completions", json=asked, headers={"Idempotency-Key": "k"}) as answer:
            first = await anext(answer.aiter_bytes())
        assert b"chat.completion.chunk" in first
        assert b"three" not in first
        assert await counted(url) == {"k": (1, 0)}


CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "model: Field required; messages: Field required"),
        (body("x", messages=[]), "messages: "),
        (body("x", messages=[{"role": "wizard", "content": "x"}]), "messages.0.role: "),
        (body("x", messages=[{"role": "user", "content": "x"}, CALLED]), "these tool calls have no result: 1"),
        (body("x", messages=[CALLED, {"role": "user", "content": "x"}]), "have no result yet: 1"),
        (body("x", messages=[{"role": "tool", "tool_call_id": "1", "content": "x"}]), "is a result of the call '1'"),
        (body("[[error]]"), "[[error ]]: expected is"),
    ],
)
async def test_a_request_that_is_wrong_is_refused_as_openai_does(content: Any, message: str) -> None:
    """P14: status 400, and an error that says where. What vendors refuse is refused here too."""
    async with serving(Rules()) as url:
        refused = await post(url, content)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


async def test_odd_content_is_taken() -> None:
    """Content in parts or null, unknown options, bodies that are not JSON, and other addresses do no harm."""
    parts = [{"type": "text", "text": "[[say hi]]"}, {"type": "image_url", "image_url": {"url": "x"}}]
    content = {"messages": [{"role": "developer", "content": None}, {"role": "user", "content": parts, "name": "ada"}]}
    async with serving(Rules()) as url, client(url) as http:
        answer = await post(url, {"model": "m", "tools": None, "stream": None, "store": False, **content})
        not_json = await http.post("/v1/chat/completions", content=b"\xff{")
        elsewhere = await http.get("/v1/completions")
        wrong_way = await http.get("/v1/chat/completions")
    assert answer.json()["choices"][0]["message"]["content"] == "hi"
    assert (not_json.status_code, elsewhere.status_code, wrong_way.status_code) == (400, 404, 405)
    assert "POST /v1/chat/completions" in elsewhere.json()["error"]["message"]


async def test_texts_are_made_vectors_of() -> None:
    """As OpenAI's embeddings endpoint answers; always the same, and nearer where words share their parts."""
    async with serving(Rules()) as url, client(url) as http:
        asked = {"model": "m", "input": ["Sonnenschirm", "Schirm", "Hund", "", "🚚"], "dimensions": 512}
        answers = [await http.post("/v1/embeddings", json=asked) for _ in range(2)]
        one = (await http.post("/v1/embeddings", json={"model": "m", "input": "Hund"})).json()
        wrong = await http.post("/v1/embeddings", json={"model": "m", "input": []})
    assert answers[0].json() == answers[1].json()
    found = answers[0].json()["data"]
    assert [item["index"] for item in found] == [0, 1, 2, 3, 4]
    shade, umbrella, dog, *_ = (item["embedding"] for item in found)
    assert all(len(item["embedding"]) == 512 and any(item["embedding"]) for item in found)
    near, far = (sum(map(mul, umbrella, other)) for other in (shade, dog))
    assert near > far == 0
    assert len(one["data"][0]["embedding"]) == 256
    assert one["usage"] == {"prompt_tokens": 1, "total_tokens": 1}
    assert wrong.status_code == 400
    assert "input" in wrong.json()["error"]["message"]


# Counting and waiting ------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_has_no_answer() -> None:
    """What a killed worker asked for is counted as asked, not as answered; and its wait ends."""
    async with serving(Rules(), latency="600") as url:
        asking = asyncio.create_task(post(url, body("hello"), "k"))
        await eventually(lambda: counted(url))
        asking.cancel()
        assert await counted(url) == {"k": (1, 0)}


async def test_latency_is_that_of_the_message_or_of_the_setting() -> None:
    """A message's own latency wins over the setting."""
    async with serving(Rules(), latency="600") as url:
        assert (await post(url, body("[[latency 0]] hello"))).status_code == 200
    loop = asyncio.get_running_loop()
    async with serving(Rules()) as url:
        began = loop.time()
        await post(url, body("[[latency 0.2-0.3]] hello"))
        assert loop.time() - began >= 0.2


def test_the_counts_are_bounded() -> None:
    """The calls asked for most recently are kept."""
    counts = Counts(most=2)
    for key in ("a", "b", "a", "c"):
        counts.asked(key)
    assert {count.key: count.asked for count in counts} == {"a": 2, "c": 1}


# The process ---------------------------------------------------------------------------------------------------------


async def refused_start(**values: Any) -> str:
    """What `main` says when it can't start with these settings."""
    options = {"rehearsal_url": f"http://127.0.0.1:{free_port()}/v1", **values}
    with pytest.raises(SystemExit) as refused:
        await main(Settings(**options), asyncio.Event())
    return str(refused.value)


async def test_wrong_settings_are_named(tmp_path: Path) -> None:
    """P14: port taken, rules, latency or address wrong: one message with the remedy."""
    wrong = tmp_path / "rules.yaml"
    wrong.write_text("rules:\n  - {}\n")
    assert f"{wrong}:2: rules.0.say: Field required" in await refused_start(rehearsal_rules=wrong)
    assert "cannot be read" in await refused_start(rehearsal_rules=tmp_path / "none.yaml")
    assert "PERENNIAL_REHEARSAL_LATENCY: latency 'soon'" in await refused_start(rehearsal_latency="soon")
    for url in ("nowhere", "https://127.0.0.1:1/v1", "http://127.0.0.1/v1", "http://127.0.0.1:1", "http://[::1:8/v1"):
        assert "http://host:port/v1 is expected" in await refused_start(rehearsal_url=url)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert "Address already in use" in await refused_start(rehearsal_url=url)


async def start(port: int, **variables: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers.cli", "worker", "rehearsal"),
        env={**os.environ, "PERENNIAL_REHEARSAL_URL": f"http://127.0.0.1:{port}/v1", **variables},
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_process_serves_and_ends_with_status_0() -> None:
    """`perennial worker rehearsal`, with the demo's rules; SIGTERM ends it, also while a call hangs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    process = await start(port)
    try:
        await eventually(lambda: _answers(url))
        hanging = asyncio.create_task(post(url, body("[[hang]]"), "hung"))
        await eventually(lambda: _hangs(url))
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            _, log = await process.communicate()
        assert process.returncode == 0, log
        assert b"rules" in log
        with pytest.raises(httpx2.HTTPError):
            (await hanging).raise_for_status()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_process_that_cannot_start_ends_with_status_2() -> None:
    """P14: one clear line, and the status for bad input, so that the supervisor does not try again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await start(taken.getsockname()[1])
        async with asyncio.timeout(30):
            _, log = await process.communicate()
    assert process.returncode == 2
    assert b"Cannot serve the rehearsal endpoint" in log
    assert b"Traceback" not in log


async def _answers(url: str) -> bool:
    try:
        return (await post(url, body("[[say hi]]"), "first")).status_code == 200
    except httpx2.ConnectError:
        return False


async def _hangs(url: str) -> bool:
    return "hung" in await counted(url)
