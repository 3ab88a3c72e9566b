"""Heartbeats: Temporal hears of an activity for as long as its body runs.

    async with beating():
        answer = await something_slow()

Heartbeats are also how a cancelled activity learns of it: without them, a stopped agent's model call would go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from temporalio import activity

_BEATS_PER_TIMEOUT = 3  # two may be late or lost before Temporal takes the activity for dead


@asynccontextmanager
async def beating() -> AsyncIterator[None]:
    """Heartbeat while the body runs, three times per heartbeat timeout; without such a timeout, do nothing.

    The body must leave the event loop free: what blocks it stops the heart too, as it should.

    Raises:
        RuntimeError: not called from within an activity.
    """
    timeout = activity.info().heartbeat_timeout
    if not timeout:
        yield
        return
    heart = asyncio.create_task(_beat(timeout.total_seconds() / _BEATS_PER_TIMEOUT))
    try:
        yield
    finally:
        heart.cancel()
        await asyncio.wait([heart])  # unlike `await heart`, it can't take our own cancellation for the heart's


async def _beat(seconds: float) -> None:
    while True:
        activity.heartbeat()
        await asyncio.sleep(seconds)
