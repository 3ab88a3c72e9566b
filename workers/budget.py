"""What `perennial budget` does: say what was spent of what may be, over the ledger; allow an agent more, over Temporal.

What can't be done is raised as `CommandError`, whose message is for the person at the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

from pydantic import BaseModel
from temporalio.client import Client, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from activities.ledger import Ledger
from activities.spend import Account, Spending
from workers import operations
from workers.exits import CommandError
from workers.settings import Settings
from workflows import names
from workflows.budget import Lifted, LiftRequest, Limit, LimitScope, Per
from workflows.names import Address
from workflows.spec import AgentSpec

_SECONDS = 20.0
_RPC = timedelta(seconds=10)
_LISTED = 100


class Allowed(BaseModel):
    """What a lift came to."""

    lifted: Lifted
    told: int
    """Other agents that waited for a budget of theirs and look again now."""


async def of_agent(settings: Settings, specs: Sequence[AgentSpec] | None, address: Address) -> list[Account]:
    """What an agent with this key, the agent and its tenant have spent, with the limits that its spec has now.

    Raises:
        CommandError: the ledger is away.
    """
    limits = [limit for spec in specs or [] if is_of(spec, address) for limit in spec.budget.limits]
    async with _spending(settings) as spending:
        found = [
            await spending.accounts(names.memory_place(address, scope.value), _of(limits, scope))
            for scope in LimitScope
        ]
    return [account for accounts in found for account in accounts]


async def of_tenant(settings: Settings, tenant: str) -> list[Account]:
    """What a tenant has spent, and then each of its agents this month, who has spent most first.

    Raises:
        CommandError: the ledger is away.
    """
    place = names.memory_place(Address(tenant, "any", "any"), LimitScope.TENANT.value)
    async with _spending(settings) as spending:
        return [*await spending.accounts(place), *await spending.below(place, Per.MONTH, limit=_LISTED)]


async def lift(client: Client, settings: Settings, address: Address, request: LiftRequest) -> Allowed:
    """Allow an agent more than a limit, waking it if need be, and have others look again that the limit is about.

    Raises:
        CommandError: the agent refuses, or no worker answers.
    """
    who = operations.shown(address)
    async with operations.plainly(settings, f"{who} can't be allowed more"):
        try:
            async with asyncio.timeout(_SECONDS):
                lifted = await operations.updated(client, settings, address, names.LIFT_BUDGET, request, Lifted)
        except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
            why = await operations.absent_workers(client, settings) or "it may yet do so"
            raise CommandError(f"{who} has not answered within {_SECONDS:g} s: {why}.") from error
        told = await _tell_others(client, address, lifted.scope)
    return Allowed(lifted=lifted, told=told)


async def _tell_others(client: Client, address: Address, scope: LimitScope) -> int:
    """Have all agents look again that wait for a budget, as far as it may be this one; how many there are."""
    if scope is LimitScope.KEY:
        return 0
    wanted = {names.STATE_ATTRIBUTE: names.OVER_BUDGET, names.TENANT_ATTRIBUTE: address.tenant}
    if scope is LimitScope.AGENT:
        wanted[names.AGENT_ATTRIBUTE] = address.agent
    query = " AND ".join(f"{name} = {operations.quoted(value)}" for name, value in wanted.items())
    told = 0
    async for found in client.list_workflows(f"ExecutionStatus = 'Running' AND {query}", rpc_timeout=_RPC):
        if found.id != names.workflow_id(address):
            with contextlib.suppress(RPCError):  # it has closed meanwhile; or else it looks again within the hour
                await client.get_workflow_handle(found.id).signal(names.CHECK_BUDGET, rpc_timeout=_RPC)
                told += 1
    return told


def is_of(spec: AgentSpec, address: Address) -> bool:
    """Whether it is this agent's spec."""
    return (spec.tenant, spec.name) == (address.tenant, address.agent)


def _of(limits: Sequence[Limit], scope: LimitScope) -> list[Limit]:
    return [limit for limit in limits if limit.scope is scope]


@contextlib.asynccontextmanager
async def _spending(settings: Settings) -> AsyncIterator[Spending]:
    try:
        async with Ledger(settings.ledger_url) as ledger:
            yield Spending(ledger)
    except (ApplicationError, ValueError) as error:
        why = error.message if isinstance(error, ApplicationError) else str(error)
        raise CommandError(f"{why}\nCorrect PERENNIAL_LEDGER_URL, or start the database.") from error
