"""An agent's control state in the ledger: what it wakes with, and what it leaves when it closes.

state = AgentLedger(ledger)
activities = [state.wake, state.keep_snapshot, state.find_reply, state.record_rewind]
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from temporalio import activity
from temporalio.exceptions import ApplicationError
from typing_extensions import override

from activities import history
from activities.conversation import storable
from activities.entries import Entry, InterruptMessage, ToolMessage
from activities.forms import Form, Reading
from activities.heartbeat import beating
from activities.ledger import Ledger
from activities.spend import Spending
from activities.steps import decision, entry_of, new_messages, references
from workflows import names, repair
from workflows.budget import Cost
from workflows.interface import LedgerActivities
from workflows.messages import (
    Approval,
    CloseRequest,
    Decision,
    Reply,
    ReplyRequest,
    RewindRecord,
    Rewound,
    TurnOutcome,
    Usage,
)
from workflows.state import AgentState, Snapshot

_CALLS_TOLD = 50
_ARGUMENTS_TOLD = 500
_ENTRIES_READ = 2000  # as many as an agent remembers ids by default (MailboxSpec.remember_ids)


class AgentLedger(LedgerActivities):
    """Reads and keeps agents' states."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._spending = Spending(ledger)

    @override
    @activity.defn(name="wake")
    async def wake(self, workflow_id: str) -> AgentState | None:
        """The newest snapshot, brought up to date with what was recorded after it.

        A workflow that was terminated has left no snapshot, but its entries are there: the agent goes on behind its
        newest entry, and knows the events that its entries answer.
        """
        snapshot = await self._ledger.get_snapshot(workflow_id)
        state = snapshot.state if snapshot else AgentState()
        # The turn in progress may have recorded steps that the snapshot knows nothing of: they are found by their key.
        entries = await self._ledger.since(workflow_id, state.turn, limit=_ENTRIES_READ)
        rewinds = await self._ledger.rewinds(workflow_id, after=state.rewound)
        if not snapshot and not entries and not rewinds:
            return None
        state = caught_up(state, entries, rewinds)
        state.cost += await self._spending.cost([entry.id for entry in entries])
        return state

    @override
    @activity.defn(name="keep_snapshot")
    async def keep_snapshot(self, snapshot: Snapshot) -> None:
        await self._ledger.put_snapshot(snapshot)

    @override
    @activity.defn(name="find_reply")
    async def find_reply(self, request: ReplyRequest) -> Reply | None:
        entries = await self._ledger.of_turn(request.workflow_id, request.turn)
        if not entries:
            return None
        digest = entries[-1].spec_digest
        spec = await self._ledger.get_spec(digest) if digest else None
        reply = reply_of(entries, Form(spec.reply.json_schema) if spec and spec.reply else None)
        return reply.model_copy(update={"cost": await self._spending.cost([one.id for one in entries])})

    @override
    @activity.defn(name="record_approval")
    async def record_approval(self, approval: Approval) -> None:
        await self._ledger.put_approval(approval)

    @override
    @activity.defn(name="close_step")
    async def close_step(self, request: CloseRequest) -> Decision:
        step, ledger = request.step, self._ledger
        why = InterruptMessage(text=storable(request.why), cancelled=request.cancelled)
        entry, cost = await self._spending.record(
            entry_of(step, [*new_messages(step), why], answers=references(step)), Cost()
        )
        spec = await ledger.get_spec(step.spec_digest)
        return decision(entry, Form(spec.reply.json_schema) if spec.reply else None, cost)

    @override
    @activity.defn(name="record_rewind")
    async def record_rewind(self, record: RewindRecord) -> Rewound:
        async with beating():
            return await self._record_rewind(record)

    async def _record_rewind(self, record: RewindRecord) -> Rewound:
        request, ledger = record.request, self._ledger
        made = await ledger.rewind_of(record.workflow_id, request.id)
        if made and (made.number <= record.known or made.turn == record.turn):
            return made  # else it came too late: the agent has gone on without it, and goes back now
        if record.fork and record.lived:
            raise _refused(f"{record.workflow_id} has lived already; only a new agent can be a fork.")
        if request.over and request.over != record.head:
            raise _refused(f"{record.workflow_id} has gone on since, to entry {record.head}.", names.GONE_ON)
        entry = next(iter(await ledger.entries([request.entry])), None)
        if entry is None:
            raise _refused(f"There is no entry {request.entry} in the ledger.")
        left = history.LeftBehind()
        if record.fork:
            if names.parse_workflow_id(entry.workflow_id)[:2] != names.parse_workflow_id(record.workflow_id)[:2]:
                raise _refused(f"Entry {entry.id} is of {entry.workflow_id}: a fork is of the same tenant and agent.")
        elif not await history.is_of(ledger, record.workflow_id, entry):
            raise _refused(
                f"Entry {entry.id} is of {entry.workflow_id}, and on no branch of {record.workflow_id}. "
                "A fork can begin there."
            )
        elif record.head:
            left = await history.left_behind(
                ledger, record.head, entry.id, limit=_CALLS_TOLD, characters=_ARGUMENTS_TOLD
            )
        rewound = Rewound(
            id=request.id,
            workflow_id=record.workflow_id,
            turn=record.turn,
            head=entry.id,
            head_turn=entry.turn,
            head_step=entry.step,
            old_head=None if record.fork else record.head,
            by=request.by,
            reason=request.reason,
            **left.model_dump(),
            recorded_at=datetime.now(UTC).isoformat(),
        )
        return await ledger.put_rewind(rewound)


