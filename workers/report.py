"""All that is known of one agent, of Temporal and of the ledger: `perennial show`.

    told = await report(client, settings, address, limit=20)

While the agent is awake it is asked itself; else its snapshot in the ledger answers for it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import BaseModel
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowQueryFailedError
from temporalio.exceptions import ApplicationError
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


async def report(client: Client, settings: Settings, address: Address, *, limit: int) -> AgentReport:
    """Look an agent up.

    Args:
        client: Temporal's.
        settings: where the ledger and the Web UI are.
        address: which agent.
        limit: how many entries of the transcript, the newest.

    Raises:
        CommandError: there has never been such an agent, or Temporal or the ledger is away.
    """
    workflow_id = names.workflow_id(address)
    run = await operations.find(client, settings, address)
    awake = run is not None and run.status is WorkflowExecutionStatus.RUNNING
    try:
        async with Ledger(settings.ledger_url) as ledger:
            steps = await ledger.count(workflow_id)
            transcript = await ledger.transcript(workflow_id, limit=limit)
            snapshot = None if awake else await ledger.get_snapshot(workflow_id)
    except (ApplicationError, ValueError) as error:
        why = error.message if isinstance(error, ApplicationError) else str(error)
        raise CommandError(f"{why}\nCorrect PERENNIAL_LEDGER_URL, or start the database.") from error
    if run is None and snapshot is None and not steps:
        raise CommandError(
            f"There has never been an agent {operations.shown(address)}. `perennial agents` lists those there are."
        )
    note = ""
    status = snapshot.state.status(workflow_id) if snapshot else None
    if awake:
        status, note = await status_of(client, settings, workflow_id)
    return AgentReport(
        agent=operations.shown(address),
        workflow_id=workflow_id,
        state=operations.state_of(run) if run else "asleep",
        awake=awake,
        since=(run.close_time or run.start_time) if run else None,
        status=status,
        note=note,
        steps=steps,
        transcript=transcript,
        link=operations.ui_link(settings, workflow_id),
    )


async def status_of(client: Client, settings: Settings, workflow_id: str) -> tuple[Status | None, str]:
    """What an agent that is awake says of itself, or why it says nothing."""
    handle = client.get_workflow_handle(workflow_id)
    try:
        status: Status = await handle.query(names.STATUS, result_type=Status, rpc_timeout=_QUERY)
    except (RPCError, WorkflowQueryFailedError) as error:
        absent = await operations.absent_workers(client, settings)
        return None, f"the agent does not answer: {absent or error}"
    return status, ""
