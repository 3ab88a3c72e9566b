"""`Turns`: one turn of an agent. Take mail, think, call tools, think again, answer.

A turn may be spread over several runs of the workflow: all that it needs to go on is in `CurrentTurn`. Running agents
replay this code, as `workflows.agent` says.
"""

from __future__ import annotations

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names, repair, repeats
    from workflows.acting import Acting
    from workflows.attending import Attending
    from workflows.errors import failure_message
    from workflows.life import Life, count
    from workflows.messages import (
        CompactRequest,
        Decision,
        Reply,
        ThinkRequest,
        TurnOutcome,
        TurnSummary,
    )
    from workflows.over_budget import OverBudget, Parked
    from workflows.spec import ControlSpec
    from workflows.state import AgentState, CurrentTurn


_TOLD_AS = {
    TurnOutcome.COMPLETED: names.TURN_COMPLETED_TYPE,
    TurnOutcome.FAILED: names.TURN_FAILED_TYPE,
    TurnOutcome.CANCELLED: names.TURN_CANCELLED_TYPE,
}


class Turns:
    """The turns of one agent, one after another."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.budget = OverBudget(life)
        self._acting = Acting(life)
        self._attending = Attending(life)

    @property
    def _state(self) -> AgentState:
        return self._life.state

    async def take(self) -> None:
        """Take mail, think and act until there is an answer. A turn may be spread over several runs.

        In quiet hours none may begin.

        An agent that is asked to stop while its turn waits for the budget keeps the turn for later.
        """
        turn = self._state.current
        if turn is None:
            spec = await self._life.newest_spec()
            while self._life.rewinding.locked():
                await workflow.wait_condition(lambda: not self._life.rewinding.locked())
            await self._life.look_at_clock(spec)
            self._life.sort_mail()
            quiet = self._state.quiet_at(workflow.now())
            if quiet and not self._state.mailbox.is_ready(quiet):
                return
            turn = self._state.begin_turn(workflow.now(), spec.mailbox.events_per_turn)
        try:
            decision = await self._steps(turn)
        except Parked:
            return
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            decision = Decision(head=self._state.head or "", error=failure_message(error))
        self._end_turn(turn, decision)

    async def _steps(self, turn: CurrentTurn) -> Decision:
        spec = self._state.spec
        assert spec is not None, "a turn begins with its spec"
        compacted = False
        while True:
            self._life.show()
            if turn.acting:  # an earlier run has left it while calls waited
                self._state.record_tools(turn, await self._acting.act(spec, turn, turn.acting.calls))
                self._life.continue_as_new_if_due()
                continue
            self._attending.join(spec, turn)
            last = turn.step - turn.interruptions >= spec.budget.steps_per_turn or repeats.insists(turn.repeats)
            decision = await self._step(turn, spec, may_compact=spec.compact and not (last or compacted), last=last)
            compacted = decision.summed_up
            if decision.given_up:
                self._state.record_given_up(turn, decision)
                self.budget.go_on(turn)
                if turn.cancelled is not None:
                    return Decision(head=decision.head, error=turn.why_cancelled)
                self._life.continue_as_new_if_due()
                continue
            if decision.refused is not None:
                await self.budget.wait(turn, decision.refused)
                continue
            self.budget.go_on(turn)
            if compacted:
                self._note_summary(turn, decision)
                continue
            self._state.record_step(turn, decision)
            if repair.sent_back(spec, turn, decision):
                self._life.continue_as_new_if_due()
                continue
            if decision.error or last or not decision.tool_calls:
                return repair.settled(decision)
            self._state.record_tools(turn, await self._acting.act(spec, turn, decision.tool_calls))
            self._life.continue_as_new_if_due()

    async def _step(self, turn: CurrentTurn, spec: ControlSpec, *, may_compact: bool, last: bool) -> Decision:
        """Have the next step decided. In a turn that is cancelled, it is closed instead."""
        step = ThinkRequest(
            workflow_id=self._life.id,
            turn=turn.number,
            step=turn.step,
            head=self._state.head,
            spec_digest=spec.digest,
            events=turn.events,
            results=turn.results,
            tools_allowed=not last,
            may_compact=may_compact,
            repair=turn.repair,
            limits=turn.limits,
        )
        if turn.cancelled is not None:
            return await self._attending.close(spec, turn, step)
        call = workflow.start_activity_method(
            interface.ModelActivities.think,
            step,
            task_queue=names.model_queue(workflow.info().task_queue),
            summary=_think_summary(turn),
            **interface.THINK,
        )
        decision = await self._attending.answer(spec, turn, step, call)
        return await self._compact(turn, spec, step) if decision.compact else decision

    async def _compact(self, turn: CurrentTurn, spec: ControlSpec, step: ThinkRequest) -> Decision:
        """Have the conversation summed up. If the model would not, the turn goes on with what of it still fits."""
        assert self._state.head is not None, "where there is something to sum up, there is an entry"
        call = workflow.start_activity_method(
            interface.ModelActivities.compact,
            CompactRequest(
                workflow_id=self._life.id,
                turn=turn.number,
                step=turn.step,
                head=self._state.head,
                spec_digest=spec.digest,
                limits=turn.limits,
            ),
            task_queue=names.model_queue(workflow.info().task_queue),
            summary=f"turn {turn.number}, step {turn.step}: sum up the conversation",
            **interface.THINK,
        )
        decision = await self._attending.answer(spec, turn, step, call)
        if decision.given_up or decision.refused is not None:
            return decision
        return decision.model_copy(update={"summed_up": True})

    def _note_summary(self, turn: CurrentTurn, decision: Decision) -> None:
        self._state.record_call(turn, decision)
        how = f"could not be summed up: {decision.error}" if decision.error else "summed up"
        self._state.note(workflow.now(), f"the conversation {how}")

    def _end_turn(self, turn: CurrentTurn, decision: Decision) -> None:
        failed = decision.error is not None
        outcome = TurnOutcome.FAILED if failed else TurnOutcome.COMPLETED
        if failed and turn.cancelled is not None:
            outcome = TurnOutcome.CANCELLED
        reply = Reply(
            id=names.reply_id(self._life.id, turn.number, 0),
            workflow_id=self._life.id,
            turn=turn.number,
            text=decision.text,
            data=decision.data,
            outcome=outcome,
            error=decision.error,
            answers=turn.answers,
            usage=turn.usage,
            cost=turn.cost,
            steps=turn.step - 1 - turn.interruptions,
            tool_calls=turn.tool_calls,
            model=decision.model,
            rehearsal=decision.rehearsal,
            entry=decision.head or None,
        )
        self._state.end_turn(workflow.now(), reply)
        self._state.occurrences += [
            answered.id
            for answered in turn.answers
            if names.is_occurrence_for(self._life.id, answered.source, answered.id)
        ]
        for reference in turn.answers:
            digest = reference.digest
            if digest in self._life.asking:
                self._life.replies[digest] = reply
        summary = TurnSummary(
            agent=self._life.address.agent,
            turn=turn.number,
            outcome=outcome,
            seconds=(workflow.now() - turn.started).total_seconds(),
            events=len(turn.answers),
            steps=reply.steps,
            tool_calls=turn.tool_calls,
            usage=turn.usage,
            error=decision.error,
            cost=turn.cost,
            not_repeated=turn.not_repeated,
        )
        self._state.outbox.append(self._life.reply_event(reply))
        self._life.say(_TOLD_AS[outcome], "turn", summary.model_dump(mode="json"))


def _think_summary(turn: CurrentTurn) -> str:
    if turn.repair:
        return f"turn {turn.number}, step {turn.step}: repair of the answer"
    new = count(len(turn.events), "event") if turn.events else count(len(turn.results), "tool result")
    return f"turn {turn.number}, step {turn.step}: {new}"
