"""Issue 2: the same code answers through a real OpenAI-compatible server, given by `OPENAI_BASE_URL` alone."""

from __future__ import annotations

from pathlib import Path

import chat_server
import pytest
from stack import Stack, perennial
from traffic import letter

from workers.embedded import MODEL

pytestmark = pytest.mark.slow


async def test_a_model_provider_in_the_environment_answers(tmp_path: Path) -> None:
    """Events and questions reach the server with key and model; a 429 is waited out; nothing is marked as rehearsal.

    The agent's answers are streamed, which this server can't: after one try it is asked for them whole.
    """
    busy = chat_server.refused(429, "slow down", retry_after="1")
    hello = chat_server.said("Hello from a real server.")
    async with chat_server.serving(busy, hello) as server:
        variables = {
            "OPENAI_BASE_URL": server.url,
            "OPENAI_MODEL": "own-model-7b",
            "OPENAI_API_KEY": "sk-for-tests",
        }
        async with Stack(tmp_path, rehearse=False, variables=variables) as stack:
            assert stack.addresses.rehearsal is None
            await stack.send(letter("customer-07", "Good morning"))
            await stack.all_answered()
            (answer,) = stack.observer.answers
            asked = await perennial("ask", "customer-service/customer-07", "And again?", "--json", state=tmp_path)
            tally = await stack.tally()
            stack.kill(MODEL)  # its connections to the server end with it
    assert answer.reply.text == "Hello from a real server."
    assert (answer.reply.rehearsal, answer.reply.model) == (False, "real-1")
    assert (answer.reply.usage.input_tokens, answer.reply.usage.output_tokens) == (30, 4)
    assert tally.kept
    assert not tally.rehearsal
    assert asked.status == 0, asked.err
    assert asked.json["text"] == "Hello from a real server."
    assert not asked.json["rehearsal"]
    first, retried, whole, second = server.requests
    assert first == retried, "the same request, made again after Retry-After"
    assert [bool(request.get("stream")) for request in server.requests] == [True, True, False, False]
    assert whole["messages"] == first["messages"]
    assert {request["model"] for request in server.requests} == {"own-model-7b"}
    assert {headers["authorization"] for headers in server.headers} == {"bearer sk-for-tests"}
    assert "Hello from a real server." in str(second["messages"]), "the conversation so far is its context"
    assert "And again?" in str(second["messages"][-1])
