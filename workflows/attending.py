"""`Attending`: a turn in progress has an ear for the mail: what may join it does, and what may interrupt it does that.

A model call that is given up is cancelled, and its step is closed in the ledger: so nobody records an answer to it
later, and an answer that was recorded just before counts. Running agents replay this code, as `workflows.agent` says.
"""

from __future__ import annotations

import asyncio

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names
    from workflows.events import Event
    from workflows.life import Life
    from workflows.messages import CloseRequest, Decision, Interrupted, ThinkRequest
    from workflows.spec import ControlSpec
    from workflows.state import CurrentTurn
    from workflows.steering import MOST_EVENTS, MOST_INTERRUPTIONS, Effect, effect


class Attending:
    """What becomes of mail that comes while an agent is in a turn."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def join(self, spec: ControlSpec, turn: CurrentTurn) -> None:
        """Let the mail that may join the turn do so, for its next model call."""
        if self._is_addressed(spec):
            self._life.sort_mail()
        if turn.step == 1 and turn.refused is None:
            return  # it has just taken its mail
        mailbox = self._life.state.mailbox
        joining = mailbox.join(
            turn.number,
            lambda event: effect(spec.mailbox.during_turn, event) in {Effect.MERGE, Effect.INTERRUPT},
            self._room(spec, turn),
        )
        self._life.state.join(workflow.now(), turn, joining)

    async def answer(
        self, spec: ControlSpec, turn: CurrentTurn, step: ThinkRequest, call: workflow.ActivityHandle[Decision]
    ) -> Decision:
        """What is decided in a model call; if that is given up for what comes meanwhile, `Decision.given_up`.

        Args:
            spec: the turn's.
            turn: the turn.
            step: what is new in the step.
            call: the call, which has begun; what it decides is recorded under the step's number.
        """
        is_given_up = False
        try:
            while not call.done():
                await workflow.wait_condition(
                    lambda: call.done() or turn.cancelled is not None or self._is_addressed(spec)
                )
                if self._is_addressed(spec):
                    self._life.sort_mail()
                is_given_up = not call.done() and (turn.cancelled is not None or bool(self._interrupting(spec, turn)))
                if is_given_up:
                    call.cancel()
                    break
        except asyncio.CancelledError:  # the agent itself is cancelled, and its call with it
            call.cancel()
        try:
            return await call
        except (ActivityError, asyncio.CancelledError) as error:
            if not (is_given_up and is_cancelled_exception(error)):
                raise
        return await self.close(spec, turn, step)

    async def close(self, spec: ControlSpec, turn: CurrentTurn, step: ThinkRequest) -> Decision:
        """Close a step without an answer; if one was recorded before, that is what comes back."""
        interrupting = self._interrupting(spec, turn)
        why = turn.why_cancelled or f"A new event came: {', '.join(sorted({event.type for event in interrupting}))}"
        decision = await workflow.execute_activity_method(
            interface.LedgerActivities.close_step,
            CloseRequest(step=step, why=why, cancelled=turn.cancelled is not None),
            summary=f"turn {turn.number}, step {turn.step}: {'cancelled' if turn.cancelled else 'interrupted'}",
            **interface.LEDGER,
        )
        if decision.given_up and turn.cancelled is None:
            self._life.state.note(workflow.now(), f"turn {turn.number}, step {turn.step} interrupted: {why}")
            references = [event.reference for event in interrupting]
            told = Interrupted(turn=turn.number, step=turn.step, events=references)
            self._life.say(names.TURN_INTERRUPTED_TYPE, f"interrupted-{turn.step}", told.model_dump(mode="json"))
        return decision

    def _is_addressed(self, spec: ControlSpec) -> bool:
        """Whether mail has come that may be about the turn in progress."""
        inbox = self._life.inbox
        return bool(inbox) and (bool(spec.mailbox.during_turn) or any(one.type == names.STEER_TYPE for one in inbox))

    def _interrupting(self, spec: ControlSpec, turn: CurrentTurn) -> list[Event]:
        """The mail that would join the turn at once, if its model call were given up now."""
        if turn.interruptions >= MOST_INTERRUPTIONS:
            return []
        return self._life.state.mailbox.joining(
            lambda event: effect(spec.mailbox.during_turn, event) is Effect.INTERRUPT, self._room(spec, turn)
        )

    @staticmethod
    def _room(spec: ControlSpec, turn: CurrentTurn) -> int:
        """How many events may join the turn in its next step."""
        return max(min(spec.mailbox.events_per_turn, MOST_EVENTS - len(turn.answers)), 0)
