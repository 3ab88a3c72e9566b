"""Stream: what a model says, as it says it, for `agents.stream`. Best effort: nothing here fails or slows a model call.

    with Telling(put, workflow_id, turn=3, step=1, attempt=2, answers=[...]) as told:
        told.begin()                        # a request is made: what was told of this step before is void
        told.text("It is on ")              # told together, about ten times a second
        told.tool_call("look_up_order")
        told.finish("It is on its way.")    # the answer as recorded; if it was told otherwise, it is told again

On the wire each part is a CloudEvent `perennial.stream.v1` whose data is a `Delta`. Whoever reads goes by (turn, step,
attempt, sequence), which only grows: a `start` begins the text anew, what is smaller than what was seen is dropped. So
a call that is made again, by another worker after a death or by another pool, shows as a restart, never as mixed text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Self

from activities.conversation import storable
from workflows import names
from workflows.events import EventReference, Outgoing
from workflows.messages import Delta, DeltaKind

_TOGETHER_SECONDS = 0.1
_TOGETHER_BYTES = 1024

Put = Callable[[Outgoing], None]
"""Takes a part to be sent, at once and without an error; it may be dropped."""


class Telling:
    """Tells of one step what its model says.

    Args:
        put: takes what is to be sent.
        workflow_id: the agent.
        turn: of the step.
        step: its number.
        attempt: which try of the activity this is, from 1.
        answers: the events that are new in the step.
    """

    def __init__(  # noqa: PLR0913  # what a step is told apart by
        self, put: Put, workflow_id: str, *, turn: int, step: int, attempt: int, answers: Sequence[EventReference]
    ) -> None:
        self._put = put
        self._agent = workflow_id
        self._address = names.parse_workflow_id(workflow_id)
        self._place = {"turn": turn, "step": step, "attempt": attempt}
        self._answers = list(answers)
        self._sequence = 0
        self._waiting = ""
        self._told: list[str] | None = None
        """What was told since the last start; None: there was none."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A request is made: the text begins anew."""
        self._forget()
        self._told = []
        self._tell(DeltaKind.START, answers=self._answers)

    def text(self, text: str) -> None:
        """The model has said more."""
        self._waiting += text
        if len(self._waiting.encode(errors="replace")) >= _TOGETHER_BYTES:
            self._flush()
        elif self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TOGETHER_SECONDS, self._flush)

    def tool_call(self, name: str) -> None:
        """The model begins to call a tool."""
        self._flush()
        self._tell(DeltaKind.TOOL_CALL, storable(name))

    def finish(self, text: str) -> None:
        """The step is recorded with this text: told again if it was not told so."""
        self._flush()
        if self._told is None or "".join(self._told) != text:
            self.begin()
            for start in range(0, len(text), _TOGETHER_BYTES):
                self._say(text[start : start + _TOGETHER_BYTES])
        self._tell(DeltaKind.END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()  # of a call that has failed: what it said is void

    def _flush(self) -> None:
        text = self._waiting
        self._forget()
        if text:
            self._say(storable(text))

    def _say(self, text: str) -> None:
        if self._told is not None:
            self._told.append(text)
        self._tell(DeltaKind.TEXT, text)

    def _forget(self) -> None:
        self._waiting = ""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self, kind: DeltaKind, text: str = "", answers: Sequence[EventReference] = ()) -> None:
        delta = Delta(**self._place, sequence=self._sequence, kind=kind, text=text, answers=list(answers))
        self._sequence += 1
        self._put(
            Outgoing(
                topic=names.STREAM_TOPIC,
                id=names.delta_id(self._agent, *delta.place),
                type=names.STREAM_TYPE,
                source=self._agent,
                subject=self._address.key,
                time=datetime.now(UTC),
                extensions={"tenant": self._address.tenant, "agent": self._address.agent},
                data=delta.model_dump(mode="json", exclude_defaults=True),
            )
        )
