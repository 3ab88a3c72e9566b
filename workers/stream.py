"""An answer as it comes: the parts of it that count, of all that `agents.stream` brings.

    follower = Follower(workflow_id, event_digest(source, question_id))
    delta = follower.take(event)            # None: of something else, or void by now
    follower.restarted, follower.text       # does it begin again? what was said since it began

`follow` does that with what comes from Kafka. What a call said that died is void: the call that is made in its place
says it anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from pydantic import ValidationError

from workers import topics
from workers.exits import CommandError
from workers.settings import Settings
from workflows import names
from workflows.events import Event
from workflows.messages import Delta, DeltaKind, Reply

_READY_SECONDS = 10.0
_LATE_SECONDS = 2.0
"""How long the last parts may come after the reply."""


class Follower:
    """Follows the answer to one question, through all steps of the turn that takes it.

    Args:
        workflow_id: the agent.
        question: the digest of the event that the question is.
    """

    def __init__(self, workflow_id: str, question: str) -> None:
        self._agent = workflow_id
        self._question = question
        self._last: Delta | None = None
        self.text = ""
        """What was said since the last start."""
        self.restarted = False
        """Whether the part that was taken last begins a step again of which something was said already."""

    def take(self, event: Event) -> Delta | None:
        """The part that this event is; None if it is of something else, or void."""
        if event.type != names.STREAM_TYPE or event.source != self._agent:
            return None
        try:
            delta = Delta.model_validate(event.data)
        except ValidationError:
            return None  # of a later release
        last = self._last
        if last is None:
            if delta.kind is not DeltaKind.START or self._question not in {one.digest for one in delta.answers}:
                return None
        elif delta.turn != last.turn or delta.place <= last.place:
            return None
        # The start itself may have been lost on the way.
        begins = delta.kind is DeltaKind.START or last is None or delta.place[:3] != last.place[:3]
        self.restarted = begins and bool(self.text) and last is not None and delta.step == last.step
        if begins:
            self.text = ""
        if delta.kind is DeltaKind.TEXT:
            self.text += delta.text
        self._last = delta
        return delta

    def ended(self, reply: Reply) -> bool:
        """Whether all of this reply has come."""
        last = self._last
        return last is not None and last.kind is DeltaKind.END and (last.turn, last.step) == (reply.turn, reply.steps)


class Following:
    """An answer that is followed."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self._came = asyncio.Event()

    def heard(self) -> None:
        """Something has come."""
        self._came.set()

    async def rest(self, reply: Reply) -> None:
        """Wait for what is on its way still, when the reply is there; not long, for it may have been dropped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LATE_SECONDS):
                while not self.follower.ended(reply):
                    self._came.clear()
                    await self._came.wait()


@contextlib.asynccontextmanager
async def follow(
    settings: Settings, follower: Follower, on_delta: Callable[[Delta], None], on_fault: Callable[[str], None]
) -> AsyncIterator[Following]:
    """While an answer is followed: whatever is said from now on is heard.

    Args:
        settings: where Kafka is.
        follower: of the answer.
        on_delta: told of each part that counts.
        on_fault: told why nothing more comes, if Kafka is away; the answer itself does not need it.
    """
    following, ready = Following(follower), asyncio.Event()

    async def listen() -> None:
        try:
            watching = topics.watch(settings, [names.STREAM_TOPIC], on_ready=ready.set)
            async with contextlib.aclosing(watching) as events:
                async for event in events:
                    if delta := follower.take(event):
                        on_delta(delta)
                        following.heard()
        except CommandError as error:
            on_fault(f"The answer can't be shown as it comes: {error}")
            ready.set()

    listening = asyncio.create_task(listen())
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_SECONDS):
                await ready.wait()
        yield following
    finally:
        listening.cancel()
        await asyncio.wait([listening])
