"""Repair: what becomes of an answer that does not fit its schema, or is empty. Pure.

It is sent back to the model as often as the spec says (`reply.repairs`; an empty one once), within the steps that the
turn may take; each time is a step of its own, whose only news is what was wrong. Then the turn fails.
"""

from __future__ import annotations

from collections.abc import Sequence

from workflows.messages import Decision
from workflows.spec import ControlSpec
from workflows.state import CurrentTurn

WRONG = "(Your answer was not sent: it is not what was asked for.)"
"""How every message begins that sends an answer back; what reads transcripts knows it by that."""
SAY_SOMETHING = f"{WRONG}\nIt was empty: no text and no tool call. Answer in words, be it that there is nothing to do."
"""What the model is told of an empty answer."""
NOTHING = "the model has answered with nothing: no text and no tool call"
"""Why a turn whose answer stayed empty has none."""
_EMPTY = 1  # so often in a turn a model that says nothing is asked again


def sent_back(spec: ControlSpec, turn: CurrentTurn, decision: Decision) -> bool:
    """Whether the answer is sent back; then the turn's next step says what is wrong with it."""
    steps_left = spec.budget.steps_per_turn - (turn.step - turn.interruptions) + 1
    if decision.empty and turn.empty < _EMPTY and steps_left > 0:
        turn.empty += 1
        turn.repair = SAY_SOMETHING
        return True
    if not decision.faults or turn.repairs >= spec.repairs or steps_left <= 0:
        return False
    turn.repairs += 1
    turn.repair = message(decision.faults)
    return True


def settled(decision: Decision) -> Decision:
    """The decision that a turn ends with: an answer that does not fit is none."""
    if decision.empty:
        return decision.model_copy(update={"error": NOTHING})
    return decision.model_copy(update={"text": "", "error": failure(decision.faults)}) if decision.faults else decision


def message(faults: Sequence[str]) -> str:
    """What the model is told of a wrong answer."""
    lines = "\n".join(f"- {fault}" for fault in faults)
    return f"{WRONG}\n{lines}\nAnswer again, with the JSON alone: no words around it."


def failure(faults: Sequence[str]) -> str:
    """Why a turn whose answer stayed wrong has none."""
    return f"the answer does not fit the agent's reply schema: {'; '.join(faults)}"
