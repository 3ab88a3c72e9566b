"""`Turns`: one turn of an agent. Take mail, think, call tools, think again, answer.

A turn may be spread over several runs of the workflow: all that it needs to go on is in `CurrentTurn`. Running agents
replay this code, as `workflows.agent` says.
"""

from __future__ import annotations

import asyncio

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception
from temporalio.exceptions import TimeoutError as ActivityTimeoutError

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names, repair
    from workflows.errors import NOT_RUN, failure_message
    from workflows.life import Life, count
    from workflows.messages import (
        CompactRequest,
        Decision,
        Reply,
        ThinkRequest,
        ToolCall,
        ToolOutcome,
        ToolRequest,
        ToolResult,
        TurnOutcome,
        TurnSummary,
    )
    from workflows.over_budget import OverBudget, Parked
    from workflows.spec import ControlSpec
    from workflows.state import AgentState, CurrentTurn, result_bytes

_CALLS_PER_STEP = 64


class Turns:
    """The turns of one agent, one after another."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.budget = OverBudget(life)

    @property
    def _state(self) -> AgentState:
        return self._life.state

    async def take(self) -> None:
        """Take mail, think and act until there is an answer. A turn may be spread over several runs.

        An agent that is asked to stop while its turn waits for the budget keeps the turn for later.
        """
        turn = self._state.current
        if turn is None:
            spec = await self._life.newest_spec()
            while self._life.rewinding.locked():
                await workflow.wait_condition(lambda: not self._life.rewinding.locked())
            self._life.sort_mail()
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
            last = turn.step >= spec.budget.steps_per_turn
            decision = await workflow.execute_activity_method(
                interface.ModelActivities.think,
                ThinkRequest(
                    workflow_id=self._life.id,
                    turn=turn.number,
                    step=turn.step,
                    head=self._state.head,
                    spec_digest=spec.digest,
                    events=turn.events,
                    results=turn.results,
                    tools_allowed=not last,
                    may_compact=spec.compact and not (last or compacted),
                    repair=turn.repair,
                    limits=turn.limits,
                ),
                task_queue=names.model_queue(workflow.info().task_queue),
                summary=_think_summary(turn),
                **interface.THINK,
            )
            compacted = decision.compact
            if compacted:
                decision = await self._compact(turn, spec)
            if decision.refused is not None:
                compacted = False
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
            step = turn.step - 1
            wanted, surplus = decision.tool_calls[:_CALLS_PER_STEP], decision.tool_calls[_CALLS_PER_STEP:]
            room = result_bytes(len(wanted))
            calls = (self._run_tool(spec, turn, step, n, call, room) for n, call in enumerate(wanted))
            results = list(await asyncio.gather(*calls))
            too_many = f"Not run: a step may call {_CALLS_PER_STEP} tools. Call it again in the next one."
            results += [_result(call, ToolOutcome.ERROR, too_many) for call in surplus]
            self._state.record_tools(turn, results)
            self._life.continue_as_new_if_due()

    async def _compact(self, turn: CurrentTurn, spec: ControlSpec) -> Decision:
        """Have the conversation summed up. If the model would not, the turn goes on with what of it still fits."""
        assert self._state.head is not None, "where there is something to sum up, there is an entry"
        return await workflow.execute_activity_method(
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

    def _note_summary(self, turn: CurrentTurn, decision: Decision) -> None:
        self._state.record_call(turn, decision)
        how = f"could not be summed up: {decision.error}" if decision.error else "summed up"
        self._state.note(workflow.now(), f"the conversation {how}")

    async def _run_tool(  # noqa: PLR0913, PLR0917  # what a call is told apart by
        self, spec: ControlSpec, turn: CurrentTurn, step: int, number: int, call: ToolCall, room: int
    ) -> ToolResult:
        tool = spec.tools.get(call.name)
        if tool is None:
            offered = ", ".join(spec.tools) or "none"
            return _result(call, ToolOutcome.ERROR, f"There is no tool {call.name!r}. Tools you may call: {offered}.")
        try:
            return await workflow.execute_activity_method(
                interface.ToolActivities.run_tool,
                ToolRequest(
                    workflow_id=self._life.id,
                    turn=turn.number,
                    call=call,
                    spec_digest=spec.digest,
                    idempotency_key=names.call_key(self._life.id, turn.number, step, number),
                    result_bytes=room,
                ),
                start_to_close_timeout=tool.timeout,
                heartbeat_timeout=interface.HEARTBEAT,
                retry_policy=interface.tool_retries(tool),
                summary=f"turn {turn.number}: {call.name}",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            if isinstance(error.cause, ApplicationError) and error.cause.type == NOT_RUN:
                return _result(call, ToolOutcome.ERROR, error.cause.message)
            timed_out = isinstance(error.cause, ActivityTimeoutError)
            if not tool.repeatable or timed_out:
                reason = "It took too long or its worker died" if timed_out else f"It broke: {failure_message(error)}"
                return _result(call, ToolOutcome.UNKNOWN, f"{reason}. Whether it took effect is not known.")
            return _result(call, ToolOutcome.ERROR, f"It failed {tool.attempts} times: {failure_message(error)}")

    def _end_turn(self, turn: CurrentTurn, decision: Decision) -> None:
        failed = decision.error is not None
        outcome = TurnOutcome.FAILED if failed else TurnOutcome.COMPLETED
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
            steps=turn.step - 1,
            tool_calls=turn.tool_calls,
            model=decision.model,
            rehearsal=decision.rehearsal,
            entry=decision.head or None,
        )
        self._state.end_turn(workflow.now(), reply)
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
        )
        self._state.outbox.append(self._life.reply_event(reply))
        kind = names.TURN_FAILED_TYPE if failed else names.TURN_COMPLETED_TYPE
        self._life.say(kind, "turn", summary.model_dump(mode="json"))


def _think_summary(turn: CurrentTurn) -> str:
    if turn.repair:
        return f"turn {turn.number}, step {turn.step}: repair of the answer"
    new = count(len(turn.events), "event") if turn.events else count(len(turn.results), "tool result")
    return f"turn {turn.number}, step {turn.step}: {new}"


def _result(call: ToolCall, outcome: ToolOutcome, content: str) -> ToolResult:
    return ToolResult(call_id=call.id, name=call.name, content=content, outcome=outcome)
