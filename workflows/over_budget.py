"""`OverBudget`: a turn that may not go on, since its next model call might break a limit of the budget.

It waits where it is: until the limit's window ends, until somebody allows more, or until its spec does, which is looked
up now and then. Then the same step is made again. Mail is taken in meanwhile, and waits behind it. Running agents
replay this code, as `workflows.agent` says.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names
    from workflows.budget import Lifted, LiftRecord, LiftRequest, Refusal, amount
    from workflows.budget import Measure as Of
    from workflows.life import STATE_ATTRIBUTE, Life
    from workflows.messages import Intervention
    from workflows.state import CurrentTurn

_LOOKS_AGAIN = timedelta(hours=1)  # a limit may have been raised in the spec, or another agent may have spent less
_LEAST_WAIT = timedelta(seconds=1)  # a clock that is slow must not have us ask without an end


class Parked(Exception):  # noqa: N818  # it is no error
    """The agent was asked to stop: its turn is kept as it is, and goes on when the agent is woken."""


class OverBudget:
    """How an agent waits for its budget, and is allowed more."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._asked_to_look = False
        self._shown = False

    def look_again(self) -> None:
        """Make the step that waits again, soon."""
        self._asked_to_look = True

    async def wait(self, turn: CurrentTurn, refused: Refusal) -> None:
        """Tell the operator, and wait until it is worth trying again.

        Raises:
            Parked: the agent was asked to stop.
        """
        told = refused.is_of_the_same_limit(turn.refused)
        turn.refused = refused
        if not told:
            self._tell(turn, refused)
        if not self._shown:
            self._show_state(names.OVER_BUDGET)
        ends = workflow.now() + _LOOKS_AGAIN
        if refused.until is not None:
            ends = min(ends, max(refused.until, workflow.now() + _LEAST_WAIT))
        while not self._asked_to_look and workflow.now() < ends:
            self._life.sort_mail()
            self._life.show()
            if self._life.state.outbox:
                await self._life.publish()
                continue
            if self._life.state.stopping is not None and self._life.state.fits:
                raise Parked
            self._life.continue_as_new_if_due()
            known = self._life.state.stopping
            try:
                await workflow.wait_condition(
                    partial(self._has_something_to_do, known),
                    timeout=ends - workflow.now(),
                    timeout_summary=f"over budget: {refused.scope.value} per {refused.per.value}",
                )
            except TimeoutError:
                break
        self._asked_to_look = False
        # A turn need not wait for a limit that is no more.
        turn.limits = (await self._life.offered_spec()).budget.limits

    def go_on(self, turn: CurrentTurn) -> None:
        """Note that the step was made, if it had waited."""
        self._asked_to_look = False
        if turn.refused is not None:
            turn.refused = None
            self._show_state("paused" if self._life.state.paused else "active")

    def _has_something_to_do(self, stopping: Intervention | None) -> bool:
        state = self._life.state
        return self._asked_to_look or bool(self._life.inbox or state.outbox) or state.stopping != stopping

    async def lift(self, request: LiftRequest) -> Lifted:
        """Allow more than a limit until its window ends; the turn that waits for it goes on.

        Raises:
            ApplicationError: it is not said which limit, or how much more.
        """
        record = self._record(request)
        try:
            lifted = await workflow.execute_activity_method(
                interface.BudgetActivities.record_lift,
                record,
                summary=f"lift {record.scope.value} per {record.per.value}",
                **interface.LEDGER,
            )
        except ActivityError as error:
            if is_cancelled_exception(error) or not isinstance(error.cause, ApplicationError):
                raise
            raise ApplicationError(error.cause.message, type=error.cause.type) from error
        what = ", ".join(amount(number, of) for of in Of if (number := record.request.allows.of(of)))
        why = f": {lifted.reason}" if lifted.reason else ""
        self._life.state.note(workflow.now(), f"allowed {what} more by {lifted.by or 'somebody'}{why}")
        self._life.say(names.BUDGET_LIFTED_TYPE, f"lifted-{lifted.id}", lifted.model_dump(mode="json"))
        self.look_again()
        return lifted

    def _record(self, request: LiftRequest) -> LiftRecord:
        turn = self._life.state.current
        refused = turn.refused if turn else None
        scope = request.scope or (refused.scope if refused else None)
        per = request.per or (refused.per if refused else None)
        if scope is None or per is None:
            raise ApplicationError(
                "The agent waits for no limit of its budget; say which one to lift: its scope, and per what.",
                type=names.REFUSED,
            )
        if not any(request.allows.of(of) for of in Of):
            raise ApplicationError("Say how much more to allow: tokens, dollars or turns.", type=names.REFUSED)
        named = request if request.id else request.model_copy(update={"id": str(workflow.uuid4())})
        return LiftRecord(workflow_id=self._life.id, turn=self._life.state.turn, scope=scope, per=per, request=named)

    def _tell(self, turn: CurrentTurn, refused: Refusal) -> None:
        self._life.state.note(workflow.now(), f"over budget: {refused}")
        window = refused.until.date().isoformat() if refused.until else "ever"
        what = f"budget-{turn.step}-{refused.scope.value}-{refused.per.value}-{refused.measure.value}-{window}"
        data = {**refused.model_dump(mode="json"), "step": turn.step, "message": str(refused)}
        self._life.say(names.BUDGET_EXCEEDED_TYPE, what, data)

    def _show_state(self, word: str) -> None:
        self._shown = word == names.OVER_BUDGET
        workflow.upsert_search_attributes([STATE_ATTRIBUTE.value_set(word)])
