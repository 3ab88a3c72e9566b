"""`perennial approvals` and `perennial tool`: tool calls that wait for a decision, or for an answer from outside."""
# ruff: noqa: PLC0415  # as in workers/cli.py

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workers.arguments import Json, ListUnlessNamed, Reason, examples, output_for, resolved, user
from workers.exits import BAD_INPUT, CommandError
from workers.settings import Settings
from workflows.messages import CompleteRequest, DecideRequest, Settlement, Waits

if TYPE_CHECKING:
    from workers.calls import Found
    from workers.console import Output

approvals = typer.Typer(cls=ListUnlessNamed, help="Tool calls that wait for a decision.")
tool = typer.Typer(no_args_is_help=True, help="Tool calls that wait for an answer from outside.")

_COLUMNS = ["CALL", "SINCE", "UNTIL", "WHAT"]

MaybeAgent = Annotated[
    str | None, typer.Argument(metavar="[AGENT]", help="Only of TENANT/AGENT/KEY, or AGENT/KEY.", show_default=False)
]
OfTenant = Annotated[str | None, typer.Option("--tenant", help="Only of this tenant's agents.")]
OfName = Annotated[str | None, typer.Option("--agent", help="Only of agents of this name.")]
CallId = Annotated[str, typer.Argument(metavar="CALL", help="The call's id, as listed.")]
Limit = Annotated[int, typer.Option(min=1, help="How many agents to ask, or decisions to show, at most.")]


