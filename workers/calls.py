"""What `perennial approvals` and `perennial tool` do: which tool calls wait, decide about one, answer one.

    found = await waiting(client, settings, Waits.APPROVAL, tenant="store")
    settlement = await decide(client, settings, DecideRequest(call=found.calls[0].call, approve=True, by="ada"))

A call's id begins with the workflow id of its agent, so it says whom to tell. What can't be done is raised as
`CommandError`, whose message is for the person at the terminal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from pydantic import BaseModel
from temporalio.client import Client, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.exceptions import ApplicationError

from workers import history, operations
from workers.exits import BAD_INPUT, CommandError
from workers.report import report, status_of
from workers.settings import Settings
from workflows import names
from workflows.calls import told
from workflows.messages import Approval, CompleteRequest, DecideRequest, OpenCall, Settlement, Status, Waits
from workflows.names import Address

_SECONDS = 20.0
_ASKED_AT_ONCE = 20
_LOOKED_THROUGH = 10_000
_ANSWER_BYTES = 1_000_000  # Temporal refuses payloads of more than two million
_MAY_WAIT = ("waiting", "paused", "stopped")
"""`PerennialState` of agents whose calls may wait: one that is paused or stopped meanwhile is shown as that."""


class CallOf(OpenCall):
    """A call that waits, and whose it is."""

    agent: str
    """tenant/agent/key"""


class Found(BaseModel):
    """The calls that wait, the oldest first."""

    calls: list[CallOf]
    silent: list[str] = []
    """Agents whose calls are not among them, since they do not answer, and why."""


# Which wait -------------------------------------------------------------------------------------------------------


async def waiting_of(client: Client, settings: Settings, waits_for: Waits, address: Address) -> Found:
    """The calls of one agent that wait for this; of one that is asleep, as it will go on when it is woken.

    Raises:
        CommandError: there has never been such an agent, or Temporal or the ledger is away.
    """
    agent = await report(client, settings, address, limit=0)
    if agent.status is None:
        return Found(calls=[], silent=[f"{agent.agent}: {agent.note}"] if agent.note else [])
    return Found(calls=_of(address, agent.status, waits_for))


async def waiting(  # noqa: PLR0913  # one for each filter
    client: Client,
    settings: Settings,
    waits_for: Waits,
    *,
    tenant: str | None = None,
    agent: str | None = None,
    limit: int = 100,
) -> Found:
    """The calls that wait for this, of all agents that are awake.

    Args:
        client: Temporal's.
        settings: for messages.
        waits_for: a decision, or an answer.
        tenant: only of this tenant's agents.
        agent: only of agents of this name.
        limit: how many agents to ask at most, those that were started last.

    Raises:
        CommandError: Temporal is away.
    """
    agents = await operations.list_agents(client, settings, tenant=tenant, agent=agent, states=_MAY_WAIT, limit=limit)
    gate = asyncio.Semaphore(_ASKED_AT_ONCE)
    calls: list[CallOf] = []
    silent: list[str] = []

    async def ask(workflow_id: str) -> None:
        address = names.parse_workflow_id(workflow_id)
        async with gate:
            status, note = await status_of(client, settings, workflow_id)
        if status:
            calls.extend(_of(address, status, waits_for))
        else:
            silent.append(f"{operations.shown(address)}: {note}")

    await asyncio.gather(*(ask(one.workflow_id) for one in agents))
    return Found(calls=sorted(calls, key=lambda call: (call.since, call.call)), silent=sorted(silent))


def _of(address: Address, status: Status, waits_for: Waits) -> list[CallOf]:
    agent = operations.shown(address)
    return [CallOf(agent=agent, **call.model_dump()) for call in status.open_calls if call.waits_for is waits_for]


async def decided(
    settings: Settings,
    *,
    address: Address | None = None,
    tenant: str | None = None,
    agent: str | None = None,
    limit: int = 100,
) -> list[Approval]:
    """What was decided, the newest first, by people or by expiry.

    Args:
        settings: where the ledger is.
        address: only about calls of this agent.
        tenant: only of this tenant's agents.
        agent: only of agents of this name.
        limit: how many at most.

    Raises:
        CommandError: the ledger is away.
    """
    async with history.opened(settings) as ledger:
        look = limit if tenant is None and agent is None else _LOOKED_THROUGH
        found = await ledger.approvals(names.workflow_id(address) if address else None, limit=look)
    return list(_wanted(found, tenant, agent))[:limit]


def _wanted(found: Iterable[Approval], tenant: str | None, agent: str | None) -> Iterable[Approval]:
    for one in found:
        whose = names.parse_workflow_id(one.workflow_id)
        if tenant in {None, whose.tenant} and agent in {None, whose.agent}:
            yield one


# Settle one -------------------------------------------------------------------------------------------------------


async def decide(client: Client, settings: Settings, request: DecideRequest) -> Settlement:
    """Decide about a call that waits for it. The same decision by the same person again has no further effect.

    Raises:
        CommandError: it waits for none, is decided otherwise, is no call's id, or nobody answers.
    """
    return await _settle(client, settings, names.DECIDE, request, Waits.APPROVAL)


async def complete(client: Client, settings: Settings, request: CompleteRequest) -> Settlement:
    """Answer a call whose answer comes from outside. The same person's answer again has no further effect.

    Raises:
        CommandError: it waits for none, is no call's id, the answer is too long, or nobody answers.
    """
    if (size := len(request.content.encode())) > _ANSWER_BYTES:
        raise CommandError(
            f"The answer has {size} bytes; at most {_ANSWER_BYTES} are taken. Put it where a tool of the agent finds "
            "it, and answer with its place.",
            BAD_INPUT,
        )
    return await _settle(client, settings, names.COMPLETE, request, Waits.ANSWER)


def address_of(call: str) -> Address:
    """Whose call it is.

    Raises:
        CommandError: the text is no call's id.
    """
    try:
        return names.parse_workflow_id(names.parse_call_key(call)[0])
    except ValueError as error:
        raise CommandError(
            f"{call!r} is no call's id: those look like agent/TENANT/AGENT/KEY/TURN/STEP/NUMBER. `perennial "
            "approvals` and `perennial tool list` name them.",
            BAD_INPUT,
        ) from error


async def _settle(
    client: Client,
    settings: Settings,
    update: str,
    request: DecideRequest | CompleteRequest,
    waits_for: Waits,
) -> Settlement:
    address = address_of(request.call)
    who = operations.shown(address)
    known = await report(client, settings, address, limit=0)  # whoever has never lived is not to begin by this
    async with operations.plainly(settings, f"{who} can't be told"):
        try:
            async with asyncio.timeout(_SECONDS):
                return await operations.updated(client, settings, address, update, request, Settlement)
        except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
            why = await operations.absent_workers(client, settings) or "it may yet take it"
            raise CommandError(f"{who} has not answered within {_SECONDS:g} s: {why}.") from error
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            if not isinstance(cause, ApplicationError) or cause.type not in {names.NOT_OPEN, names.SETTLED}:
                raise
            more = ""
            if cause.type == names.NOT_OPEN:
                more = _other(request.call, waits_for, known.status) or await _earlier(settings, request.call)
            raise CommandError(f"{cause.message} {more}".rstrip()) from error


def _other(call: str, waits_for: Waits, status: Status | None) -> str:
    """That the call waits for the other thing, if so."""
    if status is None or not any(one.call == call and one.waits_for is not waits_for for one in status.open_calls):
        return ""
    if waits_for is Waits.ANSWER:
        return f"It waits for a decision: `perennial approvals approve {call}`."
    return f"It is made, and waits for its answer: `perennial tool complete {call}`."


async def _earlier(settings: Settings, call: str) -> str:
    """What was decided about a call longer ago than its agent remembers; nothing if there was nothing to decide."""
    found = await decided(settings, address=address_of(call), limit=_LOOKED_THROUGH)
    one = next((one for one in found if one.call == call), None)
    if one is None:
        return "`perennial approvals` and `perennial tool list` say which do."
    settlement = Settlement(
        call=call, waits_for=Waits.APPROVAL, approved=one.approved, by=one.by, why=one.why, at=one.decided_at
    )
    return f"It {told(settlement)}."
