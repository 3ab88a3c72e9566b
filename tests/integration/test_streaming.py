"""Issue 4, point 10, on the real stack: answers as they come, and what is seen when the model worker dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from servers import eventually
from stack import PERENNIAL, ROOT, Finished, Stack, environment, perennial
from traffic import workflow_of

from workers.embedded import MODEL
from workers.topics import watch
from workflows import names
from workflows.messages import Delta, DeltaKind

_SPECS = {
    "talker": "name: customer-service\ntenant: store\ninstructions: You talk.\nstream: true\n",
    "silent": "name: security\ntenant: store\ninstructions: You watch.\n",
}
WORDS = " ".join(f"word{number}" for number in range(60))

pytestmark = pytest.mark.slow


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("streaming")
    specs = folder / "specs"
    specs.mkdir()
    for name, text in _SPECS.items():
        (specs / f"{name}.yaml").write_text(text)
    async with Stack(folder / "state", specs=specs) as running:
        yield running


@contextlib.asynccontextmanager
async def watched(stack: Stack, key: str) -> AsyncIterator[list[Delta]]:
    """All that is told of the agent with this key, from now on."""
    heard: list[Delta] = []
    ready = asyncio.Event()

    async def listen() -> None:
        settings = stack.settings.model_copy(update={"kafka_bootstrap": stack.addresses.kafka})
        events = watch(settings, [names.STREAM_TOPIC], on_ready=ready.set)
        async for event in events:
            heard.extend([Delta.model_validate(event.data)] if event.source == workflow_of(key) else [])

    listening = asyncio.create_task(listen())
    try:
        await ready.wait()
        yield heard
    finally:
        listening.cancel()
        await asyncio.wait([listening])


async def ended(heard: list[Delta]) -> None:
    """Wait for the end of an answer."""
    await eventually(lambda: bool(heard) and heard[-1].kind is DeltaKind.END, 60)


def lines(finished: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for line in finished.out.splitlines()]


async def test_what_is_told_is_the_reply(stack: Stack) -> None:
    """In several parts, in order; the command prints them as lines of JSON, and the reply last."""
    async with watched(stack, "room-1") as heard:
        asked = await perennial(
            *("ask", "store/customer-service/room-1", f"[[latency 1.5]] [[say {WORDS}]]", "--stream", "--json"),
            state=stack.settings.state_dir,
        )
        assert asked.status == 0, asked.err
        await ended(heard)
    *parts, reply = lines(asked)
    assert [Delta.model_validate(part) for part in parts] == heard
    assert reply["text"] == WORDS
    assert "".join(delta.text for delta in heard if delta.kind is DeltaKind.TEXT) == WORDS
    assert len(heard) > 4, "as it came, not all at once"
    assert [delta.sequence for delta in heard] == [*range(len(heard))]
    assert {delta.attempt for delta in heard} == {1}


async def test_people_see_the_answer_as_it_comes(stack: Stack) -> None:
    """Text on standard output, once; what else happens on standard error."""
    state = stack.settings.state_dir
    asked = await perennial("ask", "store/customer-service/room-2", f"[[say {WORDS}]]", "--stream", state=state)
    assert (asked.status, asked.out) == (0, f"{WORDS}\n"), asked.err
    assert "turn 1 · 1 step" in asked.err


async def test_a_model_worker_killed_in_mid_stream_is_a_restart(stack: Stack) -> None:
    """P6: a second attempt that begins anew and ends with the right text; the command says so and prints it anew."""
    async with watched(stack, "room-3") as heard:
        asking = await asyncio.create_subprocess_exec(
            *(str(PERENNIAL), "ask", "store/customer-service/room-3", f"[[latency 4]] [[say {WORDS}]]", "--stream"),
            cwd=ROOT,
            env=environment({"PERENNIAL_STATE_DIR": str(stack.settings.state_dir)}),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert asking.stdout is not None
            await eventually(lambda: sum(len(delta.text) for delta in heard) > 40, 60)
            printed = await asking.stdout.read(10)  # it stands there before the answer is over
            stack.kill(MODEL)
            out, err = await asyncio.wait_for(asking.communicate(), 90)
        finally:
            if asking.returncode is None:
                asking.kill()
                await asking.wait()
        await ended(heard)
    assert asking.returncode == 0, err
    first, second = ([delta for delta in heard if delta.attempt == attempt] for attempt in (1, 2))
    assert first
    assert heard == first + second, "nothing of the first attempt comes after the second has begun"
    assert [delta.kind for delta in second if delta.kind is not DeltaKind.TEXT] == [DeltaKind.START, DeltaKind.END]
    assert "".join(delta.text for delta in second) == WORDS
    half, whole = (printed + out).decode().splitlines()
    assert whole == WORDS
    assert WORDS.startswith(half)
    assert half != WORDS
    assert "the answer begins again" in err.decode()
    calls = await stack.calls()
    (call,) = [counted for key, counted in calls.items() if workflow_of("room-3") in key]
    assert call.answered == 1, "paid once"


async def test_an_agent_that_is_not_streamed_answers_as_ever(stack: Stack) -> None:
    """`--stream` asks for nothing that the spec does not say; the reply comes whole."""
    state = stack.settings.state_dir
    asked = await perennial("ask", "store/security/room-4", "[[say Yes.]]", "--stream", "--json", state=state)
    assert asked.status == 0, asked.err
    (reply,) = lines(asked)
    assert reply["text"] == "Yes."
