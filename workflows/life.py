"""`Life`: what the parts of an open agent share: its state, the mail that has just come, and its voice.

`workflows.agent` has the handlers and the agent's days, `workflows.turn` a turn; both act through this. What it tells
the world goes through the outbox of the state, so that it is published once, whatever dies.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import JsonValue
from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, FailureError, is_cancelled_exception
from temporalio.types import MethodAsyncSingleParam

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names
    from workflows.budget import Cost, usd
    from workflows.calls import Waiting, settle
    from workflows.errors import failure_message
    from workflows.events import Event, Outgoing
    from workflows.messages import (
        CompleteRequest,
        DecideRequest,
        Intervention,
        Missed,
        PublishRequest,
        Reply,
        Rewound,
        Settlement,
        SpecRequest,
        Waits,
    )
    from workflows.quiet_hours import LookRequest
    from workflows.spec import ControlSpec
    from workflows.state import AgentInput, AgentState
    from workflows.steering import Effect, effect
    from workflows.wake_ups import due

STATE_ATTRIBUTE = SearchAttributeKey.for_keyword(names.STATE_ATTRIBUTE)
_ABOUT_CALLS = (names.DECIDE_TYPE, names.COMPLETE_TYPE)
_FAULT_CHARACTERS = 500
_DEFAULT_HORIZON = 2000  # ids remembered before the spec is known
_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


class Life:
    """An agent while its workflow is open."""

    def __init__(self, workflow_id: str, address: names.Address, state: AgentState) -> None:
        self.id = workflow_id
        self.address = address
        self.state = state
        self.inbox: list[Event] = []
        """Mail not yet in the mailbox: it may arrive before the agent has found its state."""
        self.replies: dict[str, Reply] = {}
        """Replies that an `ask` still waits for, by the digest of its event."""
        self.asking: dict[str, int] = {}
        """How many `ask`s wait for the answer to an event, by its digest."""
        self.woken = False
        """An alarm has gone off since the agent began to close."""
        self.rejected: set[str] = set()
        """Of these questions, those that came at the wrong time."""
        self.rewinding = asyncio.Lock()
        """Held by a rewind: no turn begins meanwhile."""

    def sort_mail(self) -> None:
        """Move mail into the mailbox. Waits for nothing, so nothing can arrive in between."""
        horizon = self.state.spec.mailbox.remember_ids if self.state.spec else _DEFAULT_HORIZON
        arrived, self.inbox = self.inbox, []
        seen = self.state.mailbox.seen
        fresh = [event for event in arrived if event.digest not in seen] if self.state.wake_ups else []
        duplicates = self.state.mailbox.accept(arrived, horizon=horizon)
        self._reject([event for event in arrived if not any(event is one for one in duplicates)])
        for number, event in enumerate(duplicates, self.state.mailbox.duplicates - len(duplicates) + 1):
            if event.digest not in self.asking:
                self.state.note(workflow.now(), f"duplicate dropped: {event.type} {event.id}")
                self.say(
                    names.DUPLICATE_TYPE,
                    f"duplicate-{number}-{event.digest}",
                    {"source": event.source, "id": event.id, "type": event.type},
                )
        if self.state.wake_ups:
            ringing, self.state.wake_ups = due(self.state.wake_ups, workflow.now(), fresh)
            mail = [one.event(self.id, workflow.now()) for one in ringing]
            self.state.mailbox.accept(mail, horizon=horizon)  # one that was set, and rang, before is no news
        for event in self.state.mailbox.pick(_ABOUT_CALLS, self.state.turn):
            self._heed(event)

    def _reject(self, arrived: list[Event]) -> None:
        """Do not take what the spec says is not to come during a turn."""
        state = self.state
        rules = state.spec.mailbox.during_turn if state.spec and state.current else ()
        rejected = [
            event
            for event in arrived
            if effect(rules, event) is Effect.REJECT and state.mailbox.turn_of(event.digest) == 0
        ]
        state.mailbox.reject(rejected, state.turn)
        for event in rejected:
            state.note(workflow.now(), f"rejected, since it came during turn {state.turn}: {event.type} {event.id}")
            if event.digest in self.asking:
                self.rejected.add(event.digest)
                continue
            self.say(names.REJECTED_TYPE, f"rejected-{event.digest}", event.reference.model_dump(mode="json"))

    # Calls that wait -------------------------------------------------------------------------------------------------

    def decide(self, request: DecideRequest, by: str) -> Settlement:
        """Take a decision about a call that waits for one.

        Raises:
            CallError: none waits under this id, or it is decided otherwise.
        """
        settlement = Settlement(
            call=request.call,
            waits_for=Waits.APPROVAL,
            approved=request.approve,
            by=request.by or by,
            why=request.why,
            at=workflow.now(),
        )
        return self._settle(settlement)

    def complete(self, request: CompleteRequest, by: str) -> Settlement:
        """Take the answer to a call that waits for one.

        Raises:
            CallError: none waits under this id, or it has another answer.
        """
        settlement = Settlement(call=request.call, waits_for=Waits.ANSWER, by=request.by or by, at=workflow.now())
        return self._settle(settlement, request)

    def _settle(self, wanted: Settlement, answer: CompleteRequest | None = None) -> Settlement:
        waiting = settle(self.state.acting, self.state.settled, wanted)
        if waiting is not None:
            if answer:
                waiting.content, waiting.failed = answer.content, answer.failed
            self.note_settled(waiting, wanted)
        return wanted

    def note_settled(self, waiting: Waiting, settlement: Settlement) -> None:
        """Remember, and tell, what a call has come to."""
        waiting.settlement = settlement
        self.state.settle(waiting, settlement)
        is_approval = settlement.waits_for is Waits.APPROVAL
        kind = names.APPROVAL_DECIDED_TYPE if is_approval else names.TOOL_COMPLETED_TYPE
        told = {**waiting.report.model_dump(mode="json"), **settlement.model_dump(mode="json")}
        _, _, step, number = names.parse_call_key(waiting.call)
        self.say(kind, f"call-{step}-{number}-{'decided' if is_approval else 'completed'}", told)

    def _heed(self, event: Event) -> None:
        """Take a decision or an answer that came as an event; what can't be taken is told, and not lost in silence."""
        try:
            if event.type == names.DECIDE_TYPE:
                self.decide(DecideRequest.model_validate(event.data), by=event.source)
            else:
                self.complete(CompleteRequest.model_validate(event.data), by=event.source)
        except ValueError as error:  # pydantic's and ours
            why = " ".join(str(error).split())[:_FAULT_CHARACTERS]
            call = str(event.data.get("call", "")) if isinstance(event.data, dict) else ""
            self.state.note(workflow.now(), f"{event.type} {event.id} could not be taken: {why}")
            missed = Missed(call=call[:_FAULT_CHARACTERS], why=why, by=event.source)
            self.say(names.CALL_MISSED_TYPE, f"missed-{event.digest}", missed.model_dump(mode="json"))

    @property
    def has_news(self) -> bool:
        """Whether there is mail to sort, or something to publish."""
        return bool(self.inbox or self.state.outbox)

    async def newest_spec(self) -> ControlSpec:
        """The agent's spec as it is now; a turn keeps the one that it began with."""
        self.state.spec = spec = await self.offered_spec()
        return spec

    async def offered_spec(self) -> ControlSpec:
        """The agent's spec as it is now, which is not taken up yet."""
        known = self.state.spec
        request = SpecRequest(
            tenant=self.address.tenant, agent=self.address.agent, known_digest=known.digest if known else ""
        )
        spec = await self.quickly(interface.SpecActivities.load_spec, request, "the agent's spec") or known
        assert spec is not None, "load_spec answers when no spec is known"
        return spec

    async def look_at_clock(self, spec: ControlSpec) -> None:
        """Find out whether it is quiet, if the agent has quiet hours and what it knows of them has run out."""
        if spec.quiet_hours is None or self.state.hush_at(workflow.now()):
            return
        request = LookRequest(hours=spec.quiet_hours, at=workflow.now())
        self.state.hush = await self.quickly(interface.ClockActivities.look_at_clock, request, "is it quiet now?")

    async def quickly(
        self, method: MethodAsyncSingleParam[Any, _Request, _Result], request: _Request, summary: str
    ) -> _Result:
        """Call an activity within the workflow task; if that fails, as an activity whose retries an operator sees."""
        try:
            return await workflow.execute_local_activity_method(
                method, request, summary=summary, **interface.LEDGER_LOCAL
            )
        except FailureError as error:  # the SDK puts no ActivityError around what a local activity raises
            if is_cancelled_exception(error):
                raise
        return await workflow.execute_activity_method(method, request, summary=summary, **interface.LEDGER)

    @property
    def continue_as_new_is_due(self) -> bool:
        """Whether the history has grown long, and nobody waits for an update of this run."""
        return workflow.info().is_continue_as_new_suggested() and workflow.all_handlers_finished()

    def continue_as_new_if_due(self) -> None:
        """Go on in a new run, before the history grows long. Mail that has arrived goes along."""
        if self.continue_as_new_is_due:
            self.sort_mail()
            if not self.state.fits:
                return  # once there is less mail; until then ingest holds back what would make this run too long
            workflow.continue_as_new(AgentInput(state=self.state))

    # Telling the world -----------------------------------------------------------------------------------------------

    def reply_event(self, reply: Reply) -> Outgoing:
        """The event that carries a turn's answer to the reply topic."""
        return Outgoing(
            topic=names.REPLIES_TOPIC,
            id=reply.id,
            type=names.REPLY_TYPE,
            source=self.id,
            subject=self.address.key,
            time=workflow.now(),
            extensions={
                "tenant": self.address.tenant,
                "agent": self.address.agent,
                "causationid": " ".join(reference.id for reference in reply.answers),
            },
            data=reply.model_dump(mode="json"),
        )

    def say(self, kind: str, what: str, data: dict[str, JsonValue]) -> None:
        """Put a lifecycle event into the outbox."""
        self.state.outbox.append(
            Outgoing(
                topic=names.ACTIVITY_TOPIC,
                id=names.lifecycle_id(self.id, self.state.turn, what),
                type=kind,
                source=self.id,
                subject=self.address.key,
                time=workflow.now(),
                extensions={"tenant": self.address.tenant, "agent": self.address.agent},
                data=data,
            )
        )

    def announce(self, kind: str, intervention: Intervention) -> None:
        """Record that a person paused, resumed or stopped the agent."""
        verb = kind.split(".")[-2]
        why = f": {intervention.reason}" if intervention.reason else ""
        self.state.note(workflow.now(), f"{verb} by {intervention.by or 'somebody'}{why}")
        self.say(kind, f"{verb}-{workflow.uuid4()}", intervention.model_dump(mode="json"))
        active = "waiting" if self.state.open_calls else "active"
        active = names.OVER_BUDGET if self.state.is_over_budget else active
        word = active if kind == names.AGENT_RESUMED_TYPE else verb
        workflow.upsert_search_attributes([STATE_ATTRIBUTE.value_set(word)])

    def announce_rewind(self, rewound: Rewound) -> None:
        """Record that a person rewound or forked the agent."""
        is_fork = rewound.old_head is None
        verb, kind = ("forked", names.AGENT_FORKED_TYPE) if is_fork else ("rewound", names.AGENT_REWOUND_TYPE)
        left = "" if is_fork else f", {count(rewound.steps, 'step')} left behind"
        why = f": {rewound.reason}" if rewound.reason else ""
        place = f"entry {rewound.head[:12]} (turn {rewound.head_turn}, step {rewound.head_step})"
        self.state.note(workflow.now(), f"{verb} by {rewound.by or 'somebody'} to {place}{left}{why}")
        self.say(kind, f"{verb}-{rewound.number}", rewound.model_dump(mode="json"))

    async def publish(self) -> None:
        """Put out some of what was decided; what is refused for ever is noted, and does not hold up the rest."""
        messages = self.state.next_out()
        try:
            await workflow.execute_activity_method(
                interface.PublishActivities.publish,
                PublishRequest(messages=messages),
                summary=f"turn {self.state.turn}: {count(len(messages), 'event')} out",
                **interface.PUBLISH,
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self.state.note(workflow.now(), f"could not be published: {failure_message(error)}")
        self.state.outbox = self.state.outbox[len(messages) :]

    async def tell_occurrences(self) -> None:
        """Let the schedules' workflows end whose events have been answered; one that has given up needs no word."""
        while self.state.occurrences:
            occurrence = workflow.get_external_workflow_handle(self.state.occurrences[0])
            try:
                await occurrence.signal(names.ANSWERED)
            except FailureError as error:
                if is_cancelled_exception(error):
                    raise
            del self.state.occurrences[0]

    def show(self) -> None:
        """What the Web UI shows of this agent under "Current Details"."""
        state = self.state
        recent = "\n".join(f"- {item.at:%Y-%m-%d %H:%M:%S} {item.text}" for item in reversed(state.recent))
        workflow.set_current_details(
            f"**Now:** {state.activity()[1]}\n\n"
            f"**Waiting:** {len(state.mailbox.waiting)} events\n\n"
            f"**Spent:** {state.usage.input_tokens} tokens in, {state.usage.output_tokens} out, "
            f"{money(state.cost)}, {state.model_calls} model calls, {state.tool_calls} tool calls\n\n"
            f"**So far:** {state.turn} turns, {state.mailbox.accepted} events accepted, "
            f"{state.mailbox.duplicates} duplicates dropped, {state.failed_turns} failed turns\n\n"
            f"**Recent**\n{recent}"
        )


def money(cost: Cost) -> str:
    """What model calls have cost, in words."""
    more = f" and {count(cost.unpriced, 'call')} of unknown price" if cost.unpriced else ""
    return f"{usd(cost.micro_usd)}{more}"


def count(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
