"""Calls of model endpoints, over HTTP: what is sent, what comes back, and what each error means."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from chat_server import Reply, Server, refused, said, serving
from prometheus_client import REGISTRY
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError, ModelRateLimitError
from temporalio.exceptions import ApplicationError

from activities.endpoints import Answer, FinalError, ModelsConfig, PoolConfig, Pools, remedy_for
from activities.entries import AssistantMessage, Entry, Message, ToolMessage, UserMessage
from workflows.errors import Remedy
from workflows.messages import ToolCall, ToolOutcome, Usage
from workflows.spec import ToolDefinition

LOOK = ToolDefinition(
    name="look",
    description="Look something up.",
    parameters={"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    python="tools:look",
)


def pool(server: Server, **options: Any) -> PoolConfig:
    return PoolConfig.model_validate({"model": "openai-chat:small", "base_url": server.url, **options})


async def call(pools: Pools, *new: Message, route: str = "default", **options: Any) -> Answer:
    return await pools.call(
        route,
        **{
            "instructions": "Be brief.",
            "context": [],
            "messages": new or [UserMessage(text="hello")],
            "tools": [LOOK],
            "key": "agent/t/a/k/1/1",
            **options,
        },
    )


async def ask(reply: Reply, **options: Any) -> tuple[Answer, Server]:
    """One call of one pool whose server answers with this."""
    async with serving(reply) as server, Pools(ModelsConfig(pools={"only": pool(server)}), {}) as pools:
        return await call(pools, **options), server


async def fail(reply: Reply, **options: Any) -> ApplicationError:
    """The same, for a server that fails; it has been asked exactly once."""
    async with serving(reply) as server, Pools(ModelsConfig(pools={"only": pool(server, **options)}), {}) as pools:
        with pytest.raises(ApplicationError) as failed:
            await call(pools)
        assert len(server.requests) == 1, "the library's own retries are off"
    return failed.value


def entry(*content: Message) -> Entry:
    return Entry(workflow_id="agent/t/a/k", turn=1, step=1, parent=None, messages=list(content), recorded_at="")


# What is sent --------------------------------------------------------------------------------------------------------


async def test_the_whole_conversation_is_sent() -> None:
    """Instructions, what was said, calls and results in order, what is new, and the tools."""
    before = entry(
        UserMessage(text="hi"),
        AssistantMessage(text="I look.", tool_calls=[ToolCall(id="7", name="look", arguments="{}")]),
    )
    _, server = await ask(
        said("ok"),
        context=[before],
        messages=[
            ToolMessage(call_id="7", name="look", content="nothing there", outcome=ToolOutcome.ERROR),
            UserMessage(text="and now?"),
        ],
    )
    (request,) = server.requests
    assert request["model"] == "small"
    system, *rest = request["messages"]
    assert (system["role"], system["content"]) == ("system", "Be brief.")
    assert rest == [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "7", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "7", "content": '{"error":"nothing there"}'},
        {"role": "user", "content": "and now?"},
    ]
    assert [tool["function"]["name"] for tool in request["tools"]] == ["look"]


async def test_the_idempotency_key_and_the_pools_key_go_with_it() -> None:
    """The same key whenever the call is made again; the API key only to the server it was named for."""
    async with serving(said("ok")) as server:
        config = ModelsConfig(
            pools={
                "keyed": pool(server, api_key_env="HOUSE_KEY", settings={"extra_headers": {"X-Team": "store"}}),
                "open": pool(server),
            },
            routes={"keyed": ["keyed"], "open": ["open"]},
        )
        async with Pools(config, {"HOUSE_KEY": "sesame", "OPENAI_API_KEY": "other"}) as pools:
            await call(pools, route="keyed", key="agent/t/a/k/3/2")
            await call(pools, route="open")
    keyed, open_ = server.headers
    assert (keyed["idempotency-key"], keyed["authorization"]) == ("agent/t/a/k/3/2", "bearer sesame")
    assert keyed["x-team"] == "store"
    assert "sesame" not in open_["authorization"]
    assert "other" not in open_["authorization"]


async def test_a_pools_settings_are_sent() -> None:
    """Temperature, the longest answer, and any further setting of the library."""
    async with serving(said("ok")) as server:
        config = ModelsConfig(
            pools={"p": pool(server, temperature=0.2, max_output_tokens=50, settings={"top_p": 0.5, "seed": 7})}
        )
        async with Pools(config, {}) as pools:
            await call(pools)
    (request,) = server.requests
    assert (request["temperature"], request["max_completion_tokens"]) == (0.2, 50)
    assert (request["top_p"], request["seed"]) == (0.5, 7)


async def test_a_model_that_must_answer_may_call_no_tools() -> None:
    """It is told so; a call it makes all the same is dropped, its text is kept."""
    answer, server = await ask(said("Here.", ("1", "look", "{}"), finish="tool_calls"), tools_allowed=False)
    (request,) = server.requests
    assert request["tool_choice"] == "none"
    assert request["messages"][0]["content"].startswith("Be brief.\n\nYou cannot call tools now.")
    assert answer.message == AssistantMessage(text="Here.")


# What comes back -----------------------------------------------------------------------------------------------------


async def test_text_usage_and_model_are_taken_over() -> None:
    """The model is named as it names itself."""
    answer, _ = await ask(said("Hello!"))
    assert answer == Answer(
        message=AssistantMessage(text="Hello!"),
        usage=Usage(input_tokens=30, output_tokens=4),
        model="real-1",
        pool="only",
        rehearsal=False,
    )


async def test_tool_calls_come_as_the_model_wrote_them() -> None:
    """Arguments stay text, right or wrong; ids are made unique, so that each result finds its call."""
    calls = [("1", "look", '{"what": "a"}'), ("1", "look", "{broken"), ("2", "none", "")]
    answer, _ = await ask(said(None, *calls, finish="tool_calls"))
    assert answer.message.tool_calls == [
        ToolCall(id="1", name="look", arguments='{"what": "a"}'),
        ToolCall(id="1-2", name="look", arguments="{broken"),
        ToolCall(id="2", name="none", arguments=""),
    ]


@pytest.mark.parametrize("text", ["", None])
async def test_an_empty_answer_is_an_answer(text: str | None) -> None:
    """A model may have nothing to say."""
    answer, _ = await ask(said(text))
    assert answer.message == AssistantMessage()


async def test_thinking_is_given_back_to_the_server_it_came_from() -> None:
    """And not to another one, which could not make anything of it."""
    async with serving(said("Yes.", reasoning_content="hm")) as one, serving(said("No.")) as other:
        config = ModelsConfig(pools={"one": pool(one), "other": pool(other)}, routes={"a": ["one"], "b": ["other"]})
        async with Pools(config, {}) as pools:
            answer = await call(pools, route="a")
            history = [entry(UserMessage(text="hi"), answer.message)]
            for route in ("a", "b"):
                await call(pools, route=route, context=history)
    assert one.requests[-1]["messages"][2] == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}
    assert "reasoning_content" not in other.requests[-1]["messages"][2]


async def test_answers_of_the_rehearsal_endpoint_are_marked() -> None:
    """It is never taken for a real model."""
    answer, _ = await ask(said("Hello!", model="rehearsal"))
    assert answer.rehearsal


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (refused(429, "slow down"), "HTTP status 429: slow down"),
        (refused(429, "pay", "insufficient_quota"), "HTTP status 429: pay"),
        (refused(500, "boom"), "HTTP status 500: boom"),
        (refused(503), "HTTP status 503"),
        (refused(401, "bad key"), "HTTP status 401: bad key"),
        (refused(403), "HTTP status 403"),
        (refused(404, "no such model"), "HTTP status 404: no such model"),
        (refused(402), "HTTP status 402"),
        (refused(408), "HTTP status 408"),
        (refused(409), "HTTP status 409"),
        (refused(400, "bad temperature", "unsupported_value"), "HTTP status 400: bad temperature"),
        (Reply(b"<html>down</html>", 502), "HTTP status 502"),
        (Reply(b"no JSON"), "decode"),
        (Reply({"unexpected": 1}), "Invalid response"),
        (Reply({"choices": []}), "Invalid response"),
        (Reply(said("half an answer").body, cut=20), "Connection"),
        (Reply(status=None), "Connection"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_may_pass_or_be_mended_is_retried_later(reply: Reply, what: str) -> None:
    """P11, and no mail is lost to a wrong key or an empty account. One try is one request."""
    error = await fail(reply)
    assert (error.type, error.non_retryable) == (Remedy.RETRY_LATER.value, False)
    assert "pool only: " in error.message
    assert what in error.message
    assert error.next_retry_delay is None


async def test_the_servers_retry_after_is_kept() -> None:
    """P11: retry later means when the server says."""
    error = await fail(refused(429, retry_after="7"))
    assert error.next_retry_delay == timedelta(seconds=7)


async def test_a_wait_that_would_outlast_the_agents_patience_is_shortened() -> None:
    """Mail is tried again before it is given up."""
    error = await fail(refused(429, retry_after="86400"))
    assert error.next_retry_delay == timedelta(hours=1)


@pytest.mark.parametrize(
    ("reply", "what", "too_long"),
    [
        (refused(400, "messages: wrong"), "HTTP status 400: messages: wrong", False),
        (refused(422, "wrong"), "HTTP status 422: wrong", False),
        (refused(400, "maximum context length is 10"), "maximum context length", True),
        (refused(400, "too much", "context_length_exceeded"), "too much", True),
        (refused(413, "too large"), "HTTP status 413", True),
        (said(None, finish="content_filter"), "withheld", False),
        (said(None, refusal="I won't."), "I won't.", False),
    ],
)
async def test_a_refused_request_is_final(reply: Reply, what: str, *, too_long: bool) -> None:
    """No repetition changes it; whether a shorter one would be taken is said."""
    with pytest.raises(FinalError) as failed:
        await ask(reply)
    assert "pool only: " in str(failed.value)
    assert what in str(failed.value)
    assert failed.value.too_long is too_long


async def test_a_server_that_hangs_is_given_up_after_the_pools_timeout() -> None:
    """And the connection is closed."""
    error = await fail(Reply(hang=True), timeout_seconds=0.3)
    assert "imeout" in error.message


async def test_nobody_listening_is_retried_later() -> None:
    """A server that is being restarted."""
    async with serving(said("ok")) as server:
        pass
    async with Pools(ModelsConfig(pools={"gone": pool(server)}), {}) as pools:
        with pytest.raises(ApplicationError, match="pool gone: ModelConnectionError") as failed:
            await call(pools)
    assert failed.value.type == Remedy.RETRY_LATER.value


async def test_an_error_nobody_foresaw_comes_out_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in our own code is not dressed up as a busy server."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("activities.endpoints.model_request", broken)
    async with serving(said("ok")) as server, Pools(ModelsConfig(pools={"p": pool(server)}), {}) as pools:
        with pytest.raises(ZeroDivisionError):
            await call(pools)


def test_errors_without_a_status_have_a_remedy() -> None:
    """Some providers send none; an error inside a stream has none either."""
    assert remedy_for(ModelAPIError("m", "odd")) is Remedy.RETRY_ELSEWHERE
    assert remedy_for(ModelRateLimitError("m", "slow")) is Remedy.RETRY_ELSEWHERE
    assert remedy_for(ModelHTTPError(418, "m")) is Remedy.FINAL


# Routes --------------------------------------------------------------------------------------------------------------


async def through(*replies: Reply) -> tuple[Answer | ApplicationError | FinalError, list[int]]:
    """What a route over servers that answer so comes to, and how often each was asked."""
    async with (
        serving(replies[0]) as one,
        serving(replies[1]) as two,
        Pools(ModelsConfig(pools={"one": pool(one), "two": pool(two)}), {}) as pools,
    ):
        try:
            outcome = await call(pools)
        except (ApplicationError, FinalError) as error:
            outcome = error
        return outcome, [len(one.requests), len(two.requests)]


async def test_the_next_pool_takes_what_the_first_cannot() -> None:
    """P11: retry elsewhere."""
    for broken in (refused(429), refused(500), refused(401), Reply(b"no JSON"), Reply(status=None)):
        outcome, asked = await through(broken, said("from two"))
        assert isinstance(outcome, Answer)
        assert (outcome.message.text, outcome.pool, asked) == ("from two", "two", [1, 1])


async def test_the_first_pool_that_answers_is_enough() -> None:
    """No other is asked."""
    outcome, asked = await through(said("from one"), said("from two"))
    assert isinstance(outcome, Answer)
    assert (outcome.pool, asked) == ("one", [1, 0])


async def test_a_refused_request_is_not_tried_elsewhere() -> None:
    """Final is final."""
    outcome, asked = await through(refused(400), said("from two"))
    assert isinstance(outcome, FinalError)
    assert asked == [1, 0]


async def test_when_no_pool_answers_all_are_named_and_the_shortest_wait_counts() -> None:
    """The operator reads what each has said."""
    outcome, asked = await through(refused(429, "busy", retry_after="9"), refused(429, "full", retry_after="4"))
    assert isinstance(outcome, ApplicationError)
    assert outcome.message == (
        "No pool of route 'default' can answer now. pool one: HTTP status 429: busy; pool two: HTTP status 429: full"
    )
    assert outcome.next_retry_delay == timedelta(seconds=4)
    assert asked == [1, 1]


async def test_a_pool_whose_client_cannot_be_made_is_passed_over() -> None:
    """A missing package of one provider doesn't stop the others."""
    async with serving(said("ok")) as server:
        config = ModelsConfig(pools={"odd": PoolConfig(model="nowhere:x"), "good": pool(server)})
        async with Pools(config, {}) as pools:
            assert (await call(pools)).pool == "good"


