"""`perennial budget`: what agents have spent of what they may, and how one is allowed more."""
# ruff: noqa: PLC0415  # as in workers/cli.py

from __future__ import annotations

import asyncio
from decimal import Decimal, InvalidOperation
from typing import Annotated

import typer

from workers.arguments import Agent, Json, Reason, examples, output_for, resolved, user
from workers.settings import Settings
from workflows.budget import LiftRequest, LimitScope, Per

budget = typer.Typer(no_args_is_help=True, help="What agents have spent, and what they may.")


def _dollars(text: str) -> int:
    """Dollars in micro-dollars."""
    try:
        micro = Decimal(text) * 1_000_000
    except InvalidOperation:
        micro = Decimal(-1)
    if not micro.is_finite() or micro < 0 or micro != micro.to_integral_value():
        raise typer.BadParameter(f"{text!r} is no amount of US dollars, such as 5 or 0.25")
    return int(micro)


@budget.command(
    "show",
    short_help="Show what was spent, of what may be.",
    epilog=examples(
        "perennial budget show customer-service/customer-17",
        "perennial budget show --tenant store --json",
    ),
)
def budget_show(
    agent: Annotated[str | None, typer.Argument(metavar="[AGENT]", help="TENANT/AGENT/KEY, or AGENT/KEY.")] = None,
    *,
    tenant: Annotated[str | None, typer.Option(help="All agents of this tenant, instead of one.")] = None,
    as_json: Json = False,
) -> None:
    """Show what was spent today, this month and ever (UTC), of what the spec allows.

    Of an agent: with this key, with all its keys, and of all agents of its tenant together.
    """
    from workers import budget as budgets
    from workers import operations, views

    if (agent is None) == (tenant is None):
        raise typer.BadParameter("name an agent, or a --tenant")
    settings, output = Settings.load(), output_for(as_json=as_json)
    if agent is not None:
        specs = operations.known_specs(settings.specs)
        found = asyncio.run(budgets.of_agent(settings, specs, resolved(settings, agent)))
    else:
        found = asyncio.run(budgets.of_tenant(settings, tenant or ""))
    if output.as_json:
        output.data(found)
        return
    output.table(
        ["WHO", "WHEN", "TOKENS", "DOLLARS", "TURNS", "UNPRICED", "UNTIL"], [views.account(one) for one in found]
    )
    if any(one.spent.unpriced for one in found):
        output.note("UNPRICED: calls whose price is not known, which are not in DOLLARS; set `price` of their pools.")


@budget.command(
    "lift",
    short_help="Allow an agent more than a limit of its budget.",
    epilog=examples(
        "perennial budget lift customer-service/customer-17 --usd 5 --reason 'an important customer'",
        "perennial budget lift customer-service/customer-17 --tokens 100000 --scope tenant --per month",
    ),
)
def budget_lift(  # noqa: PLR0913  # each is a choice of its own
    agent: Agent,
    *,
    tokens: Annotated[int, typer.Option(min=0, help="So many tokens more.")] = 0,
    usd: Annotated[str, typer.Option(help="So many US dollars more.", metavar="AMOUNT")] = "0",
    turns: Annotated[int, typer.Option(min=0, help="So many turns more.")] = 0,
    scope: Annotated[
        LimitScope | None, typer.Option(help="Of the limit to lift; without it, the one the agent waits for.")
    ] = None,
    per: Annotated[Per | None, typer.Option(help="As --scope.")] = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Allow an agent more than a limit of its budget, until the limit's day or month ends.

    For all whom the limit is about: of a tenant's, all its agents. Those that wait for it go on.
    """
    from workers import budget as budgets
    from workers import operations, views

    if (scope is None) != (per is None):
        raise typer.BadParameter(
            "--scope and --per say together which limit is meant; without both, it is the one the agent waits for"
        )
    request = LiftRequest(
        scope=scope, per=per, tokens=tokens, micro_usd=_dollars(usd), turns=turns, by=user(), reason=reason
    )
    if not (request.tokens or request.micro_usd or request.turns):
        raise typer.BadParameter("say how much more: --tokens, --usd or --turns")
    settings, output = Settings.load(), output_for(as_json=as_json)
    address = resolved(settings, agent)

    async def lift() -> budgets.Allowed:
        client = await operations.connect(settings)
        return await budgets.lift(client, settings, address, request)

    made = asyncio.run(lift())
    if output.as_json:
        output.data(made)
        return
    output.say(views.lifted(operations.shown(address), made.lifted))
    if made.told:
        output.note(f"{views.count(made.told, 'other agent')} that waited for a budget look again")
