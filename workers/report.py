"""All that is known of one agent, of Temporal and of the ledger: `perennial show`.

    told = await report(client, settings, address, limit=20)

While the agent is awake it is asked itself; else its snapshot in the ledger answers for it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import BaseModel
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus, WorkflowQueryFailedError
from temporalio.service import RPCError

from activities.entries import Entry
from activities.ledger import Ledger
from workers import operations
from workers.exits import CommandError
from workers.settings import Settings
from workflows import names
from workflows.messages import Status
from workflows.names import Address

_QUERY = timedelta(seconds=5)


class Step(Entry):
    """An entry of the transcript, with its id."""

    entry_id: str


class AgentReport(BaseModel):
    """One agent: what it does, what it has spent, what was said."""

    agent: str
    """tenant/agent/key"""
    workflow_id: str
    state: str
    awake: bool
    since: datetime | None
    status: Status | None
    """By the agent itself while it is awake, else by its snapshot; None when neither answers."""
    note: str = ""
    """Why there is no status."""
    steps: int
    """Entries in the ledger."""
    transcript: list[Entry]
    """The newest of them, oldest first."""
    link: str
    """Where the Web UI shows the agent."""
