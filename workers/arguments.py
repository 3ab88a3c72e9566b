"""What commands have in common: their usual arguments and options, and what becomes of them."""
# ruff: noqa: PLC0415  # as in workers/cli.py

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from workers.exits import CommandError

if TYPE_CHECKING:
    from workers.console import Output
    from workers.settings import Settings
    from workflows.names import Address

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Agent = Annotated[str, typer.Argument(metavar="AGENT", help="TENANT/AGENT/KEY, or AGENT/KEY, or a workflow id.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept with the change.")]


class ListUnlessNamed(TyperGroup):
    """A group whose `list` need not be said: `perennial memory AGENT` is `perennial memory list AGENT`."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args[0] in {*self.commands, *ctx.help_option_names} if args else self.no_args_is_help
        return super().parse_args(ctx, args if named else ["list", *args])


def examples(*lines: str) -> str:
    r"""An epilog with examples, a line each (`\b`: not to be wrapped)."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def output_for(*, as_json: bool = False) -> Output:
    """Where a command prints."""
    from workers.console import Output

    return Output(as_json=as_json)


def resolved(settings: Settings, agent: str) -> Address:
    """An agent that may be known to Temporal without having a spec any more."""
    from workers import operations

    known = operations.known_specs(settings.specs)
    try:
        return operations.resolve(agent, known)
    except CommandError:
        if agent.count("/") < 2:  # noqa: PLR2004  # not TENANT/AGENT/KEY
            raise
        return operations.resolve(agent, None)


def user() -> str:
    """Who uses the command, for the record."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
