"""Repeats: a model that makes the same call again and again, though it has the same result each time. Pure.

After `MOST` times in as many steps it is not made again, and the model is told so; a call that came to something else
in between counts anew. A model that insists is not offered tools any more, so that it has to answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from pydantic import BaseModel

from workflows.messages import ToolCall, ToolResult

MOST = 3
"""So often the same call is made in steps that follow one another, while it has the same result."""


class Repeat(BaseModel):
    """A call of the step before."""

    call: str
    """Digest of its name and arguments."""
    result: str
    """Digest of what it came to."""
    times: int = 1
    """In how many steps in a row it was made, with this result."""
    refused: int = 0
    """In how many steps after these it was not made."""


def times(before: Sequence[Repeat], call: ToolCall) -> int:
    """How often the call was made, in the steps just before, with the same result."""
    return next((one.times for one in before if one.call == _call_digest(call)), 0)


def refusal(call: ToolCall) -> str:
    """What the model is told of a call that is not made again."""
    return (
        f"Not made: you have called {call.name} with these arguments {MOST} times in this turn, and the result was the "
        "same each time. Use that result, call something else, or answer."
    )


def noted(before: Sequence[Repeat], calls: Sequence[ToolCall], results: Sequence[ToolResult]) -> list[Repeat]:
    """The calls of a step, as the next one has to know them."""
    known = {one.call: one for one in before}
    after: dict[str, Repeat] = {}
    for call, result in zip(calls, results, strict=True):
        made, came_to = _call_digest(call), _digest(result.outcome, result.content)
        last = known.get(made)
        if last and result.content == refusal(call):
            after[made] = last.model_copy(update={"refused": last.refused + 1})
        elif last and last.result == came_to:
            after[made] = last.model_copy(update={"times": last.times + 1})
        else:
            after[made] = Repeat(call=made, result=came_to)
    return list(after.values())


def insists(before: Sequence[Repeat]) -> bool:
    """Whether the model goes on calling what it was told is not made again."""
    return any(one.refused >= MOST for one in before)


def _call_digest(call: ToolCall) -> str:
    try:
        arguments = json.dumps(json.loads(call.arguments), sort_keys=True)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return _digest(call.name, arguments)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
