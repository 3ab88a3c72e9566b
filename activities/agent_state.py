"""An agent's control state in the ledger: what it wakes with, and what it leaves when it closes.

state = AgentLedger(ledger)
activities = [state.wake, state.keep_snapshot, state.find_reply]
"""

from __future__ import annotations

from temporalio import activity
from typing_extensions import override

from activities.entries import Entry, ToolMessage
from activities.ledger import Ledger
from workflows import names
from workflows.interface import LedgerActivities
from workflows.messages import Reply, ReplyRequest, TurnOutcome, Usage
from workflows.state import AgentState, Snapshot

_ENTRIES_READ = 2000  # as many as an agent remembers ids by default (MailboxSpec.remember_ids)


class AgentLedger(LedgerActivities):
    """Reads and keeps agents' states."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

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
        if not snapshot and not entries:
            return None
        return caught_up(state, entries)

    @override
    @activity.defn(name="keep_snapshot")
    async def keep_snapshot(self, snapshot: Snapshot) -> None:
        await self._ledger.put_snapshot(snapshot)

    @override
    @activity.defn(name="find_reply")
    async def find_reply(self, request: ReplyRequest) -> Reply | None:
        entries = await self._ledger.of_turn(request.workflow_id, request.turn)
        return reply_of(entries) if entries else None


def caught_up(state: AgentState, entries: list[Entry]) -> AgentState:
    """The state after these entries, the steps of turns that came after it; oldest first."""
    state = state.model_copy(deep=True)
    for entry in entries:
        state.current = None  # a turn that came later has ended it
        state.turn = entry.turn
        state.head = entry.id
        state.usage += entry.usage
        state.model_calls += 1
        state.tool_calls += sum(isinstance(message, ToolMessage) for message in entry.messages)
        for reference in entry.answers:
            if not state.mailbox.seen.get(reference.digest):
                state.mailbox.accepted += reference.digest not in state.mailbox.seen
                state.mailbox.seen[reference.digest] = entry.turn
        answered = {reference.digest for reference in entry.answers}
        state.mailbox.waiting = [event for event in state.mailbox.waiting if event.digest not in answered]
    return state


def reply_of(entries: list[Entry]) -> Reply:
    """The reply of a turn, from its entries in the order of their steps."""
    last = entries[-1]
    unfinished = bool(last.answer and last.answer.tool_calls)
    error = last.error or ("the turn ended before there was an answer" if unfinished else None)
    return Reply(
        id=names.reply_id(last.workflow_id, last.turn, 0),
        workflow_id=last.workflow_id,
        turn=last.turn,
        text=last.answer.text if last.answer else "",
        outcome=TurnOutcome.FAILED if error else TurnOutcome.COMPLETED,
        error=error,
        answers=[reference for entry in entries for reference in entry.answers],
        usage=sum((entry.usage for entry in entries), Usage()),
        steps=len(entries),
        tool_calls=sum(isinstance(message, ToolMessage) for entry in entries for message in entry.messages),
        model=last.model,
        rehearsal=last.rehearsal,
        entry=last.id,
    )
