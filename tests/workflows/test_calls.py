"""Calls that wait: what settles them, and what is said of one that is not open."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from workflows import names
from workflows.calls import CallError, StepCalls, settle
from workflows.messages import Settlement, ToolCall, Waits

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
CALL = ToolCall(id="c1", name="refund", arguments='{"amount_cents": 30000}')
KEY = "agent/store/desk/ada/1/1/0"


def decision(*, approved: bool | None = True, by: str = "ada") -> Settlement:
    waits_for = Waits.ANSWER if approved is None else Waits.APPROVAL
    return Settlement(call=KEY, waits_for=waits_for, approved=approved, by=by, why="fine", at=NOW)


def test_a_call_is_settled_once() -> None:
    """The same word again has no effect; another one is refused, and says what was decided, also long after."""
    calls = StepCalls(step=1, calls=[CALL])
    waiting = calls.wait(KEY, CALL, Waits.APPROVAL, NOW, timedelta(days=1))
    assert calls.open == [waiting]
    assert settle(calls, [], decision()) is waiting
    assert calls.open == []
    assert settle(calls, [], decision()) is None
    for step in (calls, None):
        with pytest.raises(
            CallError, match=r"is settled already: it was approved by ada at 2026-11-27 12:00:00: fine\."
        ) as refused:
            settle(step, [decision()], decision(approved=False))
        assert refused.value.kind == names.SETTLED
    assert settle(None, [decision()], decision()) is None


def test_a_call_that_waits_for_something_else_is_not_open_for_this() -> None:
    calls = StepCalls(step=1, calls=[CALL])
    calls.wait(KEY, CALL, Waits.APPROVAL, NOW, None)
    with pytest.raises(CallError, match="waits for an answer") as refused:
        settle(calls, [], decision(approved=None))
    assert refused.value.kind == names.NOT_OPEN
    with pytest.raises(CallError, match="waits for a decision"):
        settle(None, [], decision())


def test_when_it_wakes() -> None:
    """By the next reminder, or when it expires, whichever is first."""
    calls = StepCalls(step=1, calls=[CALL])
    waiting = calls.wait(KEY, CALL, Waits.APPROVAL, NOW, timedelta(hours=10))
    assert waiting.wakes(None) == NOW + timedelta(hours=10)
    assert waiting.wakes(timedelta(hours=4)) == NOW + timedelta(hours=4)
    waiting.reminded = 2
    assert waiting.wakes(timedelta(hours=4)) == NOW + timedelta(hours=10)
    waiting.expires = None
    assert waiting.wakes(None) is None


def test_long_arguments_are_shortened() -> None:
    calls = StepCalls(step=1, calls=[CALL])
    long = CALL.model_copy(update={"arguments": "x" * 5000})
    assert len(calls.wait(KEY, long, Waits.APPROVAL, NOW, None).report.arguments) == 1000
