"""How agents are talked to in tests: as ingest does, and as people do.

handle = await deliver(client, agent_id, queue, event(1), event(2))
reply = await ask(client, agent_id, queue, "Where is it?")
"""

from __future__ import annotations

import contextlib
from typing import Any

from temporalio.client import Client, WithStartWorkflowOperation, WorkflowFailureError, WorkflowHandle
from temporalio.common import WorkflowIDConflictPolicy

from workflows import names
from workflows.events import Delivery, Event
from workflows.messages import AskRequest, Reply
from workflows.state import AgentInput


async def deliver(client: Client, agent_id: str, queue: str, *events: Event) -> WorkflowHandle[Any, Any]:
    """Hand events to an agent as ingest does: one signal-with-start."""
    return await client.start_workflow(
        names.WORKFLOW_TYPE,
        AgentInput(),
        id=agent_id,
        task_queue=queue,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        start_signal=names.DELIVER,
        start_signal_args=[Delivery(events=list(events))],
    )


async def cancel(handle: WorkflowHandle[Any, Any]) -> None:
    """Cancel an agent from outside, and wait until it has closed: what is delivered before waits in its snapshot."""
    await handle.cancel()
    with contextlib.suppress(WorkflowFailureError):
        await handle.result()


async def ask(client: Client, agent_id: str, queue: str, text: str, question_id: str = "") -> Reply:
    """Ask as a person does: update-with-start."""
    reply: Reply = await client.execute_update_with_start_workflow(
        names.ASK,
        AskRequest(text=text, id=question_id),
        start_workflow_operation=WithStartWorkflowOperation(
            names.WORKFLOW_TYPE,
            AgentInput(),
            id=agent_id,
            task_queue=queue,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        ),
        result_type=Reply,
    )
    return reply
