"""`AgentWorkflow`: one agent, for as long as it lives.

Events arrive by the `deliver` signal, a person's question by the `ask` update. The agent takes its mail in turns:
think, call tools, think again, answer. It remembers little itself; what it has said and heard is in the ledger.

    handle = await client.start_workflow("AgentWorkflow", id="agent/store/logistics/order-42", task_queue="perennial")
    reply = await handle.execute_update("ask", AskRequest(text="Where is it?"), result_type=Reply)

Running agents replay this code: a change that would decide otherwise needs `workflow.patched`, and the histories in
`tests/workflows/histories` must still replay.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import JsonValue
from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception
from temporalio.exceptions import TimeoutError as ActivityTimeoutError
from temporalio.types import MethodAsyncSingleParam

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names
    from workflows.errors import NOT_RUN, failure_message
    from workflows.events import Delivery, Event, Outgoing
    from workflows.messages import (
        AskRequest,
        Decision,
        Intervention,
        PublishRequest,
        Reply,
        ReplyRequest,
        SpecRequest,
        Status,
        ThinkRequest,
        ToolCall,
        ToolOutcome,
        ToolRequest,
        ToolResult,
        TurnOutcome,
        TurnSummary,
    )
    from workflows.spec import ControlSpec
    from workflows.state import AgentInput, AgentState, CurrentTurn, Snapshot

_TENANT_ATTRIBUTE = SearchAttributeKey.for_keyword(names.TENANT_ATTRIBUTE)
_AGENT_ATTRIBUTE = SearchAttributeKey.for_keyword(names.AGENT_ATTRIBUTE)
_STATE_ATTRIBUTE = SearchAttributeKey.for_keyword(names.STATE_ATTRIBUTE)
_DEFAULT_HORIZON = 2000  # ids remembered before the spec is known
_CALLS_PER_STEP = 64
_QUESTION_CHARACTERS = 100_000
_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


@workflow.defn(name=names.WORKFLOW_TYPE)
class AgentWorkflow:
    """One agent. Its id is its address: `agent/{tenant}/{agent}/{key}`."""

    @workflow.init
    def __init__(self, start: AgentInput | None = None) -> None:
        self._id = workflow.info().workflow_id
        self._address, self._fault = _address(self._id)
        self._awake = start is not None and start.state is not None
        self._state = start.state if start and start.state else AgentState()
        self._inbox: list[Event] = []
        """Mail not yet in the mailbox: it may arrive before the agent has found its state."""
        self._replies: dict[str, Reply] = {}
        """Replies that an `ask` still waits for, by the digest of its event."""
        self._asking: dict[str, int] = {}

    # Mail ------------------------------------------------------------------------------------------------------------

    @workflow.signal(name=names.DELIVER)
    def deliver(self, delivery: Delivery) -> None:
        """Events for this agent, in order. Never raises and never waits: mail is sorted in `run`."""
        self._inbox.extend(delivery.events)

    @workflow.update(name=names.ASK)
    async def ask(self, request: AskRequest) -> Reply:
        """A question from a person; returns the reply. Asked again with the same id, it returns the same reply."""
        await self._found()
        self._refuse_if_paused()
        event = Event(
            id=request.id or str(workflow.uuid4()),
            source=request.source,
            type=names.ASK_TYPE,
            subject=self._address.key,
            time=workflow.now(),
            data={"text": request.text},
        )
        digest = event.digest
        self._asking[digest] = self._asking.get(digest, 0) + 1
        self._inbox.append(event)
        try:
            await workflow.wait_condition(
                lambda: digest in self._replies or self._was_answered(digest) or self._will_not_be_answered(digest)
            )
            if digest in self._replies:
                return self._replies[digest]
            found = await self._reply_of(self._state.mailbox.turn_of(digest))
            if found:
                return found
            raise ApplicationError("The agent was stopped before it answered; ask again to wake it.", type="Stopped")
        finally:
            self._asking[digest] -= 1
            if not self._asking[digest]:
                del self._asking[digest]
                self._replies.pop(digest, None)

    async def _reply_of(self, turn: int | None) -> Reply | None:
        """The reply of a turn that ended some time ago, from the ledger."""
        if not turn:
            return None
        return await workflow.execute_activity_method(
            interface.LedgerActivities.find_reply,
            ReplyRequest(workflow_id=self._id, turn=turn),
            summary=f"the reply of turn {turn}",
            **interface.LEDGER,
        )

    @ask.validator
    def _may_ask(self, request: AskRequest) -> None:
        if len(request.text) > _QUESTION_CHARACTERS:
            raise ApplicationError(
                f"The question has {len(request.text)} characters; at most {_QUESTION_CHARACTERS} are taken.",
                type="TooLarge",
            )
        self._refuse_if_paused()
        if self._asking and workflow.info().is_continue_as_new_suggested():
            # Questions that overlap without an end would keep this run open, and its history growing, for ever.
            raise ApplicationError("The agent is about to go on in a new run; ask again.", type=names.MOVING)

    def _refuse_if_paused(self) -> None:
        if self._state.paused is not None:
            raise ApplicationError(f"The agent is {self._state.activity()[1]}. Resume it first.", type="Paused")

    # Steering --------------------------------------------------------------------------------------------------------

    @workflow.update(name=names.PAUSE)
    async def pause(self, intervention: Intervention) -> Status:
        """Begin no further turn until `resume`. The turn in progress is finished; mail is accepted and waits."""
        await self._found()
        self._state.paused = intervention
        self._announce(names.AGENT_PAUSED_TYPE, intervention)
        return self.status()

    @workflow.update(name=names.RESUME)
    async def resume(self, intervention: Intervention) -> Status:
        """Take up the mail that waited."""
        await self._found()
        self._state.paused = None
        self._announce(names.AGENT_RESUMED_TYPE, intervention)
        return self.status()

    @workflow.update(name=names.STOP)
    async def stop(self, intervention: Intervention) -> Status:
        """Finish the turn in progress, keep a snapshot and close. The next event or `ask` wakes the agent again."""
        await self._found()
        self._state.stopping = intervention
        self._announce(names.AGENT_STOPPED_TYPE, intervention)
        return self.status()

    async def _found(self) -> None:
        """Wait until the agent has found its state: what is changed before that would be forgotten."""
        await workflow.wait_condition(lambda: self._awake)

    @workflow.query(name=names.STATUS)
    def status(self) -> Status:
        """What the agent does, waits for and has spent."""
        return self._state.status(self._id)

    # Life ------------------------------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, start: AgentInput | None = None) -> None:  # noqa: ARG002  # `__init__` has taken it
        """Live: wake, take turns, and close when stopped or idle for long enough."""
        if self._fault:
            raise ApplicationError(self._fault, type="BadAddress", non_retryable=True)
        try:
            await self._live()
        except (asyncio.CancelledError, ActivityError) as error:
            if is_cancelled_exception(error):  # from outside: whoever wakes the agent next finds all its mail
                if not self._awake:
                    await self._wake()
                if not self._state.fits:  # more mail waits than can be kept in one piece: first some is answered
                    self._state.stopping = Intervention(by="Temporal", reason="cancelled")
                    await self._live()
                await self._keep_snapshot()
                while self._inbox:  # it came while the snapshot was written
                    await self._keep_snapshot()
            raise

    async def _live(self) -> None:
        if not self._awake:
            await self._wake()
        while True:
            self._sort_mail()
            self._show()
            if self._state.outbox:
                await self._publish()
            elif self._may_close():
                if await self._close():
                    return
            elif self._may_work():
                self._continue_as_new_if_due()
                await self._turn()
            else:
                self._continue_as_new_if_due()
                if not await self._mail_or_idle() and await self._close():
                    return

    async def _wake(self) -> None:
        kept = await self._quickly(interface.LedgerActivities.wake, self._id, "what the agent remembers")
        self._state = kept or self._state
        self._awake = True
        by_hand = workflow.info().typed_search_attributes.get(_AGENT_ATTRIBUTE) is None  # started without them
        if by_hand or self._state.paused:
            workflow.upsert_search_attributes(
                [
                    _TENANT_ATTRIBUTE.value_set(self._address.tenant),
                    _AGENT_ATTRIBUTE.value_set(self._address.agent),
                    _STATE_ATTRIBUTE.value_set("paused" if self._state.paused else "active"),
                ]
            )

    async def _mail_or_idle(self) -> bool:
        """Wait for something to do; False when the agent has been idle for as long as its spec allows."""
        idle = self._state.spec.hibernate_after if self._state.spec and not self._state.paused else None
        try:
            await workflow.wait_condition(
                self._has_something_to_do, timeout=idle, timeout_summary="hibernate, if nothing comes"
            )
        except TimeoutError:
            return False
        return True

    def _may_work(self) -> bool:
        held = self._state.paused or (self._state.stopping and self._state.fits)
        return self._state.current is not None or bool(self._state.mailbox.waiting and not held)

    def _may_close(self) -> bool:
        return self._state.stopping is not None and self._state.current is None and self._state.fits

    def _has_something_to_do(self) -> bool:
        return bool(self._inbox or self._state.outbox or self._may_close() or self._may_work())

    async def _close(self) -> bool:
        """Keep a snapshot; False if mail came in the meantime, which a closing agent would lose."""
        await workflow.wait_condition(workflow.all_handlers_finished)
        self._sort_mail()
        await self._keep_snapshot()
        return not self._inbox and workflow.all_handlers_finished()

    async def _keep_snapshot(self) -> None:
        self._sort_mail()
        await workflow.execute_activity_method(
            interface.LedgerActivities.keep_snapshot,
            Snapshot(
                workflow_id=self._id,
                run_id=workflow.info().run_id,
                state=self._state.model_copy(update={"stopping": None}),
            ),
            summary=f"snapshot after turn {self._state.turn}",
            **interface.LEDGER,
        )

    def _continue_as_new_if_due(self) -> None:
        """Go on in a new run, before the history grows long. Mail that has arrived goes along."""
        if workflow.info().is_continue_as_new_suggested() and workflow.all_handlers_finished():
            self._sort_mail()
            if not self._state.fits:
                return  # once there is less mail; until then ingest holds back what would make this run too long
            workflow.continue_as_new(AgentInput(state=self._state))

    # Turns -----------------------------------------------------------------------------------------------------------

    def _sort_mail(self) -> None:
        """Move mail into the mailbox. Waits for nothing, so nothing can arrive in between."""
        horizon = self._state.spec.mailbox.remember_ids if self._state.spec else _DEFAULT_HORIZON
        arrived, self._inbox = self._inbox, []
        for event in self._state.mailbox.accept(arrived, horizon=horizon):
            if event.digest not in self._asking:
                self._state.note(workflow.now(), f"duplicate dropped: {event.type} {event.id}")
                self._say(
                    names.DUPLICATE_TYPE,
                    f"duplicate-{self._state.mailbox.duplicates}-{event.digest}",
                    {"source": event.source, "id": event.id, "type": event.type},
                )

    async def _turn(self) -> None:
        """Take mail, think and act until there is an answer. A turn may be spread over several runs."""
        turn = self._state.current
        if turn is None:
            spec = await self._newest_spec()
            self._sort_mail()
            turn = self._state.begin_turn(workflow.now(), spec.mailbox.events_per_turn)
        try:
            decision = await self._steps(turn)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            decision = Decision(head=self._state.head or "", error=failure_message(error))
        self._end_turn(turn, decision)

    async def _steps(self, turn: CurrentTurn) -> Decision:
        spec = self._state.spec
        assert spec is not None, "a turn begins with its spec"
        while True:
            self._show()
            last = turn.step >= spec.budget.steps_per_turn
            decision = await workflow.execute_activity_method(
                interface.ModelActivities.think,
                ThinkRequest(
                    workflow_id=self._id,
                    turn=turn.number,
                    step=turn.step,
                    head=self._state.head,
                    spec_digest=spec.digest,
                    events=turn.events,
                    results=turn.results,
                    tools_allowed=not last,
                ),
                task_queue=names.model_queue(workflow.info().task_queue),
                summary=_think_summary(turn),
                **interface.THINK,
            )
            self._state.record_step(turn, decision)
            if decision.error or last or not decision.tool_calls:
                return decision
            step = turn.step - 1
            wanted, surplus = decision.tool_calls[:_CALLS_PER_STEP], decision.tool_calls[_CALLS_PER_STEP:]
            calls = (self._run_tool(spec, turn, step, n, call) for n, call in enumerate(wanted))
            results = list(await asyncio.gather(*calls))
            too_many = f"Not run: a step may call {_CALLS_PER_STEP} tools. Call it again in the next one."
            results += [_result(call, ToolOutcome.ERROR, too_many) for call in surplus]
            self._state.record_tools(turn, results)
            self._continue_as_new_if_due()

    async def _run_tool(
        self, spec: ControlSpec, turn: CurrentTurn, step: int, number: int, call: ToolCall
    ) -> ToolResult:
        tool = spec.tools.get(call.name)
        if tool is None:
            offered = ", ".join(spec.tools) or "none"
            return _result(call, ToolOutcome.ERROR, f"There is no tool {call.name!r}. Tools you may call: {offered}.")
        try:
            return await workflow.execute_activity_method(
                interface.ToolActivities.run_tool,
                ToolRequest(
                    workflow_id=self._id,
                    turn=turn.number,
                    call=call,
                    spec_digest=spec.digest,
                    idempotency_key=names.call_key(self._id, turn.number, step, number),
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
            id=names.reply_id(self._id, turn.number, 0),
            workflow_id=self._id,
            turn=turn.number,
            text=decision.text,
            outcome=outcome,
            error=decision.error,
            answers=turn.answers,
            usage=turn.usage,
            steps=turn.step - 1,
            tool_calls=turn.tool_calls,
            model=decision.model,
            rehearsal=decision.rehearsal,
            entry=decision.head or None,
        )
        self._state.end_turn(workflow.now(), reply)
        for reference in turn.answers:
            digest = reference.digest
            if digest in self._asking:
                self._replies[digest] = reply
        summary = TurnSummary(
            agent=self._address.agent,
            turn=turn.number,
            outcome=outcome,
            seconds=(workflow.now() - turn.started).total_seconds(),
            events=len(turn.answers),
            steps=reply.steps,
            tool_calls=turn.tool_calls,
            usage=turn.usage,
            error=decision.error,
        )
        self._state.outbox.append(self._reply_event(reply))
        kind = names.TURN_FAILED_TYPE if failed else names.TURN_COMPLETED_TYPE
        self._say(kind, "turn", summary.model_dump(mode="json"))

    def _was_answered(self, digest: str) -> bool:
        """Whether a turn that has ended took this event."""
        turn = self._state.mailbox.turn_of(digest)
        return bool(turn) and (self._state.current is None or turn != self._state.current.number)

    def _will_not_be_answered(self, digest: str) -> bool:
        """Whether the agent closes before it takes this event; the turn in progress is finished first."""
        return self._state.stopping is not None and not self._state.mailbox.turn_of(digest)

    async def _newest_spec(self) -> ControlSpec:
        known = self._state.spec
        request = SpecRequest(
            tenant=self._address.tenant, agent=self._address.agent, known_digest=known.digest if known else ""
        )
        spec = await self._quickly(interface.SpecActivities.load_spec, request, "the agent's spec") or known
        assert spec is not None, "load_spec answers when no spec is known"
        self._state.spec = spec
        return spec

    async def _quickly(
        self, method: MethodAsyncSingleParam[Any, _Request, _Result], request: _Request, summary: str
    ) -> _Result:
        """Call an activity within the workflow task; if that fails, as an activity whose retries an operator sees."""
        try:
            return await workflow.execute_local_activity_method(
                method, request, summary=summary, **interface.LEDGER_LOCAL
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
        return await workflow.execute_activity_method(method, request, summary=summary, **interface.LEDGER)

    # Telling the world -----------------------------------------------------------------------------------------------

    def _reply_event(self, reply: Reply) -> Outgoing:
        return Outgoing(
            topic=names.REPLIES_TOPIC,
            id=reply.id,
            type=names.REPLY_TYPE,
            source=self._id,
            subject=self._address.key,
            time=workflow.now(),
            extensions={
                "tenant": self._address.tenant,
                "agent": self._address.agent,
                "causationid": " ".join(reference.id for reference in reply.answers),
            },
            data=reply.model_dump(mode="json"),
        )

    def _say(self, kind: str, what: str, data: dict[str, JsonValue]) -> None:
        """Put a lifecycle event into the outbox."""
        self._state.outbox.append(
            Outgoing(
                topic=names.ACTIVITY_TOPIC,
                id=names.lifecycle_id(self._id, self._state.turn, what),
                type=kind,
                source=self._id,
                subject=self._address.key,
                time=workflow.now(),
                extensions={"tenant": self._address.tenant, "agent": self._address.agent},
                data=data,
            )
        )

    def _announce(self, kind: str, intervention: Intervention) -> None:
        """Record that a person paused, resumed or stopped the agent."""
        verb = kind.split(".")[-2]
        why = f": {intervention.reason}" if intervention.reason else ""
        self._state.note(workflow.now(), f"{verb} by {intervention.by or 'somebody'}{why}")
        self._say(kind, f"{verb}-{workflow.uuid4()}", intervention.model_dump(mode="json"))
        word = "active" if kind == names.AGENT_RESUMED_TYPE else verb
        workflow.upsert_search_attributes([_STATE_ATTRIBUTE.value_set(word)])

    async def _publish(self) -> None:
        messages = self._state.next_out()
        try:
            await workflow.execute_activity_method(
                interface.PublishActivities.publish,
                PublishRequest(messages=messages),
                summary=f"turn {self._state.turn}: {_count(len(messages), 'event')} out",
                **interface.PUBLISH,
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self._state.note(workflow.now(), f"could not be published: {failure_message(error)}")
        self._state.outbox = self._state.outbox[len(messages) :]

    def _show(self) -> None:
        """What the Web UI shows of this agent under "Current Details"."""
        state = self._state
        recent = "\n".join(f"- {item.at:%Y-%m-%d %H:%M:%S} {item.text}" for item in reversed(state.recent))
        workflow.set_current_details(
            f"**Now:** {state.activity()[1]}\n\n"
            f"**Waiting:** {len(state.mailbox.waiting)} events\n\n"
            f"**Spent:** {state.usage.input_tokens} tokens in, {state.usage.output_tokens} out, "
            f"{state.model_calls} model calls, {state.tool_calls} tool calls\n\n"
            f"**So far:** {state.turn} turns, {state.mailbox.accepted} events accepted, "
            f"{state.mailbox.duplicates} duplicates dropped, {state.failed_turns} failed turns\n\n"
            f"**Recent**\n{recent}"
        )


def _address(workflow_id: str) -> tuple[names.Address, str | None]:
    """The agent's address in its workflow id, and what is wrong if it holds none."""
    try:
        return names.parse_workflow_id(workflow_id), None
    except ValueError as error:
        return names.Address("", "", ""), str(error)


def _think_summary(turn: CurrentTurn) -> str:
    new = _count(len(turn.events), "event") if turn.events else _count(len(turn.results), "tool result")
    return f"turn {turn.number}, step {turn.step}: {new}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _result(call: ToolCall, outcome: ToolOutcome, content: str) -> ToolResult:
    return ToolResult(call_id=call.id, name=call.name, content=content, outcome=outcome)