def _refused(message: str, kind: str = names.REFUSED) -> ApplicationError:
    return ApplicationError(message, type=kind, non_retryable=True)


def caught_up(state: AgentState, entries: list[Entry], rewinds: Sequence[Rewound] = ()) -> AgentState:
    """The state after these entries, the steps of turns that came after it, and these rewinds; oldest first."""
    state = state.model_copy(deep=True)
    for entry in entries:
        state.current = None  # a turn that came later has ended it
        state.turn = entry.turn
        state.head = entry.id
        state.usage += entry.usage
        state.model_calls += entry.interruption is None
        state.tool_calls += sum(isinstance(message, ToolMessage) for message in entry.messages)
        for reference in entry.answers:
            if not state.mailbox.seen.get(reference.digest):
                state.mailbox.accepted += reference.digest not in state.mailbox.seen
                state.mailbox.seen[reference.digest] = entry.turn
        state.mailbox.drop({reference.digest for reference in entry.answers})
    # A rewind counts until the next turn. One that the agent has gone on without, by terminations, is of the past.
    if rewinds and rewinds[-1].turn >= state.turn:
        state.current = None
        state.turn = rewinds[-1].turn
        state.rewind(rewinds[-1])
    return state


def reply_of(entries: list[Entry], form: Form | None = None) -> Reply:
    """The reply of a turn, from its entries in the order of their steps; it had to fit this form."""
    last = entries[-1]
    interruption = last.interruption
    unfinished = bool(last.answer and last.answer.tool_calls) or interruption is not None
    cancelled = interruption is not None and interruption.cancelled
    error = (interruption.text if interruption and cancelled else last.error) or (
        "the turn ended before there was an answer" if unfinished else None
    )
    reading = form.read(last.answer.text) if form and last.answer and not unfinished else Reading()
    if reading.faults:
        error = repair.failure(reading.faults)
    elif form is None and not error and last.answer and not last.answer.text.strip():
        error = repair.NOTHING
    return Reply(
        id=names.reply_id(last.workflow_id, last.turn, 0),
        workflow_id=last.workflow_id,
        turn=last.turn,
        text=last.answer.text if last.answer and not reading.faults else "",
        data=reading.data,
        outcome=_outcome(error, cancelled=cancelled),
        error=error,
        answers=[reference for entry in entries for reference in entry.answers],
        usage=sum((entry.usage for entry in entries), Usage()),
        steps=sum(entry.interruption is None for entry in entries),
        tool_calls=sum(isinstance(message, ToolMessage) for entry in entries for message in entry.messages),
        model=last.model,
        rehearsal=last.rehearsal,
        entry=last.id,
    )


def _outcome(error: str | None, *, cancelled: bool) -> TurnOutcome:
    if cancelled:
        return TurnOutcome.CANCELLED
    return TurnOutcome.FAILED if error else TurnOutcome.COMPLETED