@approvals.command(
    "list",
    epilog=examples(
        "perennial approvals",
        "perennial approvals customer-service/customer-17 --decided",
        "perennial approvals --tenant store --json",
    ),
)
def approvals_list(  # noqa: PLR0913  # one for each filter
    agent: MaybeAgent = None,
    *,
    tenant: OfTenant = None,
    name: OfName = None,
    decided: Annotated[bool, typer.Option("--decided", help="What was decided instead, the newest first.")] = False,
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """List the tool calls that wait for a decision, the oldest first. The call is not made before."""
    _refuse_both(agent, tenant, name)
    output = output_for(as_json=as_json)
    if decided:
        _show_decided(agent, tenant, name, limit, output)
        return
    found = asyncio.run(_waiting(Waits.APPROVAL, agent, tenant, name, limit))
    if _show(found, "No tool call waits for a decision.", output):
        first = found.calls[0].call
        output.note(f"`perennial approvals approve {first} --reason ...` has it made; `refuse` does not.")


def _show_decided(agent: str | None, tenant: str | None, name: str | None, limit: int, output: Output) -> None:
    from workers import calls, views

    settings = Settings.load()
    address = resolved(settings, agent) if agent else None
    found = asyncio.run(calls.decided(settings, address=address, tenant=tenant, agent=name, limit=limit))
    if output.as_json:
        output.data(found)
    elif found:
        output.table(["WHEN", "DECISION", "BY", "WHY", "WHAT", "CALL"], [views.decision(one) for one in found])
    else:
        output.note("Nothing was decided yet.")
    if len(found) == limit:
        output.note(f"The {limit} newest are shown; --limit shows more.")


@approvals.command(
    "approve",
    epilog=examples("perennial approvals approve agent/store/customer-service/customer-17/3/2/0 --reason 'as agreed'"),
)
def approvals_approve(call: CallId, *, reason: Reason = "", as_json: Json = False) -> None:
    """Have a call made that waits for a decision. Who and why is recorded."""
    _decide(DecideRequest(call=call, approve=True, by=user(), why=reason), output_for(as_json=as_json))


@approvals.command(
    "refuse",
    epilog=examples("perennial approvals refuse agent/store/customer-service/customer-17/3/2/0 --reason 'too much'"),
)
def approvals_refuse(call: CallId, *, reason: Reason = "", as_json: Json = False) -> None:
    """Have a call not made that waits for a decision. The agent is told by whom and why, and goes on."""
    _decide(DecideRequest(call=call, approve=False, by=user(), why=reason), output_for(as_json=as_json))


def _decide(request: DecideRequest, output: Output) -> None:
    from workers import calls, operations

    settings = Settings.load()
    calls.address_of(request.call)

    async def decide() -> Settlement:
        return await calls.decide(await operations.connect(settings), settings, request)

    _say_settled(asyncio.run(decide()), output)


@tool.command(
    "list",
    short_help="List the tool calls that wait for an answer.",
    epilog=examples("perennial tool list", "perennial tool list logistics/order-1042 --json"),
)
def tool_list(
    agent: MaybeAgent = None,
    *,
    tenant: OfTenant = None,
    name: OfName = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """List the tool calls that are made and wait for their answer from outside, the oldest first."""
    _refuse_both(agent, tenant, name)
    output = output_for(as_json=as_json)
    found = asyncio.run(_waiting(Waits.ANSWER, agent, tenant, name, limit))
    if _show(found, "No tool call waits for an answer from outside.", output):
        output.note(f"`perennial tool complete {found.calls[0].call} TEXT` answers the first of them.")


@tool.command(
    "complete",
    short_help="Answer a tool call, so that its agent goes on.",
    epilog=examples(
        "perennial tool complete agent/store/logistics/order-1042/3/2/0 'It has arrived.'",
        "perennial tool complete agent/store/logistics/order-1042/3/2/0 --file answer.json",
        "perennial tool complete agent/store/logistics/order-1042/3/2/0 'The supplier is closed.' --failed",
    ),
)
def tool_complete(
    call: CallId,
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="What the model is shown: text, or JSON.", show_default=False)
    ] = None,
    *,
    file: Annotated[str | None, typer.Option(help="Take it from a file; `-` is standard input.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="It says what went wrong.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a tool call whose answer comes from outside; its agent goes on with that."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give the answer either as TEXT or by --file")
    from workers import calls, operations

    settings = Settings.load()
    calls.address_of(call)
    content = text if file is None else _read(file)
    request = CompleteRequest(call=call, content=content or "", failed=failed, by=user())

    async def complete() -> Settlement:
        return await calls.complete(await operations.connect(settings), settings, request)

    _say_settled(asyncio.run(complete()), output_for(as_json=as_json))


def _read(file: str) -> str:
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except OSError as error:
        raise CommandError(f"{file} can't be read: {error.strerror}.", BAD_INPUT) from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is no text in UTF-8: {error.reason} at byte {error.start}.", BAD_INPUT) from error


# What both do -----------------------------------------------------------------------------------------------------


def _refuse_both(agent: str | None, tenant: str | None, name: str | None) -> None:
    if agent is not None and (tenant is not None or name is not None):
        raise typer.BadParameter("name one AGENT, or give --tenant and --agent")


async def _waiting(waits_for: Waits, agent: str | None, tenant: str | None, name: str | None, limit: int) -> Found:
    from workers import calls, operations

    settings = Settings.load()
    address = resolved(settings, agent) if agent is not None else None
    client = await operations.connect(settings)
    if address is not None:
        return await calls.waiting_of(client, settings, waits_for, address)
    return await calls.waiting(client, settings, waits_for, tenant=tenant, agent=name, limit=limit)


def _show(found: Found, none: str, output: Output) -> bool:
    """Print calls that wait; False if there is none to be talked of further."""
    from workers import views

    for silent in found.silent:
        output.warning(f"{silent}; calls of it that wait are not listed")
    if output.as_json:
        output.data(found.calls)
    elif found.calls:
        output.table(_COLUMNS, [views.open_call(call) for call in found.calls])
    elif not found.silent:
        output.note(none)
    return bool(found.calls) and not output.as_json


def _say_settled(settlement: Settlement, output: Output) -> None:
    from workers import views

    if output.as_json:
        output.data(settlement)
    else:
        output.say(views.settled(settlement))
