"""Threads of tools: one that hangs keeps nobody waiting, is counted, and at some point not called any more."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY
from pydantic_ai.tools import RunContext, Tool
from servers import eventually

from activities.threads import MOST_HUNG, HungError, Threads

_NOTHING = cast("RunContext[None]", None)
_variable: contextvars.ContextVar[str] = contextvars.ContextVar("test", default="nothing")


@pytest.fixture
def name() -> str:
    """A tool's name that nothing else is counted under."""
    return f"tool-{uuid4().hex}"


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What hung tools of the test wait for."""
    event = threading.Event()
    yield event
    event.set()


def hung(name: str) -> float:
    """How many hang, as the metric says."""
    return REGISTRY.get_sample_value("perennial_tool_hung_threads", {"tool": name}) or 0.0


async def call(threads: Threads, name: str, function: Callable[[], Any]) -> Any:
    with threads.calling(name):
        return await Tool(function, takes_ctx=False).function_schema.call({}, _NOTHING)


async def give_up(threads: Threads, name: str, release: threading.Event) -> None:
    """Call a tool that hangs, and cancel the call once it does."""
    begun = threading.Event()

    def hang() -> str:
        begun.set()
        release.wait()
        return "late"

    task = asyncio.create_task(call(threads, name, hang))
    await eventually(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_call_that_hangs_is_left_behind_and_told(
    name: str, release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """Who gives it up does not wait for it; the operator is told how many hang, until they return after all."""
    threads = Threads()
    with caplog.at_level(logging.WARNING):
        await give_up(threads, name, release)
        await give_up(threads, name, release)
    assert hung(name) == 2
    assert f"a call of {name} was given up and hangs; 2 calls of it hang" in caplog.text
    release.set()
    await eventually(lambda: hung(name) == 0)


async def test_a_tool_of_which_too_many_hang_is_not_called(name: str, release: threading.Event) -> None:
    """Bounded: threads are not piled up for ever; other tools go on, and this one does when it has come round."""
    threads = Threads()
    for _ in range(MOST_HUNG):
        await give_up(threads, name, release)
    with pytest.raises(HungError, match=f"{MOST_HUNG} calls of {name} hang on this worker"):
        await call(threads, name, lambda: "fine")
    assert await call(threads, f"another-{name}", lambda: "fine") == "fine"
    release.set()
    await eventually(lambda: hung(name) == 0)
    assert await call(threads, name, lambda: "fine") == "fine"


async def test_more_calls_than_any_pool_has_threads_run_side_by_side(name: str) -> None:
    """Each waits for all others: in a pool they would wait for ever."""
    together = threading.Barrier(100)
    async with asyncio.timeout(60):
        assert await asyncio.gather(*(call(Threads(), name, lambda: together.wait() >= 0) for _ in range(100)))
    assert hung(name) == 0


async def test_a_function_sees_the_variables_of_its_caller(name: str) -> None:
    """So tools know which call they serve."""
    _variable.set("something")
    assert await call(Threads(), name, lambda: f"{_variable.get()}") == "something"
    assert await call(Threads(), name, lambda: threading.current_thread().name) == f"tool {name}"
    assert await call(Threads(), name, lambda: threading.current_thread().daemon)


def stop_iteration() -> str:
    return next(iter(()))


def leave() -> str:
    sys.exit(3)


@pytest.mark.parametrize(
    ("function", "error"),
    [(stop_iteration, RuntimeError), (leave, SystemExit), (lambda: 1 / 0, ZeroDivisionError)],
)
async def test_whatever_a_function_raises_is_raised(
    name: str, function: Callable[[], Any], error: type[BaseException]
) -> None:
    """Also what a future would not take, or what would end the process where nobody catches it."""
    with pytest.raises(error):
        await call(Threads(), name, function)
    assert hung(name) == 0
