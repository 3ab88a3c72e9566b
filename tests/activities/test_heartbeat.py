"""Heartbeats while an activity runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from temporalio.testing import ActivityEnvironment

from activities.heartbeat import beating


def environment(timeout: timedelta | None) -> tuple[ActivityEnvironment, asyncio.Queue[None]]:
    """An activity's surroundings, and where its heartbeats arrive."""
    surroundings = ActivityEnvironment()
    surroundings.info = replace(surroundings.info, heartbeat_timeout=timeout)
    beats: asyncio.Queue[None] = asyncio.Queue()
    surroundings.on_heartbeat = lambda *_: beats.put_nowait(None)
    return surroundings, beats


async def test_it_beats_for_as_long_as_the_body_runs() -> None:
    """Several beats come within one body, and none after it."""
    surroundings, beats = environment(timedelta(milliseconds=30))

    async def body() -> int:
        async with beating():
            for _ in range(4):
                await beats.get()
        return len(asyncio.all_tasks())

    before = len(asyncio.all_tasks())
    assert await surroundings.run(body) == before + 1  # the body's own task: the heart is gone
    assert beats.empty()


async def test_without_a_timeout_it_does_nothing() -> None:
    """No heart is started."""
    surroundings, beats = environment(None)

    async def body() -> int:
        async with beating():
            await asyncio.sleep(0)
            return len(asyncio.all_tasks())

    before = len(asyncio.all_tasks())
    assert await surroundings.run(body) == before + 1
    assert beats.empty()


async def test_an_error_of_the_body_comes_out_unchanged() -> None:
    """It is not wrapped, and the heart stops."""
    surroundings, _ = environment(timedelta(milliseconds=30))

    async def body() -> None:
        async with beating():
            raise ValueError("mine")

    before = len(asyncio.all_tasks())
    with pytest.raises(ValueError, match=r"^mine$"):
        await surroundings.run(body)
    assert len(asyncio.all_tasks()) == before


async def test_a_cancelled_body_is_cancelled() -> None:
    """The cancellation is not swallowed with that of the heart."""
    surroundings, beats = environment(timedelta(milliseconds=30))
    cleaned = False

    async def body() -> None:
        nonlocal cleaned
        try:
            async with beating():
                await asyncio.Event().wait()
        finally:
            cleaned = True

    before = len(asyncio.all_tasks())
    task = asyncio.create_task(surroundings.run(body))
    await beats.get()
    surroundings.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned
    assert len(asyncio.all_tasks()) == before
