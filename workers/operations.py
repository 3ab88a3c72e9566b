"""What the command does with agents, over Temporal and the ledger: find, ask, list, show, steer.

    address = resolve("logistics/order-42", specs)
    client = await connect(settings)
    reply = await ask(client, settings, address, "Where is it?", timeout=60)

What can't be done is raised as `CommandError`, whose message is for the person at the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote
from uuid import uuid4

from pydantic import BaseModel
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.errordetails.v1 import NamespaceNotFoundFailure
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowExecution,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import SearchAttributeKey, WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities import documents
from workers import wiring
from workers.exits import BAD_INPUT, CommandError
from workers.settings import Settings
from workflows import names
from workflows.events import Event
from workflows.messages import AskRequest, Intervention, Reply, Status, SteerRequest, Waits
from workflows.names import Address
from workflows.spec import AgentSpec, ResolvedSpec
from workflows.state import AgentInput

if TYPE_CHECKING:
    from activities.specs import SpecSet

R = TypeVar("R")

_CONNECT_SECONDS = 10.0
_RPC = timedelta(seconds=10)
_QUIET_SECONDS = 3.0
"""After how long without an answer we look whether there are workers at all."""
_MOVED_DELAY = 0.2
_STEER_SECONDS = 20.0

_TO_ASK_AGAIN = {"AcceptedUpdateCompletedWorkflow", names.MOVING}

_STATE = SearchAttributeKey.for_keyword(names.STATE_ATTRIBUTE)


class AgentSummary(BaseModel):
    """A line of `perennial agents`."""

    agent: str
    """tenant/agent/key"""
    tenant: str
    name: str
    key: str
    state: str
    """active, paused, stopped; asleep once its workflow has closed; failed, terminated, canceled or timed out."""
    since: datetime
    """When its newest run began, or ended if it has."""
    hint: str
    workflow_id: str
    run_id: str


class CheckedSpec(AgentSpec):
    """A spec that is in order, and the names of the tools its agent is offered."""

    offers: list[str]


# Who --------------------------------------------------------------------------------------------------------------


def known_specs(folder: Path) -> list[AgentSpec] | None:
    """The specs in a folder, without their tools; None when there is no such folder.

    Reading the tools too would import them, and the model library: that takes a second.

    Raises:
        CommandError: a spec is wrong; the message says where.
    """
    if not folder.is_dir():
        return None
    try:
        return [documents.read(path, AgentSpec)[0] for path in documents.files(folder)]
    except documents.DocumentError as error:
        check_specs(folder)  # names the faults of all files, and of the tools
        raise CommandError(f"The specs in {folder} can't be read: {error}", BAD_INPUT) from error


def check_specs(folder: Path) -> list[AgentSpec]:
    """The specs in a folder, with everything checked that the workers check when they start.

    Raises:
        CommandError: a spec is wrong; all faults are named, with file and line.
    """
    return _loaded(folder).agents


def check_specs_and_servers(folder: Path, *, ask_servers: bool) -> list[CheckedSpec]:
    """The specs in a folder, with the tools that their agents are offered.

    Args:
        folder: where the YAML files are.
        ask_servers: ask the MCP servers for their tools, starting those that are commands.

    Raises:
        CommandError: a spec or an MCP server is wrong; all faults are named, with file and line.
    """
    from activities.specs import check_servers  # noqa: PLC0415  # imports the model library: a second
    from workers.agent import mcp_servers  # noqa: PLC0415

    async def asked() -> tuple[dict[tuple[str, str], ResolvedSpec], list[str]]:
        async with mcp_servers(folder) as servers:
            return await check_servers(specs, servers)

    specs = _loaded(folder)
    resolved, faults = asyncio.run(asked()) if ask_servers else ({}, [])
    if faults:
        raise CommandError("\n".join(faults), BAD_INPUT)
    return [
        CheckedSpec(
            **agent.spec.model_dump(exclude_unset=True),
            offers=[tool.name for tool in (resolved[agent.name].tools if ask_servers else agent.definitions)],
        )
        for agent in specs
    ]


def _loaded(folder: Path) -> SpecSet:
    from activities.specs import SpecError, load_specs  # noqa: PLC0415  # imports the model library: a second

    try:
        return load_specs(folder)
    except SpecError as error:
        raise CommandError(str(error), BAD_INPUT) from error


def resolve(text: str, specs: Sequence[AgentSpec] | None) -> Address:
    """The agent somebody means by `tenant/agent/key`, `agent/key` or its workflow id.

    Args:
        text: what was typed. The key may contain slashes, except in a workflow id, where they are percent-encoded.
        specs: those that are known, to find the tenant and to refuse what is not there; None: anything goes.

    Raises:
        CommandError: there is no such agent, or more than one.
    """
    address = _parse(text, specs)
    if not all(address):
        missing = "key" if address.agent else "agent"
        raise CommandError(
            f"{text!r} names no {missing}: write {address.agent or 'AGENT'}/KEY. The key says which one is meant, "
            "as in customer-service/customer-17.",
            BAD_INPUT,
        )
    try:
        names.workflow_id(address)
    except ValueError as error:
        raise CommandError(
            f"{text!r} is no agent: {error}. Expected TENANT/AGENT/KEY or AGENT/KEY.", BAD_INPUT
        ) from error
    return address


def _parse(text: str, specs: Sequence[AgentSpec] | None) -> Address:
    with contextlib.suppress(ValueError):
        return names.parse_workflow_id(text)
    tenant, _, rest = text.partition("/")
    agent, _, key = rest.partition("/")
    if specs is None:
        return Address(tenant, agent, key) if key else Address("default", tenant, rest)
    if key and any((spec.tenant, spec.name) == (tenant, agent) for spec in specs):
        return Address(tenant, agent, key)
    tenants = [spec.tenant for spec in specs if spec.name == tenant]
    if len(tenants) == 1:
        return Address(tenants[0], tenant, rest)
    if tenants:
        raise CommandError(
            f"{text!r} may be an agent of several tenants: {', '.join(sorted(tenants))}. Write TENANT/AGENT/KEY.",
            BAD_INPUT,
        )
    known = ", ".join(sorted(f"{spec.tenant}/{spec.name}" for spec in specs)) or "none"
    raise CommandError(f"There is no agent for {text!r}. Known are: {known}. Write TENANT/AGENT/KEY.", BAD_INPUT)


def shown(address: Address) -> str:
    """An address as people write it: tenant/agent/key."""
    return "/".join(address)


def ui_link(settings: Settings, workflow_id: str) -> str:
    """Where the Web UI shows this agent."""
    namespace = quote(settings.temporal_namespace, safe="")
    return f"{settings.temporal_ui.rstrip('/')}/namespaces/{namespace}/workflows/{quote(workflow_id, safe='')}"


# Temporal ---------------------------------------------------------------------------------------------------------


async def deliver(client: Client, settings: Settings, address: Address, event: Event) -> None:
    """Put an event into an agent's mailbox, behind Kafka's back.

    Raises:
        CommandError: Temporal does not take it.
    """
    async with plainly(settings, f"{shown(address)} can't be told"):
        await wiring.deliver(client, settings.task_queue, address, [event])


async def connect(settings: Settings) -> Client:
    """A Temporal client.

    Raises:
        CommandError: Temporal is away; the message says where it was looked for and what to do.
    """
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            return await wiring.connect(settings)
    except (RuntimeError, TimeoutError) as error:
        raise CommandError(_away(settings, str(error))) from error


def _away(settings: Settings, why: str) -> str:
    # An ordinary refusal is a page of the HTTP library's own words.
    detail = "" if not why or "refused" in why else f" ({why})"
    if "dns error" in why:
        detail = " (there is no host of that name)"
    return (
        f"Temporal at {settings.temporal_address} does not answer{detail}. Start the embedded stack with "
        "`perennial dev`, or set PERENNIAL_TEMPORAL_ADDRESS."
    )


@contextlib.asynccontextmanager
async def plainly(settings: Settings, what: str) -> AsyncIterator[None]:
    """Temporal's refusals as messages for people.

    Raises:
        CommandError: instead of Temporal's errors.
    """
    try:
        yield
    except WorkflowUpdateFailedError as error:
        cause = error.cause
        raise CommandError(f"{what}: {getattr(cause, 'message', cause)}") from error
    except RPCError as error:
        if error.status in {RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED}:
            raise CommandError(_away(settings, error.message)) from error
        raise CommandError(
            f"{what}: Temporal at {settings.temporal_address}, namespace {settings.temporal_namespace!r}, answers: "
            f"{error.message} ({error.status.name})"
        ) from error


async def pollers(client: Client, task_queue: str, kind: TaskQueueType.ValueType) -> list[str]:
    """Who has polled a task queue in the last minutes: the identities of its workers."""
    answer = await client.workflow_service.describe_task_queue(
        DescribeTaskQueueRequest(
            namespace=client.namespace, task_queue=TaskQueue(name=task_queue), task_queue_type=kind
        ),
        timeout=_RPC,
    )
    return [poller.identity for poller in answer.pollers]


async def missing_workers(client: Client, settings: Settings) -> str:
    """What to say of workers that are not there; empty when all are."""
    queue = settings.task_queue
    agents, models = await asyncio.gather(
        pollers(client, queue, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW),
        pollers(client, names.model_queue(queue), TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
    )
    absent = [
        f"no {name} worker polls the task queue {of!r} (start one: `perennial worker {name}`)"
        for name, of, found in (("agent", queue, agents), ("model", names.model_queue(queue), models))
        if not found
    ]
    return "; ".join(absent)


# Ask --------------------------------------------------------------------------------------------------------------


async def ask(  # noqa: PLR0913  # who asks whom what, and how long to wait
    client: Client,
    settings: Settings,
    address: Address,
    request: AskRequest,
    *,
    seconds: float,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Reply:
    """Ask an agent, waking it if need be, and wait for its reply.

    Args:
        client: Temporal's.
        settings: for the task queue.
        address: whom to ask.
        request: the question; without an id it is given one.
        seconds: how long to wait.
        on_wait: told when the answer takes long, since a worker is missing, or a tool call waits for people.

    Raises:
        CommandError: there was no answer in time, or the agent refuses the question.
    """
    request = request if request.id else request.model_copy(update={"id": str(uuid4())})
    asking = asyncio.ensure_future(_ask(client, settings, address, request))
    try:
        done, _ = await asyncio.wait([asking], timeout=min(seconds, _QUIET_SECONDS))
        if not done and seconds > _QUIET_SECONDS:
            if why := await _held_up(client, settings, address):
                on_wait(why)
            done, _ = await asyncio.wait([asking], timeout=seconds - _QUIET_SECONDS)
        if not done:
            why = (
                await _held_up(client, settings, address)
                or "the agent is still at it; `perennial show` tells what it does"
            )
            raise CommandError(
                f"{shown(address)} has not answered within {seconds:g} s: {why}. "
                f"Ask again with `--id {request.id}` to get the reply to this question."
            )
        async with plainly(settings, f"{shown(address)} does not answer"):
            return await asking
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _held_up(client: Client, settings: Settings, address: Address) -> str:
    """What an agent's answer waits for, other than its model and tools; empty if nothing is known."""
    if absent := await absent_workers(client, settings):
        return absent
    handle = client.get_workflow_handle(names.workflow_id(address))
    try:
        status: Status = await handle.query(names.STATUS, result_type=Status, rpc_timeout=_RPC)
    except (RPCError, WorkflowQueryFailedError):
        return ""
    calls = [call for call in status.open_calls if call.waits_for is Waits.APPROVAL]
    if not calls:
        return ""
    return f"{calls[0].tool} waits for a decision: `perennial approvals {shown(address)}`"


