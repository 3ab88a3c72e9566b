"""What a new event does to the turn in progress: `effect` decides by the spec's rules. Pure.

    mailbox:                                  # in a spec
      during_turn:                            # the first that fits an event's type; none: queue
        - {types: [store.order.cancelled], then: interrupt}
        - {types: [store.customer.*], then: merge}
        - {types: [store.stock.counted], then: reject}

A person's word (`perennial steer`) is an event too: it joins the turn, or interrupts it, whatever the rules say.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from fnmatch import fnmatchcase

from pydantic import BaseModel, ConfigDict, Field

from workflows import names
from workflows.events import Event

MOST_INTERRUPTIONS = 10
"""In one turn; from then on what would interrupt it joins its next step, so that a stream of events can't starve it."""
MOST_EVENTS = 200
"""How many events one turn answers, at most; what would join it after that waits for the next."""

_KEEPS_ORDER = (names.HOLD_TYPE, names.RELEASE_TYPE)


class Effect(StrEnum):
    """What becomes of an event that arrives while a turn is in progress."""

    QUEUE = "queue"
    """It waits for a later turn."""
    MERGE = "merge"
    """It joins the next step of this turn, if there is one; else it waits."""
    INTERRUPT = "interrupt"
    """The model call in progress is cancelled, and made again with the event; otherwise as `merge`."""
    REJECT = "reject"
    """It is not taken, and that is told."""


class TurnRule(BaseModel):
    """What events of these types do to a turn in progress."""

    # Unknown fields are ignored: agents carry these (DESIGN.md, "Contracts"). In a spec they are an error.
    model_config = ConfigDict(frozen=True)

    types: list[str] = Field(min_length=1)
    """CloudEvents types; `*` stands for any text."""
    then: Effect


def effect(rules: Sequence[TurnRule], event: Event) -> Effect:
    """What this event does to a turn in progress."""
    if event.type in _KEEPS_ORDER:
        return Effect.QUEUE
    if event.type == names.STEER_TYPE:
        urgent = isinstance(event.data, dict) and event.data.get("interrupt") is True
        return Effect.INTERRUPT if urgent else Effect.MERGE
    fitting = (rule.then for rule in rules if any(fnmatchcase(event.type, pattern) for pattern in rule.types))
    return next(fitting, Effect.QUEUE)
