"""`Acting`: the tool calls of a step, some of which may wait for a human's decision or for an answer from outside.

What waits is in `CurrentTurn.acting`. Meanwhile mail is accepted, what happens is published, and the agent goes on in
a new run when its history grows long. Running agents replay this code, as `workflows.agent` says: calls of tools that
can't wait are made just as they were when no tool could.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception
from temporalio.exceptions import TimeoutError as ActivityTimeoutError

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names, repeats
    from workflows.approval import Permission, judge
    from workflows.calls import StepCalls, Waiting, shortened_arguments, told
    from workflows.errors import NOT_RUN, failure_message
    from workflows.life import STATE_ATTRIBUTE, Life, count
    from workflows.messages import (
        Approval,
        Missed,
        ResultToKeep,
        Settlement,
        ToolCall,
        ToolOutcome,
        ToolRequest,
        ToolResult,
        Waits,
    )
    from workflows.spec import ControlSpec, ToolControl, WakeUpsSpec
    from workflows.state import CurrentTurn, result_bytes
    from workflows.wake_ups import use

_CALLS_PER_STEP = 64
_SUMMARY_CHARACTERS = 200  # Temporal takes 400 bytes
_UNKNOWN_IS_TOLD = "unknown-outcomes-are-told"
_REPEATS_END = "repeated-calls-end"


class Acting:
    """Makes the tool calls of one agent, a step's at a time."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._working = 0
        """Calls that do something just now, other than wait."""

    async def act(self, spec: ControlSpec, turn: CurrentTurn, wanted: Sequence[ToolCall]) -> list[ToolResult]:
        """Make these calls side by side; their results, in their order, once all have one."""
        results = await self._results(spec, turn, wanted)
        turn.repeats = repeats.noted(turn.repeats, wanted, results)
        return results

    async def _results(self, spec: ControlSpec, turn: CurrentTurn, wanted: Sequence[ToolCall]) -> list[ToolResult]:
        if turn.acting is None:
            left_out = self._left_out(spec, turn, wanted)
            made = [(number, call) for number, call in enumerate(wanted) if number not in left_out]
            step = turn.step - 1
            if not any(_may_wait(spec, call) for _, call in made):
                room = result_bytes(len(made))
                done = await asyncio.gather(*(self._run(spec, turn, step, number, call, room) for number, call in made))
                results = left_out | {number: result for (number, _), result in zip(made, done, strict=True)}
                return [results[number] for number in range(len(wanted))]
            turn.acting = StepCalls(step=step, calls=list(wanted), results=left_out)
        await self._all_ended(spec, turn, turn.acting)
        return [turn.acting.results[number] for number in range(len(turn.acting.calls))]

    def _left_out(self, spec: ControlSpec, turn: CurrentTurn, wanted: Sequence[ToolCall]) -> dict[int, ToolResult]:
        """The results of calls that are not made: they are too many, or made again and again."""
        too_many = f"Not run: a step may call {_CALLS_PER_STEP} tools. Call it again in the next one."
        left_out = {
            number: _result(call, ToolOutcome.ERROR, too_many)
            for number, call in enumerate(wanted)
            if number >= _CALLS_PER_STEP
        }
        for number, call in enumerate(wanted[:_CALLS_PER_STEP]):
            tool = spec.tools.get(call.name)
            again = repeats.times(turn.repeats, call) >= repeats.MOST and not (tool and tool.polls)
            if again and workflow.patched(_REPEATS_END):
                left_out[number] = _result(call, ToolOutcome.ERROR, repeats.refusal(call))
                turn.not_repeated += 1
                self._life.state.note(workflow.now(), f"{call.name} not made again: {repeats.MOST} times the same")
        return left_out

    async def _all_ended(self, spec: ControlSpec, turn: CurrentTurn, acting: StepCalls) -> None:
        """Make the calls that have no result yet; look after the agent while they wait."""
        shown = None if acting.waiting else False  # as the Web UI's filter has it; unknown after a new start
        tasks = [
            asyncio.create_task(self._end(spec, turn, acting, number))
            for number in range(len(acting.calls))
            if number not in acting.results
        ]
        try:
            while not _over(tasks):
                waits = self._only_waits(acting)
                if waits != shown:
                    shown = waits
                    self._show_state(waits=waits)
                self._life.show()

                def something_to_do(*, shown: bool = waits) -> bool:
                    return _over(tasks) or self._only_waits(acting) != shown or self._life.has_news or self._may_move()

                await workflow.wait_condition(something_to_do)
                if self._life.inbox:
                    self._life.sort_mail()
                elif self._life.state.outbox:
                    await self._life.publish()
                elif self._may_move():
                    self._life.continue_as_new_if_due()
        finally:
            for task in tasks:
                task.cancel()  # nothing, if it has ended; else the agent is cancelled, or goes on in a new run
            await asyncio.gather(*tasks, return_exceptions=True)
        if shown is not False:
            self._show_state(waits=False)
        for task in tasks:
            task.result()

    def _show_state(self, *, waits: bool) -> None:
        """As the Web UI's filter has it; whoever has paused the agent finds it paused."""
        word = "paused" if self._life.state.paused else "waiting" if waits else "active"
        workflow.upsert_search_attributes([STATE_ATTRIBUTE.value_set(word)])

    def _only_waits(self, acting: StepCalls) -> bool:
        return self._working == 0 and bool(acting.open)

    def _may_move(self) -> bool:
        """Whether the agent may go on in a new run: nothing is under way that would be cut off."""
        return self._working == 0 and self._life.continue_as_new_is_due and self._life.state.fits

    async def _end(self, spec: ControlSpec, turn: CurrentTurn, acting: StepCalls, number: int) -> None:
        """Have a call end, and keep its result."""
        call = acting.calls[number]
        tool = spec.tools.get(call.name)
        asked = acting.find(self._key(turn, acting, number), Waits.ANSWER)
        permission = Permission.ALLOW if tool is None or asked else judge(tool.approval, call.arguments)
        decided: Settlement | None = None
        if tool and permission is Permission.ASK:
            decided = await self._decided(tool, turn, acting, number)
        if permission is Permission.REFUSE:
            result = _result(call, ToolOutcome.ERROR, f"Not made: you may not call {call.name} with these arguments.")
        elif decided and not decided.approved:
            result = _result(call, ToolOutcome.ERROR, f"Not made: this call {told(decided)}.")
        elif tool and tool.answer_within:
            result = await self._answered(spec, turn, acting, number, tool)
        else:
            result = await self._made(spec, turn, acting, number)
        acting.results[number] = result
        for waited in Waits:
            acting.close(self._key(turn, acting, number), waited)

    async def _made(self, spec: ControlSpec, turn: CurrentTurn, acting: StepCalls, number: int) -> ToolResult:
        """Make a call. If the agent is cancelled meanwhile, whoever goes on with this turn does not make it again."""
        call = acting.calls[number]
        tool = spec.tools.get(call.name)
        self._working += 1
        try:
            return await self._run(spec, turn, acting.step, number, call, _room(acting))
        except (asyncio.CancelledError, ActivityError) as error:
            if tool and not tool.repeatable and is_cancelled_exception(error):
                cut_off = "It was cut off. Whether it took effect is not known."
                acting.results[number] = _result(call, ToolOutcome.UNKNOWN, cut_off)
            raise
        finally:
            self._working -= 1

    # Waiting ----------------------------------------------------------------------------------------------------------

    async def _decided(self, tool: ToolControl, turn: CurrentTurn, acting: StepCalls, number: int) -> Settlement:
        """Wait for the decision about a call, and have it recorded."""
        policy, key = tool.approval, self._key(turn, acting, number)
        assert policy is not None, "it says that it is asked"
        waiting = acting.find(key, Waits.APPROVAL)
        if waiting is None:
            waiting = acting.wait(key, acting.calls[number], Waits.APPROVAL, workflow.now(), policy.expires)
            self._tell(names.APPROVAL_REQUESTED_TYPE, waiting)
        if not await self._settled(turn, waiting, policy.reminds):
            settlement = Settlement(
                call=key,
                waits_for=Waits.APPROVAL,
                approved=turn.cancelled is None and policy.on_expiry == "allow",
                by="perennial",
                why=turn.why_cancelled or f"nobody has decided within {policy.expires}",
                at=workflow.now(),
            )
            self._life.note_settled(waiting, settlement)
        settled = waiting.settlement
        assert settled is not None, "it has just been"
        self._working += 1
        try:
            await workflow.execute_activity_method(
                interface.LedgerActivities.record_approval,
                Approval(
                    workflow_id=self._life.id,
                    turn=turn.number,
                    call=key,
                    tool=waiting.tool,
                    arguments=acting.calls[number].arguments,
                    approved=bool(settled.approved),
                    by=settled.by,
                    why=settled.why,
                    asked_at=waiting.since,
                    decided_at=settled.at,
                ),
                summary=f"turn {turn.number}: {waiting.tool} {told(settled)}"[:_SUMMARY_CHARACTERS],
                **interface.LEDGER,
            )
        finally:
            self._working -= 1
        return settled

    async def _answered(
        self, spec: ControlSpec, turn: CurrentTurn, acting: StepCalls, number: int, tool: ToolControl
    ) -> ToolResult:
        """Make a call, and wait for its answer from outside, which may be there before the call has returned."""
        call, key = acting.calls[number], self._key(turn, acting, number)
        waiting = acting.find(key, Waits.ANSWER)
        if waiting is None:
            waiting = acting.wait(key, call, Waits.ANSWER, workflow.now(), tool.answer_within)
            try:
                begun = await self._made(spec, turn, acting, number)
            except BaseException:
                acting.close(key, Waits.ANSWER)  # it was cut off: it may not have begun
                raise
            if waiting.settlement is None:
                if begun.outcome is not ToolOutcome.OK:
                    return begun
                self._tell(names.TOOL_WAITING_TYPE, waiting)
        if not await self._settled(turn, waiting, None):
            reason = turn.why_cancelled or f"No answer came within {tool.answer_within}"
            return self._unknown(turn, acting.step, number, call, reason)
        self._working += 1
        try:
            content = await workflow.execute_activity_method(
                interface.ToolActivities.keep_result,
                ResultToKeep(
                    workflow_id=self._life.id,
                    content=waiting.content,
                    result_bytes=_room(acting),
                ),
                summary=f"turn {turn.number}: the answer to {call.name}",
                **interface.LEDGER,
            )
        finally:
            self._working -= 1
        return _result(call, ToolOutcome.ERROR if waiting.failed else ToolOutcome.OK, content)

    async def _settled(self, turn: CurrentTurn, waiting: Waiting, reminds: timedelta | None) -> bool:
        """Wait until a call is settled, reminding its people; False if it expires first, or its turn is cancelled."""
        while waiting.settlement is None:
            if turn.cancelled is not None:
                return False
            wakes = waiting.wakes(reminds)
            if wakes is not None and wakes <= workflow.now():
                if waiting.expires and waiting.expires <= workflow.now():
                    return False
                assert reminds is not None, "nothing else wakes it"
                waiting.reminded = int((workflow.now() - waiting.since) / reminds)  # one, however many were due
                self._tell(names.APPROVAL_REMINDER_TYPE, waiting)
                continue
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: waiting.settlement is not None or turn.cancelled is not None,
                    timeout=wakes - workflow.now() if wakes else None,
                    timeout_summary=f"{waiting.tool}: remind, or expire",
                )
        return True

    def _tell(self, kind: str, waiting: Waiting) -> None:
        what = f"{kind.split('.')[-2]}-{waiting.reminded}" if waiting.reminded else kind.split(".")[-2]
        self._life.say(kind, f"{_place(waiting.call)}-{what}", waiting.report.model_dump(mode="json"))

    def _key(self, turn: CurrentTurn, acting: StepCalls, number: int) -> str:
        return names.call_key(self._life.id, turn.number, acting.step, number)

    # A call -----------------------------------------------------------------------------------------------------------

    async def _run(  # noqa: PLR0913, PLR0917  # what a call is told apart by
        self, spec: ControlSpec, turn: CurrentTurn, step: int, number: int, call: ToolCall, room: int
    ) -> ToolResult:
        tool = spec.tools.get(call.name)
        if turn.cancelled is not None or tool is None:
            offered = f"There is no tool {call.name!r}. Tools you may call: {', '.join(spec.tools) or 'none'}."
            why = f"Not made. {turn.why_cancelled}." if turn.cancelled else offered
            return _result(call, ToolOutcome.ERROR, why)
        if tool.built_in:
            return self._wake_ups(spec, f"{turn.number}-{step}-{number}", call)
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
                return self._unknown(turn, step, number, call, reason)
            return _result(
                call, ToolOutcome.ERROR, f"It failed {count(tool.attempts, 'time')}: {failure_message(error)}"
            )

    def _wake_ups(self, spec: ControlSpec, key: str, call: ToolCall) -> ToolResult:
        """Run a tool by which the agent wakes itself: that is a change of its state, and no activity."""
        state, now = self._life.state, workflow.now()
        at_most = (spec.wake_ups or WakeUpsSpec()).at_most
        try:
            state.wake_ups, said = use(call, key, state.wake_ups, at_most=at_most, now=now)
        except ValueError as error:
            return _result(call, ToolOutcome.ERROR, str(error))
        return _result(call, ToolOutcome.OK, said)

    def _unknown(self, turn: CurrentTurn, step: int, number: int, call: ToolCall, reason: str) -> ToolResult:
        """The result of a call of which nobody knows whether it took effect; its owner is told."""
        result = _result(call, ToolOutcome.UNKNOWN, f"{reason}. Whether it took effect is not known.")
        if workflow.patched(_UNKNOWN_IS_TOLD):
            key = names.call_key(self._life.id, turn.number, step, number)
            told = Missed(call=key, tool=call.name, arguments=shortened_arguments(call), why=result.content)
            self._life.say(names.TOOL_UNKNOWN_TYPE, f"{_place(key)}-unknown", told.model_dump(mode="json"))
        return result


def _may_wait(spec: ControlSpec, call: ToolCall) -> bool:
    tool = spec.tools.get(call.name)
    return tool is not None and tool.may_wait


def _room(acting: StepCalls) -> int:
    """How long each result may be, as where none waits."""
    return result_bytes(min(len(acting.calls), _CALLS_PER_STEP))


def _over(tasks: Sequence[asyncio.Task[None]]) -> bool:
    """Whether all have ended, or one has failed."""
    return all(task.done() for task in tasks) or any(
        task.done() and not task.cancelled() and task.exception() is not None for task in tasks
    )


def _place(key: str) -> str:
    """What tells a call apart in its turn."""
    _, _, step, number = names.parse_call_key(key)
    return f"call-{step}-{number}"


def _result(call: ToolCall, outcome: ToolOutcome, content: str) -> ToolResult:
    return ToolResult(call_id=call.id, name=call.name, content=content, outcome=outcome)