async def absent_workers(client: Client, settings: Settings) -> str:
    """As `missing_workers`; when Temporal does not say, that."""
    try:
        return await missing_workers(client, settings)
    except RPCError as error:
        return f"Temporal at {settings.temporal_address} does not say whether there are workers: {error.message}"


async def _ask(client: Client, settings: Settings, address: Address, request: AskRequest) -> Reply:
    return await updated(client, settings, address, names.ASK, request, Reply, update_id=request.id)


async def updated(  # noqa: PLR0913, PLR0917  # whom, what, and what comes back
    client: Client,
    settings: Settings,
    address: Address,
    update: str,
    request: BaseModel,
    result: type[R],
    update_id: str | None = None,
) -> R:
    """Send an update to an agent, waking or starting it, for as long as it takes; again when it was between two runs.

    Raises:
        WorkflowUpdateFailedError: the agent refuses.
        RPCError: Temporal is away or refuses.
    """
    while True:
        start: WithStartWorkflowOperation[object, None] = WithStartWorkflowOperation(
            names.WORKFLOW_TYPE,
            AgentInput(),
            **wiring.start_options(address, settings.task_queue),
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        try:
            answer: R = await client.execute_update_with_start_workflow(
                update, request, start_workflow_operation=start, result_type=result, id=update_id
            )
        except WorkflowUpdateRPCTimeoutOrCancelledError:
            # The server lets a call wait for so long and no longer. Our own cancellation looks the same.
            if (task := asyncio.current_task()) and task.cancelling():
                raise
        except WorkflowUpdateFailedError as error:
            # The agent closed or continued as new before it had taken the update: its next run takes it.
            if not (isinstance(error.cause, ApplicationError) and error.cause.type in _TO_ASK_AGAIN):
                raise
        except RPCError as error:
            if error.status not in {RPCStatusCode.NOT_FOUND, RPCStatusCode.ABORTED} or _no_namespace(error):
                raise
        else:
            return answer
        finally:
            # The start's own outcome, which nobody else asks for: asyncio would complain on standard error.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(0):
                    await start.workflow_handle()
        await asyncio.sleep(_MOVED_DELAY)


def _no_namespace(error: RPCError) -> bool:
    """Whether it is the namespace that was not found; an agent may be found again, a namespace not."""
    return any(detail.Is(NamespaceNotFoundFailure.DESCRIPTOR) for detail in error.grpc_status.details)


# List -------------------------------------------------------------------------------------------------------------


_AT_REST = {
    WorkflowExecutionStatus.COMPLETED: "asleep",
    WorkflowExecutionStatus.FAILED: "failed",
    WorkflowExecutionStatus.CANCELED: "canceled",
    WorkflowExecutionStatus.TERMINATED: "terminated",
    WorkflowExecutionStatus.TIMED_OUT: "timed out",
}
_HINTS = {
    names.OVER_BUDGET: "a turn waits; `perennial show` says for what, `perennial budget lift` allows more",
    "waiting": "a tool call waits; `perennial show` says for what",
    "paused": "its mail waits; `perennial resume` lets it go on",
    "asleep": "its next event wakes it",
    "failed": "its next event starts it again; the Web UI says why it failed",
}


async def list_agents(  # noqa: PLR0913  # one for each filter
    client: Client,
    settings: Settings,
    *,
    tenant: str | None = None,
    agent: str | None = None,
    states: Sequence[str] = (),
    limit: int = 100,
) -> list[AgentSummary]:
    """The agents there are, the newest first, each once.

    Args:
        client: Temporal's.
        settings: for messages.
        tenant: only of this tenant.
        agent: only of this name.
        states: only those that are awake and in one of these states.
        limit: how many at most.

    Raises:
        CommandError: Temporal is away or refuses.
    """
    conditions = [f"WorkflowType = '{names.WORKFLOW_TYPE}'", "ExecutionStatus != 'ContinuedAsNew'"]
    for attribute, value in ((names.TENANT_ATTRIBUTE, tenant), (names.AGENT_ATTRIBUTE, agent)):
        if value is not None:
            conditions.append(f"{attribute} = {quoted(value)}")
    if states:
        any_of = ", ".join(map(quoted, states))
        conditions += ["ExecutionStatus = 'Running'", f"{names.STATE_ATTRIBUTE} IN ({any_of})"]
    newest: dict[str, WorkflowExecution] = {}
    async with plainly(settings, "The agents can't be listed"):
        async for execution in client.list_workflows(" AND ".join(conditions), rpc_timeout=_RPC):
            known = newest.get(execution.id)
            if known is None and len(newest) == limit:
                break
            if known is None or known.start_time < execution.start_time:
                newest[execution.id] = execution
    return [summary for execution in newest.values() if (summary := _summary(execution))]


def _summary(execution: WorkflowExecution) -> AgentSummary | None:
    try:
        address = names.parse_workflow_id(execution.id)
    except ValueError:
        return None  # started by hand under an id that is no agent's; its workflow fails and says so
    state = state_of(execution)
    return AgentSummary(
        agent=shown(address),
        tenant=address.tenant,
        name=address.agent,
        key=address.key,
        state=state,
        since=execution.close_time or execution.start_time,
        hint=_HINTS.get(state, ""),
        workflow_id=execution.id,
        run_id=execution.run_id,
    )


def state_of(execution: WorkflowExecution) -> str:
    """An agent's state in a word, as Temporal knows it."""
    if execution.status in _AT_REST:
        return _AT_REST[execution.status]
    return execution.typed_search_attributes.get(_STATE) or "active"


def quoted(value: str) -> str:
    """A value in a visibility query."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


# Steer ------------------------------------------------------------------------------------------------------------


async def steer(
    client: Client, settings: Settings, address: Address, update: str, intervention: Intervention
) -> Status:
    """Pause, resume or stop an agent, or cancel its turn.

    Args:
        client: Temporal's.
        settings: for messages.
        address: which agent.
        update: `names.PAUSE`, `names.RESUME`, `names.STOP` or `names.CANCEL_TURN`.
        intervention: by whom and why.

    Raises:
        CommandError: the agent is not awake, or no worker answers.
    """
    who = shown(address)
    handle = client.get_workflow_handle(names.workflow_id(address))
    what = update.replace("_", " ")
    async with plainly(settings, f"{who} can't be told to {what}"):
        try:
            async with asyncio.timeout(_STEER_SECONDS):
                status: Status = await handle.execute_update(update, intervention, result_type=Status)
                return status
        except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
            why = await absent_workers(client, settings) or "it may yet do so"
            raise CommandError(f"{who} has not answered within {_STEER_SECONDS:g} s: {why}.") from error
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            run = await find(client, settings, address)
            state = f"is {state_of(run)}" if run else "has never been awake"
            raise CommandError(f"{who} {state}; only an agent that is awake can be told to {what}.") from error


async def say(client: Client, settings: Settings, address: Address, request: SteerRequest) -> Status:
    """Say something to an agent at work, waking it if need be.

    Raises:
        CommandError: the agent refuses, or no worker answers.
    """
    who = shown(address)
    named = request if request.id else request.model_copy(update={"id": str(uuid4())})  # it may be sent again
    async with plainly(settings, f"{who} can't be told anything"):
        try:
            async with asyncio.timeout(_STEER_SECONDS):
                return await updated(client, settings, address, names.STEER, named, Status)
        except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
            why = await absent_workers(client, settings) or "it may yet hear it"
            raise CommandError(f"{who} has not answered within {_STEER_SECONDS:g} s: {why}.") from error


async def find(client: Client, settings: Settings, address: Address) -> WorkflowExecutionDescription | None:
    """The newest run of an agent; None if it has none that is kept."""
    workflow_id = names.workflow_id(address)
    async with plainly(settings, f"{shown(address)} can't be looked up"):
        try:
            return await client.get_workflow_handle(workflow_id).describe(rpc_timeout=_RPC)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return None
