"""`AgentWorkflow`: one agent, for as long as it lives.

Events arrive by the `deliver` signal, a person's question by the `ask` update. The agent takes its mail in turns:
think, call tools, think again, answer. It remembers little itself; what it has said and heard is in the ledger.

    handle = await client.start_workflow("AgentWorkflow", id="agent/store/logistics/order-42", task_queue="perennial")
    reply = await handle.execute_update("ask", AskRequest(text="Where is it?"), result_type=Reply)

What its parts share is in `workflows.life`, how it takes a turn in `workflows.turn`. Running agents replay all of this:
a change that would decide otherwise needs `workflow.patched`, and the histories in `tests/workflows/histories` must
still replay.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import NamedTuple

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names
    from workflows.budget import Lifted, LiftRequest
    from workflows.calls import CallError
    from workflows.events import Delivery, Event
    from workflows.life import STATE_ATTRIBUTE, Life
    from workflows.messages import (
        Alarm,
        AskRequest,
        CompleteRequest,
        DecideRequest,
        Intervention,
        Reply,
        ReplyRequest,
        RewindRecord,
        RewindRequest,
        Rewound,
        Settlement,
        Status,
        SteerRequest,
    )
    from workflows.state import AgentInput, AgentState, Snapshot
    from workflows.turn import Turns
    from workflows.wake_ups import next_due

_TENANT_ATTRIBUTE = SearchAttributeKey.for_keyword(names.TENANT_ATTRIBUTE)
_AGENT_ATTRIBUTE = SearchAttributeKey.for_keyword(names.AGENT_ATTRIBUTE)
_QUESTION_CHARACTERS = 100_000
_IDLE_NO_MORE = "mail-that-comes-while-closing-is-taken"


class _Time(NamedTuple):
    """When the agent has something to do."""

    at: datetime
    what: str


@workflow.defn(name=names.WORKFLOW_TYPE)
class AgentWorkflow:
    """One agent. Its id is its address: `agent/{tenant}/{agent}/{key}`."""

    @workflow.init
    def __init__(self, start: AgentInput | None = None) -> None:
        workflow_id = workflow.info().workflow_id
        address, self._fault = _address(workflow_id)
        self._awake = start is not None and start.state is not None
        self._life = Life(workflow_id, address, start.state if start and start.state else AgentState())
        self._turns = Turns(self._life)

    @property
    def _state(self) -> AgentState:
        return self._life.state

    # Mail ------------------------------------------------------------------------------------------------------------

    @workflow.signal(name=names.DELIVER)
    def deliver(self, delivery: Delivery) -> None:
        """Events for this agent, in order. Never raises and never waits: mail is sorted in `run`.

        With none, the agent is only woken (`workflows.alarm`).
        """
        self._life.inbox.extend(delivery.events)
        self._life.woken = self._life.woken or not delivery.events

    @workflow.update(name=names.ASK)
    async def ask(self, request: AskRequest) -> Reply:
        """A question from a person; returns the reply. Asked again with the same id, it returns the same reply."""
        await self._found()
        self._refuse_if_paused()
        event = Event(
            id=request.id or str(workflow.uuid4()),
            source=request.source,
            type=names.ASK_TYPE,
            subject=self._life.address.key,
            time=workflow.now(),
            data={"text": request.text},
        )
        digest = event.digest
        self._life.asking[digest] = self._life.asking.get(digest, 0) + 1
        self._life.inbox.append(event)
        try:
            await workflow.wait_condition(
                lambda: (
                    digest in self._life.replies
                    or self._was_answered(digest)
                    or self._will_not_be_answered(digest)
                    or digest in self._life.rejected
                )
            )
            if digest in self._life.rejected:
                raise ApplicationError("The agent takes no questions during a turn; ask again later.", type=names.BUSY)
            if digest in self._life.replies:
                return self._life.replies[digest]
            found = await self._reply_of(self._state.mailbox.turn_of(digest))
            if found:
                return found
            raise ApplicationError("The agent was stopped before it answered; ask again to wake it.", type="Stopped")
        finally:
            self._life.asking[digest] -= 1
            if not self._life.asking[digest]:
                del self._life.asking[digest]
                self._life.rejected.discard(digest)
                self._life.replies.pop(digest, None)

    async def _reply_of(self, turn: int | None) -> Reply | None:
        """The reply of a turn that ended some time ago, from the ledger."""
        if not turn:
            return None
        return await workflow.execute_activity_method(
            interface.LedgerActivities.find_reply,
            ReplyRequest(workflow_id=self._life.id, turn=turn),
            summary=f"the reply of turn {turn}",
            **interface.LEDGER,
        )

    def _was_answered(self, digest: str) -> bool:
        """Whether a turn that has ended took this event."""
        turn = self._state.mailbox.turn_of(digest)
        return bool(turn) and (self._state.current is None or turn != self._state.current.number)

    def _will_not_be_answered(self, digest: str) -> bool:
        """Whether the agent closes before it answers this event; a turn that can go on is finished first."""
        left = self._state.is_over_budget or not self._state.mailbox.turn_of(digest)
        return self._state.stopping is not None and left and not self._is_draining

    @ask.validator
    def _may_ask(self, request: AskRequest) -> None:
        _refuse_if_long(request.text)
        self._refuse_if_paused()
        if self._life.asking and workflow.info().is_continue_as_new_suggested():
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
        self._life.announce(names.AGENT_PAUSED_TYPE, intervention)
        return self.status()

    @workflow.update(name=names.RESUME)
    async def resume(self, intervention: Intervention) -> Status:
        """Take up the mail that waited."""
        await self._found()
        self._state.paused = None
        self._life.announce(names.AGENT_RESUMED_TYPE, intervention)
        return self.status()

    @workflow.update(name=names.STOP)
    async def stop(self, intervention: Intervention) -> Status:
        """Finish the turn in progress, keep a snapshot and close. The next event, `ask` or wake-up wakes it again.

        With `drain`, the mail that waits is answered first, unless the agent is paused or over its budget.
        """
        await self._found()
        self._state.stopping = intervention
        self._life.announce(names.AGENT_STOPPED_TYPE, intervention)
        return self.status()

    @workflow.update(name=names.STEER)
    async def steer(self, request: SteerRequest) -> Status:
        """Say something to an agent at work: it joins the turn in progress, or begins one."""
        await self._found()
        self._life.inbox.append(
            Event(
                id=request.id or str(workflow.uuid4()),
                source=request.by or "perennial/steer",
                type=names.STEER_TYPE,
                subject=self._life.address.key,
                time=workflow.now(),
                data={"text": request.text, "interrupt": request.interrupt},
            )
        )
        return self.status()

    @steer.validator
    def _may_steer(self, request: SteerRequest) -> None:
        _refuse_if_long(request.text)

    @workflow.update(name=names.CANCEL_TURN)
    async def cancel_turn(self, intervention: Intervention) -> Status:
        """End the turn in progress without an answer. Its model call is cancelled; tool calls under way are finished.

        What was done stays done, and is in the ledger; its events count as answered. Mail that waits is taken next.
        """
        await self._found()
        turn = self._state.current
        if turn is None:
            raise ApplicationError("The agent is in no turn.", type=names.NO_TURN)
        if turn.cancelled is None:
            turn.cancelled = intervention
            self._turns.budget.look_again()
        return self.status()

    @workflow.update(name=names.DECIDE)
    async def decide(self, request: DecideRequest) -> Settlement:
        """Decide about a tool call that waits for it. The same decision again has no further effect."""
        await self._found()
        try:
            return self._life.decide(request, by="")
        except CallError as error:
            raise ApplicationError(str(error), type=error.kind) from error

    @workflow.update(name=names.COMPLETE)
    async def complete(self, request: CompleteRequest) -> Settlement:
        """Answer a tool call whose answer comes from outside. The same answer again has no further effect."""
        await self._found()
        try:
            return self._life.complete(request, by="")
        except CallError as error:
            raise ApplicationError(str(error), type=error.kind) from error

    @workflow.update(name=names.REWIND)
    async def rewind(self, request: RewindRequest) -> Rewound:
        """Go on behind an entry of any of the agent's branches; what came after it stays in the ledger.

        The turn in progress is finished first. Mail waits. What was answered counts as answered, on whichever branch.
        """
        return await self._go_on_behind(request, fork=False)

    @workflow.update(name=names.FORK)
    async def fork(self, request: RewindRequest) -> Rewound:
        """Begin this agent's life behind an entry of another; refused by one that has heard or said anything."""
        return await self._go_on_behind(request, fork=True)

    @rewind.validator
    def _may_rewind(self, request: RewindRequest) -> None:  # noqa: ARG002  # a validator takes what its update takes
        self._refuse_if_moving()

    @fork.validator
    def _may_fork(self, request: RewindRequest) -> None:  # noqa: ARG002  # as above
        self._refuse_if_moving()

    async def _go_on_behind(self, request: RewindRequest, *, fork: bool) -> Rewound:
        await self._found()
        async with self._life.rewinding:
            # Not longer than this run: whoever waits for a long turn would keep its history growing.
            await workflow.wait_condition(
                lambda: self._state.current is None or workflow.info().is_continue_as_new_suggested()
            )
            self._refuse_if_moving()
            state = self._state
            record = RewindRecord(
                workflow_id=self._life.id,
                turn=state.turn,
                head=state.head,
                known=state.rewound,
                fork=fork,
                lived=bool(state.turn or state.head or state.mailbox.accepted or self._life.inbox),
                request=request if request.id else request.model_copy(update={"id": str(workflow.uuid4())}),
            )
            try:
                rewound = await workflow.execute_activity_method(
                    interface.LedgerActivities.record_rewind,
                    record,
                    summary=f"{'fork from' if fork else 'rewind to'} entry {request.entry[:12]}",
                    **interface.REWIND,
                )
            except ActivityError as error:
                if is_cancelled_exception(error) or not isinstance(error.cause, ApplicationError):
                    raise
                raise ApplicationError(error.cause.message, type=error.cause.type) from error
            if rewound.number > self._state.rewound:  # else it was taken in before, and this is a repetition
                self._state.rewind(rewound)
                self._life.announce_rewind(rewound)
            return rewound

    @workflow.update(name=names.LIFT_BUDGET)
    async def lift_budget(self, request: LiftRequest) -> Lifted:
        """Allow more than a limit of the budget until its window ends, for all whom the limit is about."""
        await self._found()
        return await self._turns.budget.lift(request)

    @workflow.signal(name=names.CHECK_BUDGET)
    def check_budget(self) -> None:
        """Try again, if a turn waits for its budget: more may have been allowed, by way of another agent."""
        self._turns.budget.look_again()

    def _refuse_if_moving(self) -> None:
        if self._state.current is not None and workflow.info().is_continue_as_new_suggested():
            raise ApplicationError("The agent is about to go on in a new run; ask again.", type=names.MOVING)

    async def _found(self) -> None:
        """Wait until the agent has found its state: what is changed before that would be forgotten."""
        await workflow.wait_condition(lambda: self._awake)

    @workflow.query(name=names.STATUS)
    def status(self) -> Status:
        """What the agent does, waits for and has spent."""
        return self._state.status(self._life.id)

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
                while self._life.inbox:  # it came while the snapshot was written
                    await self._keep_snapshot()
            raise

    async def _live(self) -> None:
        if not self._awake:
            await self._wake()
        while True:
            self._life.sort_mail()
            self._life.show()
            if self._state.outbox:
                await self._life.publish()
            elif self._state.occurrences:
                await self._life.tell_occurrences()
            elif self._may_close():
                if await self._close():
                    return
            elif self._may_work():
                self._life.continue_as_new_if_due()
                await self._turns.take()
            else:
                self._life.continue_as_new_if_due()
                if not await self._mail_or_idle() and await self._close():
                    return

    async def _wake(self) -> None:
        kept = await self._life.quickly(interface.LedgerActivities.wake, self._life.id, "what the agent remembers")
        self._life.state = kept or self._state
        self._awake = True
        by_hand = workflow.info().typed_search_attributes.get(_AGENT_ATTRIBUTE) is None  # started without them
        word = "paused" if self._state.paused else names.OVER_BUDGET if self._state.is_over_budget else "active"
        if by_hand or word != "active":
            workflow.upsert_search_attributes(
                [
                    _TENANT_ATTRIBUTE.value_set(self._life.address.tenant),
                    _AGENT_ATTRIBUTE.value_set(self._life.address.agent),
                    STATE_ATTRIBUTE.value_set(word),
                ]
            )

    async def _mail_or_idle(self) -> bool:
        """Wait for something to do; False when the agent has been idle for as long as its spec allows.

        A wake-up that is due sooner keeps it open, and is something to do; a later one has an alarm (`_keep_snapshot`).
        So is the end of quiet hours, if mail waits.
        """
        held = self._state.paused or self._state.mailbox.waiting
        idle = self._state.spec.hibernate_after if self._state.spec and not held else None
        now = workflow.now()
        times = [time for time in self._times(now) if idle is None or time.at <= now + idle]
        first = times[0] if times else None
        try:
            await workflow.wait_condition(
                self._has_something_to_do,
                timeout=first.at - now if first else idle,
                timeout_summary=first.what if first else "hibernate, if nothing comes",
            )
        except TimeoutError:
            return first is not None
        return True

    def _times(self, now: datetime) -> list[_Time]:
        """When there is something to do though nothing comes, the soonest first."""
        times = []
        first = next_due(self._state.wake_ups)
        if first and first.due:
            times.append(_Time(first.due, "wake itself"))
        hush = self._state.hush_at(now)
        if hush and hush.quiet and self._state.mailbox.waiting and not self._state.paused:
            times.append(_Time(hush.until, "quiet hours"))
        return sorted(times)

    def _may_work(self) -> bool:
        held = self._state.paused or (self._state.stopping and not self._is_draining and self._state.fits)
        return self._state.current is not None or bool(not held and self._may_be_disturbed())

    def _may_be_disturbed(self) -> bool:
        """Whether there is mail that may be taken now, or may be when the agent has looked at the clock."""
        return self._state.mailbox.is_ready(self._state.quiet_at(workflow.now()))

    def _may_close(self) -> bool:
        in_hand = self._state.current is not None and not self._state.is_over_budget
        has_work = in_hand or (self._is_draining and self._may_be_disturbed())
        return self._state.stopping is not None and not has_work and self._state.fits

    @property
    def _is_draining(self) -> bool:
        """Whether the agent answers its mail before it closes."""
        stopping, over_budget = self._state.stopping, self._state.is_over_budget
        return stopping is not None and stopping.drain and self._state.paused is None and not over_budget

    def _has_something_to_do(self) -> bool:
        return bool(self._life.inbox or self._state.outbox or self._may_close() or self._may_work())

    async def _close(self) -> bool:
        """Keep a snapshot; False if mail came in the meantime, or a person's word, which a closing agent would lose."""
        self._life.woken = False
        await workflow.wait_condition(workflow.all_handlers_finished)
        self._life.sort_mail()
        if (self._state.stopping is None or self._is_draining) and self._may_work() and workflow.patched(_IDLE_NO_MORE):
            return False
        kept = self._state.rewound, self._state.paused
        await self._keep_snapshot()
        unchanged = kept == (self._state.rewound, self._state.paused)
        return not (self._life.inbox or self._life.woken) and workflow.all_handlers_finished() and unchanged

    async def _keep_snapshot(self) -> None:
        self._life.sort_mail()
        await workflow.execute_activity_method(
            interface.LedgerActivities.keep_snapshot,
            Snapshot(
                workflow_id=self._life.id,
                run_id=workflow.info().run_id,
                state=self._state.model_copy(update={"stopping": None}),
            ),
            summary=f"snapshot after turn {self._state.turn}",
            **interface.LEDGER,
        )
        first = next_due(self._state.wake_ups)
        if first and first.due:
            await workflow.execute_activity_method(
                interface.ClockActivities.set_alarm,
                Alarm(workflow_id=self._life.id, due=first.due),
                summary="an alarm for the next wake-up",
                **interface.CLOCK,
            )


def _refuse_if_long(text: str) -> None:
    if len(text) > _QUESTION_CHARACTERS:
        raise ApplicationError(
            f"The text has {len(text)} characters; at most {_QUESTION_CHARACTERS} are taken.", type="TooLarge"
        )


def _address(workflow_id: str) -> tuple[names.Address, str | None]:
    """The agent's address in its workflow id, and what is wrong if it holds none."""
    try:
        return names.parse_workflow_id(workflow_id), None
    except ValueError as error:
        return names.Address("", "", ""), str(error)