async def test_a_route_that_is_not_there_is_the_operators_to_mend() -> None:
    """The spec's route and those there are are named; mail waits."""
    async with serving(said("ok")) as server, Pools(ModelsConfig(pools={"p": pool(server)}), {}) as pools:
        with pytest.raises(ApplicationError, match=r"no route 'fast'; the routes are: default") as failed:
            await call(pools, route="fast")
    assert failed.value.type == Remedy.RETRY_LATER.value


# Cancellation and metrics --------------------------------------------------------------------------------------------


async def test_a_cancelled_call_closes_its_connection() -> None:
    """The server stops working for an agent that no longer waits."""
    async with serving(Reply(hang=True)) as server, Pools(ModelsConfig(pools={"p": pool(server)}), {}) as pools:
        task = asyncio.create_task(call(pools))
        await server.arrived.wait()
        assert not server.left.is_set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.left.wait()


async def test_many_calls_share_a_pool() -> None:
    """One client, many requests at once."""
    async with serving(said("ok")) as server, Pools(ModelsConfig(pools={"p": pool(server)}), {}) as pools:
        answers = await asyncio.gather(*(call(pools) for _ in range(20)))
        assert {answer.message.text for answer in answers} == {"ok"}
        assert len(server.requests) == 20


async def test_calls_and_tokens_are_counted_by_pool_and_outcome() -> None:
    """Each try counts, with its outcome; the label is the configured model, of which there are few."""

    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, {"model": "openai-chat:small", **labels}) or 0

    def counted() -> list[float]:
        return [
            value("perennial_model_calls_total", pool="one", outcome="retry_elsewhere"),
            value("perennial_model_calls_total", pool="two", outcome="ok"),
            value("perennial_tokens_total", pool="two", direction="input"),
            value("perennial_tokens_total", pool="two", direction="output"),
        ]

    before = counted()
    await through(refused(500), said("ok"))
    assert [after - earlier for after, earlier in zip(counted(), before, strict=True)] == [1, 1, 30, 4]
