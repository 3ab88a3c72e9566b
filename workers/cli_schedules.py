"""`perennial schedules`: what comes to agents by the clock."""
# ruff: noqa: PLC0415  # as in workers/cli.py

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from workers.arguments import Json, Reason, examples, output_for, user
from workers.settings import Settings

schedules = typer.Typer(no_args_is_help=True, help="What comes to agents by the clock, as their specs say.")

Named = Annotated[str, typer.Argument(metavar="SCHEDULE", help="TENANT/AGENT/NAME, or AGENT/NAME.")]


@schedules.command("list", epilog=examples("perennial schedules list", "perennial schedules list --json"))
def schedules_list(*, as_json: Json = False) -> None:
    """Show the schedules, with when they came and come next."""
    from workers import operations, views
    from workers import schedules as kept

    settings, output = Settings.load(), output_for(as_json=as_json)

    async def found() -> list[kept.Listed]:
        client = await operations.connect(settings)
        return await kept.listed(client, settings, operations.known_specs(settings.specs) or [])

    rows = asyncio.run(found())
    if output.as_json:
        output.data(rows)
        return
    output.table(
        ["SCHEDULE", "AGENT", "WHEN", "STATE", "NEXT", "LAST", "TAKEN", "SKIPPED"],
        [views.schedule(row) for row in rows],
    )
    if any(row.state == "missing" for row in rows):
        output.note("missing: `perennial schedules apply` makes them.")
    if not rows:
        output.note("No agent has any. `schedules` in a spec says what comes by the clock.")


@schedules.command("apply", epilog=examples("perennial schedules apply", "perennial schedules apply --prune"))
def schedules_apply(
    *,
    prune: Annotated[bool, typer.Option(help="Also remove those of agents that have no spec here.")] = False,
    as_json: Json = False,
) -> None:
    """Make, change and remove schedules, so that they are as the specs say. Agent workers do so when they start."""
    from workers import operations
    from workers import schedules as kept
    from workers.exits import CommandError

    settings, output = Settings.load(), output_for(as_json=as_json)
    specs = operations.known_specs(settings.specs)
    if specs is None:
        raise CommandError(
            f"There is no folder {settings.specs}. Set PERENNIAL_SPECS to the one with the agents' YAML."
        )

    async def made() -> list[kept.Change]:
        client = await operations.connect(settings)
        async with operations.plainly(settings, "The schedules can't be applied"):
            return await kept.apply(client, settings.task_queue, specs, prune=prune)

    changes = asyncio.run(made())
    if output.as_json:
        output.data(changes)
        return
    output.table(["SCHEDULE", "IT IS"], [[change.schedule, change.did] for change in changes])
    output.note("`perennial schedules list` says when each comes next.")


@schedules.command("pause", epilog=examples("perennial schedules pause security/nightly --reason 'on holiday'"))
def schedules_pause(schedule: Named, *, reason: Reason = "") -> None:
    """Let a schedule bring nothing until it is resumed; what it would have brought is left out."""
    _steer(schedule, "pause", "paused", reason)


@schedules.command("resume", epilog=examples("perennial schedules resume security/nightly"))
def schedules_resume(schedule: Named, *, reason: Reason = "") -> None:
    """Let a schedule go on."""
    _steer(schedule, "resume", "resumed", reason)


@schedules.command("trigger", epilog=examples("perennial schedules trigger security/nightly"))
def schedules_trigger(schedule: Named) -> None:
    """Have a schedule come once more, now; if its last occurrence is not answered yet, its `overlap` decides."""
    _steer(schedule, "trigger", "triggered", "")


@schedules.command("remove", epilog=examples("perennial schedules remove store/old-agent/nightly"))
def schedules_remove(schedule: Named) -> None:
    """Remove a schedule; if a spec has it, it is made again by `apply`, and when an agent worker starts."""
    _steer(schedule, "remove", "removed", "")


def _steer(schedule: str, what: str, done: str, reason: str) -> None:
    from workers import operations
    from workers import schedules as kept

    settings, output = Settings.load(), output_for()
    found = kept.resolve(schedule, operations.known_specs(settings.specs) or [])
    note = f"{done} by {user() or 'somebody'}{f': {reason}' if reason else ''}"

    async def steer() -> None:
        client = await operations.connect(settings)
        await kept.steer(client, settings, found, what, note)

    asyncio.run(steer())
    output.say(f"{kept.shown(found)} {done}.")
