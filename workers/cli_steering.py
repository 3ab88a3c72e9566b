"""`perennial pause`, `resume`, `stop`, `steer`, `cancel-turn`: a person's hand on an agent at work."""
# ruff: noqa: PLC0415  # as in workers/cli.py

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from workers.arguments import Agent, Json, Reason, examples, output_for, resolved, user
from workers.settings import Settings
from workflows import names
from workflows.messages import Intervention, SteerRequest

steering = typer.Typer()


@steering.command(epilog=examples("perennial pause logistics/order-1042 --reason 'carrier is down'"))
def pause(agent: Agent, *, reason: Reason = "", as_json: Json = False) -> None:
    """Let an agent begin no further turn, until `perennial resume`. Its mail waits."""
    _intervene(agent, names.PAUSE, Intervention(by=user(), reason=reason), as_json=as_json)


@steering.command(epilog=examples("perennial resume logistics/order-1042"))
def resume(agent: Agent, *, reason: Reason = "", as_json: Json = False) -> None:
    """Let a paused agent go on with the mail that waited."""
    _intervene(agent, names.RESUME, Intervention(by=user(), reason=reason), as_json=as_json)


@steering.command(
    epilog=examples(
        "perennial stop logistics/order-1042 --reason 'order closed'", "perennial stop logistics/order-1042 --drain"
    )
)
def stop(
    agent: Agent,
    *,
    drain: Annotated[bool, typer.Option("--drain", help="Answer the mail that waits first.")] = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Let an agent finish its turn and go to sleep. Its next event or question wakes it, unchanged."""
    _intervene(agent, names.STOP, Intervention(by=user(), reason=reason, drain=drain), as_json=as_json)


@steering.command(
    "cancel-turn",
    short_help="End an agent's turn without an answer.",
    epilog=examples("perennial cancel-turn customer-service/customer-17 --reason 'the wrong customer'"),
)
def cancel_turn(agent: Agent, *, reason: Reason = "", as_json: Json = False) -> None:
    """End an agent's turn without an answer. Its model call is cancelled; tool calls under way are finished.

    What was done stays done; the events of the turn count as answered. Mail that waits is taken next.
    """
    _intervene(agent, names.CANCEL_TURN, Intervention(by=user(), reason=reason), as_json=as_json)


@steering.command(
    short_help="Say something to an agent at work.",
    epilog=examples(
        "perennial steer customer-service/customer-17 'Offer her a voucher.'",
        "perennial steer logistics/order-1042 'Stop: the address is wrong.' --interrupt",
    ),
)
def steer(
    agent: Agent,
    text: Annotated[str, typer.Argument(help="What to say to it.")],
    *,
    interrupt: Annotated[
        bool, typer.Option("--interrupt", help="Cancel its model call, and make it again with these words.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say something to an agent at work: it joins the turn in progress, before the next model call, or begins one.

    Nobody waits for an answer here; the turn's reply goes where it always goes. `perennial ask` asks and waits.
    """
    _intervene(agent, names.STEER, SteerRequest(text=text, interrupt=interrupt, by=user()), as_json=as_json)


def _intervene(agent: str, update: str, request: Intervention | SteerRequest, *, as_json: bool) -> None:
    from workers import operations, views

    settings, output = Settings.load(), output_for(as_json=as_json)
    address = resolved(settings, agent)

    async def intervene() -> None:
        client = await operations.connect(settings)
        if isinstance(request, SteerRequest):
            status = await operations.say(client, settings, address, request)
        else:
            status = await operations.steer(client, settings, address, update, request)
        if output.as_json:
            output.data(status)
        else:
            output.say(views.steered(operations.shown(address), update, status))

    asyncio.run(intervene())
