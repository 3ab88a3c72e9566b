"""The `perennial` command: parse, call, print.

    perennial dev                                           # everything, on this machine
    perennial ask customer-service/customer-17 "Hello?"
    python -m workers.cli worker agent                      # the same command, without its script

What a command does is in the module it imports; how it looks is in `workers/views.py`. Exit status: 0 done, 1 failed,
2 bad input. Each command imports what it needs when it runs: `--help` answers at once, and a worker does not load
what only `perennial dev` needs.
"""
# ruff: noqa: PLC0415  # the last sentence above

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from uuid import uuid4

import typer
from typer.core import TyperGroup
from typing_extensions import override

from workers.arguments import Agent, Json, ListUnlessNamed, Reason
from workers.arguments import examples as _examples
from workers.arguments import output_for as _output
from workers.arguments import resolved as _resolved
from workers.arguments import user as _user
from workers.cli_budget import budget
from workers.cli_calls import approvals, tool
from workers.cli_schedules import schedules
from workers.cli_steering import steering
from workers.exits import BAD_INPUT, FAILED, OK, CommandError
from workers.settings import Settings, SettingsError
from workflows.spec import Scope

if TYPE_CHECKING:
    from workers.console import Output
    from workers.dlq import Filter, Letter
    from workers.history import Plan
    from workflows.events import Event
    from workflows.messages import AskRequest, Delta, Reply
    from workflows.names import Address

_WARNINGS_SHOWN = 20


class _Commands(TyperGroup):
    """Turns errors into one clear message and the exit status."""

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (CommandError, SettingsError) as error:
            self._explain(ctx, str(error))
            raise typer.Exit(error.status if isinstance(error, CommandError) else BAD_INPUT) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if type(error).__module__.startswith("typer."):
                raise  # usage errors, which typer prints
            self._explain(
                ctx,
                f"{type(error).__name__}: {error}\nThis was not foreseen. `perennial --debug ...` shows where it "
                "happened; `perennial doctor` looks at everything around.",
            )
            raise typer.Exit(FAILED) from error

    def _explain(self, ctx: Any, message: str) -> None:
        if ctx.params.get("debug"):
            traceback.print_exc()
        output = _output()
        output.error(message)


app = typer.Typer(
    name="perennial",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_examples(
        "perennial dev",
        "perennial ask customer-service/customer-17 'Where is my order?'",
        "perennial tail",
        "perennial doctor",
    ),
)
worker = typer.Typer(no_args_is_help=True, help="Run one process, against the servers that the settings name.")
specs = typer.Typer(no_args_is_help=True, help="Work with the agents' YAML files.")
ingest = typer.Typer(no_args_is_help=True, help="Work with the topics that agents read.")
dlq = typer.Typer(no_args_is_help=True, help="Work with dead letters: records that could not be understood.")
memory = typer.Typer(
    cls=ListUnlessNamed, no_args_is_help=True, help="Look through what agents remember: `perennial memory AGENT`."
)
pins = typer.Typer(
    cls=ListUnlessNamed,
    no_args_is_help=True,
    short_help="Entries that an agent is always shown.",
    help="Entries that an agent is always shown: `perennial pins AGENT`.",
)
app.add_typer(worker, name="worker")
app.add_typer(steering)  # without a name: its commands are the application's
app.add_typer(pins, name="pins")
app.add_typer(memory, name="memory")
app.add_typer(budget, name="budget")
app.add_typer(approvals, name="approvals")
app.add_typer(tool, name="tool")
app.add_typer(schedules, name="schedules")
app.add_typer(specs, name="specs")
app.add_typer(dlq, name="dlq")
app.add_typer(ingest, name="ingest")


def _print_version(*, asked: bool) -> None:
    if asked:
        typer.echo(f"perennial {version('perennial')}")
        raise typer.Exit


@app.callback()
def perennial(
    *,
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error happened.")] = False,
) -> None:
    """The runtime for AI agents that do not forget and do not die: Kafka events in, Temporal workflows that remember.

    Settings are environment variables named PERENNIAL_..., and while `perennial dev` runs, it tells other commands
    started in the same directory where its servers are.
    """
    if not debug:
        # What is wrong with a server is said by the commands.
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


# Processes --------------------------------------------------------------------------------------------------------


@app.command(
    short_help="Run everything on this machine.",
    epilog=_examples("perennial dev", "perennial dev --state-dir /tmp/try"),
)
def dev(
    state_dir: Annotated[
        Path | None, typer.Option(help="Where agents, conversations and logs are kept.", show_default=".perennial")
    ] = None,
) -> None:
    """Run everything on this machine: Temporal with its Web UI, Kafka, the workers. Ctrl-C drains and ends it.

    Agents and conversations are kept, and are there again after the next start. Without a model provider in the
    environment (OPENAI_API_KEY and the like) a rehearsal endpoint answers from rules.
    """
    settings = Settings.load()
    if state_dir:
        # Not through `load`: that has read the addresses of a stack in another directory.
        settings = Settings(state_dir=state_dir, _env_file=None)
    from workers.dev import run_stack

    asyncio.run(run_stack(settings, _output()))


def _process(name: str) -> NoReturn:
    """Run a worker's `main` as this process; it leaves with the worker's exit status."""
    from importlib import import_module

    from workers import wiring

    settings = Settings.load()
    wiring.run_process(name, import_module(f"workers.{name}").main, settings)
    raise AssertionError("run_process does not return")


@worker.command("agent")
def worker_agent() -> None:
    """Runs the agents' workflows, their tools, and what they publish."""
    _process("agent")


@worker.command("model")
def worker_model() -> None:
    """Makes the model calls."""
    _process("model")


@worker.command("ingest")
def worker_ingest() -> None:
    """Hands events from Kafka to the agents."""
    _process("ingest")


@worker.command("rehearsal", short_help="Answers model calls from rules, without a model.")
def worker_rehearsal() -> None:
    """Answers model calls from rules, where no model provider is configured."""
    _process("rehearsal")


# Events -----------------------------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        'perennial send --type store.customer.message --subject customer-17 --data \'{"text": "hi"}\' \\',
        "               --tenant store --agent customer-service",
        "perennial send events.jsonl --topic store.events",
        "perennial send - < events.jsonl",
    )
)
def send(  # noqa: PLR0913  # an event has these parts
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="JSON Lines, one CloudEvent each; `-` is standard input."),
    ] = None,
    *,
    topic: Annotated[str, typer.Option(help="Kafka topic.")] = "agents.events",
    kind: Annotated[str | None, typer.Option("--type", help="What happened, as in store.customer.message.")] = None,
    subject: Annotated[str | None, typer.Option(help="Whom or what it is about: the agent's key.")] = None,
    data: Annotated[str | None, typer.Option(help="The event's data, as JSON.")] = None,
    agent: Annotated[str | None, typer.Option(help="The agent it is for, whatever the subscriptions.")] = None,
    tenant: Annotated[str | None, typer.Option(help="The tenant it belongs to.")] = None,
    source: Annotated[str, typer.Option(help="Where it comes from.")] = "perennial/send",
    event_id: Annotated[
        str | None, typer.Option("--id", help="Sent again with the same id and source, it has no effect.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send lines of FILE that are no events, too.")] = False,
    as_json: Json = False,
) -> None:
    """Send an event, or a file of events, and print their ids.

    A file is checked before anything of it is sent. The record's key is the event's subject, so that one agent's
    events stay in order.
    """
    from workers import topics

    if (file is None) == (kind is None):
        raise typer.BadParameter("give either a FILE of events, or --type and the parts of one event")
    settings = Settings.load()
    if kind is not None:
        lines = [topics.Line("the event", topics.event_bytes(kind, subject, data, agent, tenant, source, event_id))]
    else:
        mixed = [
            name
            for name, value in {"--subject": subject, "--data": data, "--agent": agent, "--tenant": tenant}.items()
            if value is not None
        ]
        if mixed:
            raise typer.BadParameter(f"{', '.join(mixed)} cannot be given with a FILE: its events say that themselves")
        lines = _lines(file or "-")
    asyncio.run(_send(settings, topic, lines, raw=raw, output=_output(as_json=as_json)))


def _lines(file: str) -> list[Any]:
    from workers.topics import read_lines

    try:
        if file == "-":
            return read_lines(sys.stdin.buffer, "standard input")
        with Path(file).open("rb") as stream:
            return read_lines(stream, file)
    except OSError as error:
        raise CommandError(f"{file} can't be read: {error.strerror}.", BAD_INPUT) from error


async def _send(settings: Settings, topic: str, lines: Sequence[Any], *, raw: bool, output: Output) -> None:
    from workers import topics
    from workers.operations import known_specs

    if not lines:
        raise CommandError("There is no event to send: the input is empty.", BAD_INPUT)
    prepared, warnings = topics.prepare(lines, topic, known_specs(settings.specs), raw=raw)
    for warning in warnings[:_WARNINGS_SHOWN]:
        output.warning(warning)
    if len(warnings) > _WARNINGS_SHOWN:
        output.warning(f"and {len(warnings) - _WARNINGS_SHOWN} more of that kind")
    with output.progress(f"sending to {topic}", len(prepared)) as progress:
        await topics.send(settings, topic, prepared, on_progress=progress)
    if output.as_json:
        output.data({"topic": topic, "sent": len(prepared), "ids": [event.id for event in prepared]})
        return
    for event in prepared:
        output.say(event.id or f"({event.place})")
    output.note(f"sent {len(prepared)} to {topic}")


@app.command(
    short_help="Watch replies and lifecycle events as they come.",
    epilog=_examples(
        "perennial tail",
        "perennial tail --agent logistics/order-1042",
        "perennial tail --from-beginning --count 100 --json",
    ),
)
def tail(
    *,
    agent: Annotated[str | None, typer.Option(help="Only of this agent: AGENT, AGENT/KEY or TENANT/AGENT/KEY.")] = None,
    from_beginning: Annotated[bool, typer.Option("--from-beginning", help="Also what is there already.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    as_json: Json = False,
) -> None:
    """Watch replies and lifecycle events as they come, one line each. Ctrl-C ends it.

    An event that stands on its topic twice is shown once. With --json, each line is one document.
    """
    settings = Settings.load()
    output = _output(as_json=as_json)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_tail(settings, agent, count, from_beginning=from_beginning, output=output))


async def _tail(
    settings: Settings, agent: str | None, count: int | None, *, from_beginning: bool, output: Output
) -> None:
    from workers import topics, views

    def ready() -> None:
        output.note(f"watching replies and lifecycle events at {settings.kafka_bootstrap}; Ctrl-C ends")

    shown = 0
    watching = topics.watch(settings, from_beginning=from_beginning, on_ready=ready, on_reject=output.warning)
    async with contextlib.aclosing(watching) as events:
        async for event in events:
            if agent and not _is_of(event, agent):
                continue
            if output.as_json:
                output.data_line(event)
            else:
                output.say(views.event(event))
            shown += 1
            if shown == count:
                return


def _is_of(event: Event, agent: str) -> bool:
    """Whether an event is of the agent AGENT, AGENT/KEY or TENANT/AGENT/KEY."""
    who = (event.extensions.get("tenant", ""), event.extensions.get("agent", ""), event.subject or "")
    return agent in {who[1], "/".join(who[1:]), "/".join(who), event.source}


# Agents -----------------------------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "perennial ask customer-service/customer-17 'Where is my order?'",
        "perennial ask store/logistics/order-1042 'Status?' --json",
        "perennial ask concierge/room-7 'Tell me of the town.' --stream",
    )
)
def ask(  # noqa: PLR0913  # an option each
    agent: Agent,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to ask.")],
    *,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the reply.")] = 120.0,
    ask_id: Annotated[
        str, typer.Option("--id", help="Names the question: asked again with the same id, the reply is the same.")
    ] = "",
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the reply as it comes, if the agent's spec says `stream: true`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask an agent and print its reply. An agent that sleeps is woken; one that never lived begins to.

    With --stream and --json, each line is one document: the parts as they come, then the reply.
    """
    if not text.strip():
        raise typer.BadParameter("there is nothing to ask: the text is empty")
    output = _output(as_json=as_json)
    asyncio.run(_ask(Settings.load(), agent, text, ask_id, timeout, output, stream=stream))


async def _ask(  # noqa: PLR0913, PLR0917  # the command's own parameters
    settings: Settings, agent: str, text: str, ask_id: str, seconds: float, output: Output, *, stream: bool
) -> None:
    from workers import operations, views
    from workflows.messages import AskRequest, TurnOutcome

    specs = operations.known_specs(settings.specs)
    address = operations.resolve(agent, specs)
    client = await operations.connect(settings)
    request = AskRequest(text=text, id=ask_id or str(uuid4()))

    async def asked() -> Reply:
        return await operations.ask(client, settings, address, request, seconds=seconds, on_wait=output.warning)

    told = ""
    if stream:
        of = next((spec for spec in specs or () if (spec.tenant, spec.name) == address[:2]), None)
        if of and not of.stream:
            output.warning(f"The spec of {of.tenant}/{of.name} does not say `stream: true`: its reply comes whole.")
        reply, told = await _heard(settings, address, request, asked, output)
    else:
        with output.working(f"{operations.shown(address)} is thinking ..."):
            reply = await asked()
    if output.as_json:
        (output.data_line if stream else output.data)(reply)
    elif reply.outcome is TurnOutcome.COMPLETED:
        if not told or told != reply.text:
            output.say(views.reply(reply))
        output.note(views.reply_cost(reply))
    if reply.outcome is not TurnOutcome.COMPLETED:
        raise CommandError(f"{operations.shown(address)} has no answer: {reply.error}")


async def _heard(
    settings: Settings, address: Address, request: AskRequest, ask: Callable[[], Awaitable[Reply]], output: Output
) -> tuple[Reply, str]:
    """The reply to a question, printed as it comes; and what of it is printed, in the end."""
    from workers.stream import Follower, follow
    from workflows import names
    from workflows.events import event_digest
    from workflows.messages import DeltaKind

    open_line = False

    def print_part(delta: Delta) -> None:
        nonlocal open_line
        if output.as_json:
            output.data_line(delta)
            return
        if open_line and (follower.restarted or delta.kind is not DeltaKind.TEXT):
            output.say()
            open_line = False
        if follower.restarted:
            output.note("The model call was broken off; the answer begins again:")
        if delta.kind is DeltaKind.TOOL_CALL:
            output.note(f"calls {delta.text}")
        elif delta.kind is DeltaKind.TEXT:
            output.say_on(delta.text)
            open_line = True

    follower = Follower(names.workflow_id(address), event_digest(request.source, request.id))
    async with follow(settings, follower, print_part, output.warning) as following:
        reply = await ask()
        await following.rest(reply)
    if open_line:
        output.say()
    return reply, follower.text


@app.command(epilog=_examples("perennial agents", "perennial agents --tenant store --agent logistics --limit 20"))
def agents(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    agent: Annotated[str | None, typer.Option(help="Only of this name.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    as_json: Json = False,
) -> None:
    """List the agents there are, the newest first."""
    asyncio.run(_agents(Settings.load(), tenant, agent, limit, _output(as_json=as_json)))


async def _agents(settings: Settings, tenant: str | None, agent: str | None, limit: int, output: Output) -> None:
    from workers import operations, views

    client = await operations.connect(settings)
    found = await operations.list_agents(client, settings, tenant=tenant, agent=agent, limit=limit)
    if output.as_json:
        output.data(found)
        return
    if not found:
        output.note("There is no such agent yet. An event or `perennial ask` brings one to life.")
        return
    output.table(
        ["AGENT", "STATE", "SINCE", "HINT"],
        [(line.agent, views.state(line.state), views.moment(line.since), line.hint) for line in found],
    )
    if len(found) == limit:
        output.note(f"The {limit} newest are shown; --limit shows more.")
    output.note(f"`perennial show {found[0].agent}` shows one of them.")


@app.command(
    short_help="Show one agent and its transcript.",
    epilog=_examples(
        "perennial show customer-service/customer-17",
        "perennial show AGENT --limit 5 --json",
        "perennial show AGENT --tree",
    ),
)
def show(
    agent: Agent,
    *,
    limit: Annotated[int, typer.Option(min=0, max=10_000, help="How many steps of the transcript, the newest.")] = 20,
    as_tree: Annotated[bool, typer.Option("--tree", help="Show the steps as a tree, with branches and forks.")] = False,
    as_json: Json = False,
) -> None:
    """Show one agent: what it does, what it has spent, what was said, and where the Web UI shows it.

    With --tree, its steps as they hang together: branches that were left by a rewind, forks that begin here, the head.
    """
    if as_tree:
        asyncio.run(_show_tree(Settings.load(), agent, max(limit, 1), _output(as_json=as_json)))
        return
    asyncio.run(_show(Settings.load(), agent, limit, _output(as_json=as_json)))


async def _show(settings: Settings, agent: str, limit: int, output: Output) -> None:
    from workers import operations, views
    from workers.report import report

    address = _resolved(settings, agent)
    client = await operations.connect(settings)
    with output.working(f"looking up {operations.shown(address)} ..."):
        told = await report(client, settings, address, limit=limit)
    if output.as_json:
        output.data(told)
        return
    for line in views.report(told):
        output.say(line)


# An agent's past --------------------------------------------------------------------------------------------------

EntryId = Annotated[
    str,
    typer.Argument(
        metavar="ENTRY",
        help="An entry: its id, the beginning of that, or its turn and step, such as 2.1; see `show --tree`.",
    ),
]
Patience = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the agent.")]


async def _show_tree(settings: Settings, agent: str, limit: int, output: Output) -> None:
    from workers import history, views

    address = _resolved(settings, agent)
    async with history.opened(settings) as ledger:
        told = await history.tree(ledger, address, limit=limit)
    if output.as_json:
        output.data(told)
        return
    for line in views.tree(told):
        output.say(line)
    if told.entries > limit:
        output.note(f"The newest {limit} are shown; --limit shows more.")


@app.command(
    short_help="Let an agent go on behind an earlier entry.",
    epilog=_examples(
        "perennial rewind logistics/order-1042 3f2a9c12 --dry-run",
        "perennial rewind logistics/order-1042 3f2a9c12 --reason 'it misread the address' --yes",
    ),
)
def rewind(  # noqa: PLR0913  # each is a choice of its own
    agent: Agent,
    entry: EntryId,
    *,
    reason: Reason = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, whatever was done since.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would leave.")] = False,
    timeout: Patience = 60.0,
    as_json: Json = False,
) -> None:
    """Let an agent go on behind an entry of any of its branches. What came after it stays in the ledger, as a branch.

    The turn in progress is finished first, and mail waits. An event that was answered stays answered: to have it
    answered again, send it with a new id. Tool calls that were made since are not undone; they are listed, and it is
    asked whether to go on.
    """
    output = _output(as_json=as_json)
    asyncio.run(_rewind(Settings.load(), agent, entry, reason, timeout, yes=yes, dry_run=dry_run, output=output))


async def _rewind(  # noqa: PLR0913  # the command's own parameters
    settings: Settings,
    agent: str,
    entry: str,
    reason: str,
    seconds: float,
    *,
    yes: bool,
    dry_run: bool,
    output: Output,
) -> None:
    from workers import history, operations, views
    from workflows.messages import RewindRequest

    address = _resolved(settings, agent)
    who = operations.shown(address)
    agreed_to: int | None = None
    deadline = asyncio.get_running_loop().time() + seconds
    async with history.opened(settings) as ledger:
        found = await history.find_entry(ledger, address, entry)
        while True:
            plan = await history.plan_of(ledger, address, found)
            if dry_run or plan.head == plan.entry:
                _only_tell(plan, output)
                output.note("nothing was changed" if dry_run else f"{who} is there already")
                return
            if plan.calls_total != agreed_to:
                _agree(plan, yes=yes, output=output)
                agreed_to = plan.calls_total
            request = RewindRequest(entry=found.id, by=_user(), reason=reason, over=None if yes else plan.head)
            client = await operations.connect(settings)
            try:
                with output.working(f"rewinding {who} ..."):
                    made = await history.rewind(client, settings, address, request, seconds=seconds)
            except history.GoneOnError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise CommandError(f"{error} Pause it first: `perennial pause {who}`.") from error
            else:
                break
    if output.as_json:
        output.data(made)
        return
    output.say(views.rewound(who, made))
    output.note(f"`perennial rewind {who} {made.old_head}` goes back to where it was.")


def _only_tell(plan: Plan, output: Output) -> None:
    from workers import views

    if output.as_json:
        output.data(plan)
        return
    for line in views.plan(plan):
        output.say(line)


def _agree(plan: Plan, *, yes: bool, output: Output) -> None:
    """Say what a rewind leaves and, if tool calls were made there, ask whether to go on."""
    from workers import views

    for line in views.plan(plan):
        output.note(line)
    if yes or not plan.calls_total:
        return
    if not sys.stdin.isatty():
        raise CommandError("Tool calls were made since, and nobody is there to be asked: say --yes.", BAD_INPUT)
    typer.confirm("Rewind over them?", abort=True, err=True)


@app.command(
    short_help="Begin a new agent behind an entry of another.",
    epilog=_examples("perennial fork logistics/order-1042 3f2a9c12 order-1042-what-if"),
)
def fork(  # noqa: PLR0913  # each is a choice of its own
    agent: Agent,
    entry: EntryId,
    key: Annotated[str, typer.Argument(metavar="NEW-KEY", help="The new agent's key; it must never have been used.")],
    *,
    reason: Reason = "",
    timeout: Patience = 60.0,
    as_json: Json = False,
) -> None:
    """Begin an agent, of the same tenant and name under another key, with the conversation up to an entry.

    The two share what was said up to there, and nothing after it. The new one has spent nothing, and knows of no event:
    what the other has answered may be sent to it too.
    """
    asyncio.run(_fork(Settings.load(), agent, entry, key, reason, timeout, _output(as_json=as_json)))


async def _fork(  # noqa: PLR0913, PLR0917  # the command's own parameters
    settings: Settings, agent: str, entry: str, key: str, reason: str, seconds: float, output: Output
) -> None:
    from workers import history, operations, views
    from workflows import names
    from workflows.messages import RewindRequest

    address = _resolved(settings, agent)
    new = address._replace(key=key)
    try:
        names.workflow_id(new)
    except ValueError as error:
        raise CommandError(f"{key!r} can't be a key: {error}.", BAD_INPUT) from error
    async with history.opened(settings) as ledger:
        found = await history.find_entry(ledger, address, entry)
        client = await operations.connect(settings)
        request = RewindRequest(entry=found.id, by=_user(), reason=reason)
        with output.working(f"forking {operations.shown(address)} ..."):
            made = await history.fork(client, settings, ledger, new, request, seconds=seconds)
    if output.as_json:
        output.data(made)
        return
    output.say(views.rewound(operations.shown(new), made))


@app.command(
    short_help="Check that the ledger is what was recorded.",
    epilog=_examples("perennial verify logistics/order-1042", "perennial verify --all --json"),
)
def verify(
    agent: Annotated[str | None, typer.Argument(metavar="[AGENT]", help="TENANT/AGENT/KEY, or AGENT/KEY.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All agents.")] = False,
    as_json: Json = False,
) -> None:
    """Check each entry's hash, the chain of parents up to the root, and all that refers to entries and specs.

    Whatever is not as it was recorded is named, and the exit status is 1. Reads all of it, a page at a time.
    """
    if bool(agent) == every:
        raise typer.BadParameter("name an agent, or say --all")
    asyncio.run(_verify(Settings.load(), agent, _output(as_json=as_json)))


async def _verify(settings: Settings, agent: str | None, output: Output) -> None:
    from workers import history, views

    address = _resolved(settings, agent) if agent else None
    async with history.opened(settings) as ledger:
        with output.counting("verifying") as progress:
            told = await history.verify(
                ledger,
                address,
                on_finding=lambda found: None if output.as_json else output.say(views.finding(found)),
                on_progress=progress,
            )
    if output.as_json:
        output.data(told)
    output.note(views.verdict(told))
    if told.wrong:
        raise typer.Exit(FAILED)


# Memory -----------------------------------------------------------------------------------------------------------


@memory.command(
    "list",
    short_help="List the facts that an agent is reminded of.",
    epilog=_examples(
        "perennial memory customer-service/customer-17",
        "perennial memory store/customer-service/customer-17 --query 'how to deliver' --scope key",
        "perennial memory customer-service/customer-17 --forgotten --json",
    ),
)
def memory_list(  # noqa: PLR0913  # one for each filter
    agent: Agent,
    *,
    query: Annotated[str | None, typer.Option(help="Only what fits these words, the best first.")] = None,
    scope: Annotated[list[Scope] | None, typer.Option(help="Only of this scope; may be given again.")] = None,
    forgotten: Annotated[bool, typer.Option("--forgotten", help="Also what was forgotten, by whom and why.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    as_json: Json = False,
) -> None:
    """List the facts that an agent is reminded of: its own, its name's, its team's, its tenant's; the newest first."""
    if query is not None and forgotten:
        raise typer.BadParameter("--query looks through what is remembered; it can't be given with --forgotten")
    from workers import memory as memories
    from workers import operations, views

    settings, output = Settings.load(), _output(as_json=as_json)
    address = _resolved(settings, agent)
    scopes = scope or list(Scope)
    found = asyncio.run(memories.facts(settings, address, scopes, query=query, forgotten=forgotten, limit=limit))
    who = operations.shown(address)
    if output.as_json:
        output.data(found)
        return
    if not found:
        output.note(f"There is no such fact that {who} remembers.")
        return
    output.table(["ID", "SCOPE", "KEPT", "FROM", "FACT"], [views.kept_fact(one) for one in found])
    if len(found) == limit:
        output.note(f"{limit} are shown; --limit shows more.")
    output.note(f"`perennial memory forget {who} {found[0].fact.id} --why ...` forgets one of them.")


@memory.command(
    "forget",
    short_help="Let an agent be reminded of a fact no more.",
    epilog=_examples("perennial memory forget customer-service/customer-17 3f2a9c01d4e5b677 --why 'asked for it'"),
)
def memory_forget(
    agent: Agent,
    fact: Annotated[str, typer.Argument(metavar="ID", help="As `perennial memory` names it.")],
    *,
    why: Annotated[str, typer.Option(help="Why; it is kept with the fact.")],
    as_json: Json = False,
) -> None:
    """Let an agent be reminded of a fact no more. The fact stays on record, with who forgot it and why."""
    from workers import memory as memories

    settings, output = Settings.load(), _output(as_json=as_json)
    told = asyncio.run(memories.forget(settings, _resolved(settings, agent), fact, by=_user(), why=why))
    if output.as_json:
        output.data(told)
    else:
        output.say(f"forgotten: {told.text}")


# Pins -------------------------------------------------------------------------------------------------------------


@pins.command(
    "list", epilog=_examples("perennial pins logistics/order-1042", "perennial pins logistics/order-1042 --json")
)
def pins_list(agent: Agent, *, as_json: Json = False) -> None:
    """List the entries that an agent is always shown, the oldest first."""
    asyncio.run(_pins(Settings.load(), agent, None, None, _output(as_json=as_json)))


@pins.command(
    "add",
    short_help="Always show an agent this entry, word for word.",
    epilog=_examples("perennial pins add logistics/order-1042 3f2a9c --why 'the customer's terms'"),
)
def pins_add(
    agent: Agent, entry: EntryId, *, why: Annotated[str, typer.Option(help="Why.")], as_json: Json = False
) -> None:
    """Always show an agent this entry, word for word, also when what is around it has been summed up."""
    asyncio.run(_pins(Settings.load(), agent, entry, why, _output(as_json=as_json)))


@pins.command("remove", epilog=_examples("perennial pins remove logistics/order-1042 3f2a9c"))
def pins_remove(agent: Agent, entry: EntryId, *, as_json: Json = False) -> None:
    """Let an entry be summed up again with what is around it."""
    asyncio.run(_pins(Settings.load(), agent, entry, None, _output(as_json=as_json)))


async def _pins(settings: Settings, agent: str, entry: str | None, why: str | None, output: Output) -> None:
    """List the pinned entries, after one is pinned, if it is said why, or else removed."""
    from workers import history, operations, views
    from workers import pins as pinned

    address = _resolved(settings, agent)
    async with history.opened(settings) as ledger:
        if entry is None:
            found = await pinned.pinned(ledger, address)
        else:
            meant = await history.find_entry(ledger, address, entry)
            if why is None:
                found = await pinned.remove(ledger, address, meant)
            else:
                found = await pinned.add(ledger, address, meant, by=_user(), why=why)
    if output.as_json:
        output.data(found)
    elif found:
        output.table(["ENTRY", "TURN", "PINNED", "BY", "WHY", "WHAT"], [views.pinned(one) for one in found])
    else:
        output.note(f"No entry of {operations.shown(address)} is pinned.")


# Topics -----------------------------------------------------------------------------------------------------------


@ingest.command(
    "replay",
    short_help="Hand a stretch of a topic to its agents once more.",
    epilog=_examples(
        "perennial ingest replay store.events --from 2026-11-01",
        "perennial ingest replay store.events --from earliest --agent concierge",
        "perennial ingest replay store.events --from 1200 --until 1300 --partition 2",
    ),
)
def ingest_replay(  # noqa: PLR0913  # a stretch has these parts
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="Whose records.")],
    *,
    since: Annotated[str, typer.Option("--from", metavar="PLACE", help="earliest, a time (UTC), or an offset.")],
    until: Annotated[str, typer.Option(metavar="PLACE", help="Up to before this; latest: what is there now.")] = (
        "latest"
    ),
    partition: Annotated[int | None, typer.Option(min=0, help="Only of this partition.")] = None,
    agent: Annotated[str | None, typer.Option(help="Only what is for this agent: AGENT or TENANT/AGENT.")] = None,
    as_json: Json = False,
) -> None:
    """Hand a stretch of a topic to its agents once more, beside the ingest workers; duplicates are dropped.

    An event that an agent has taken, however long ago, has no effect; so this may be given again. It is for an agent
    that has come later than its events, and for whatever else it has missed. What it never had comes behind all that it
    has by now.
    """
    from workers import operations, views
    from workers.replay import Stretch, place, replay

    settings, output = Settings.load(), _output(as_json=as_json)
    stretch = Stretch(topic=topic, start=place(since), end=place(until), partition=partition)
    specs = operations.known_specs(settings.specs) or []
    with output.counting(f"replaying {topic}") as progress:
        told = asyncio.run(replay(settings, specs, stretch, agent=agent, on_progress=progress))
    if output.as_json:
        output.data(told)
        return
    for line in views.replayed(told):
        output.say(line)
    if told.accepted:
        output.note("`perennial tail` shows what agents make of them.")


# Dead letters -----------------------------------------------------------------------------------------------------

Letters = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="As `perennial dlq list` names them.")]
OfReason = Annotated[str | None, typer.Option("--reason", help="Only of this reason, or pattern: `bad_*`.")]
OfTopic = Annotated[str | None, typer.Option("--topic", help="Only from this topic, or pattern.")]
Since = Annotated[
    datetime | None,
    typer.Option(help="Only dead-lettered since then (UTC).", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
]
All = Annotated[bool, typer.Option("--all", help="All that the filters let through.")]
Why = Annotated[str, typer.Option("--why", help="Why; it is kept with the letter.")]


class _State(StrEnum):
    OPEN = "open"
    REDRIVEN = "redriven"
    DROPPED = "dropped"
    ALL = "all"


@dlq.command(
    "list",
    short_help="List dead letters, the oldest first.",
    epilog=_examples("perennial dlq list", "perennial dlq list --state all --reason 'bad_*' --json"),
)
def dlq_list(  # noqa: PLR0913  # one for each filter
    *,
    state: Annotated[_State, typer.Option(help="Only those about which this was done.")] = _State.OPEN,
    reason: OfReason = None,
    topic: OfTopic = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest.")] = 100,
    as_json: Json = False,
) -> None:
    """List dead letters, the oldest first: where they come from, and why they are here."""
    from workers import dlq as letters
    from workers import views

    output = _output(as_json=as_json)
    only = letters.State(state.value) if state is not _State.ALL else None
    wanted = letters.Filter(state=only, reason=reason, topic=topic, since=_utc(since))
    found = [letter for letter in asyncio.run(letters.read(Settings.load())) if wanted.wants(letter)]
    if output.as_json:
        output.data(found[-limit:])
        return
    if not found:
        output.note("There are no such dead letters.")
        return
    output.table(
        ["ID", "STATE", "REASON", "FROM", "AT", "MESSAGE"], [views.dead_letter(letter) for letter in found[-limit:]]
    )
    if len(found) > limit:
        output.note(f"The newest {limit} of {len(found)} are shown; --limit shows more.")
    output.note(
        f"`perennial dlq show {found[-1].id}` shows one whole; `redrive` sends one again, `drop` sets it aside."
    )


@dlq.command("show", short_help="Show a dead letter, byte for byte.", epilog=_examples("perennial dlq show 2-17"))
def dlq_show(letter: Annotated[str, typer.Argument(metavar="ID")], *, as_json: Json = False) -> None:
    """Show a dead letter: the record as it was, byte for byte, and what is wrong with it."""
    from workers import dlq as letters
    from workers import views

    output = _output(as_json=as_json)
    (found,) = letters.pick(asyncio.run(letters.read(Settings.load())), [letter])
    if output.as_json:
        output.data(found)
        return
    for line in views.dead_letter_whole(found):
        output.say(line)


@dlq.command(
    "redrive",
    short_help="Put records back onto their own topics.",
    epilog=_examples("perennial dlq redrive 2-17 0-4", "perennial dlq redrive --all --reason unknown_agent"),
)
def dlq_redrive(  # noqa: PLR0913  # one for each filter
    ids: Letters = None,
    *,
    every: All = False,
    reason: OfReason = None,
    topic: OfTopic = None,
    since: Since = None,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Put records back onto their own topics, byte for byte, once what was in their way is mended.

    An event keeps its identity: sent again, it has no effect on an agent that has seen it.
    """
    from workers import dlq as letters

    settings, output = Settings.load(), _output(as_json=as_json)
    found = _letters(ids, every, letters.Filter(reason=reason, topic=topic, since=_utc(since)))
    with output.progress("redriving", len(found)) as progress:
        asyncio.run(letters.redrive(settings, found, by=_user(), why=why, on_progress=progress))
    _done(output, "redriven", found)


@dlq.command(
    "drop",
    short_help="Note that nothing will be done about dead letters.",
    epilog=_examples("perennial dlq drop 2-17 --why 'a test of the shop team'"),
)
def dlq_drop(  # noqa: PLR0913  # one for each filter
    ids: Letters = None,
    *,
    every: All = False,
    reason: OfReason = None,
    topic: OfTopic = None,
    since: Since = None,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Note that nothing will be done about dead letters; they are listed no more, save with --state dropped."""
    from workers import dlq as letters

    settings, output = Settings.load(), _output(as_json=as_json)
    found = _letters(ids, every, letters.Filter(reason=reason, topic=topic, since=_utc(since)))
    asyncio.run(letters.drop(settings, found, by=_user(), why=why))
    _done(output, "dropped", found)


def _letters(ids: Sequence[str] | None, every: bool, wanted: Filter) -> list[Letter]:  # noqa: FBT001  # as given
    """The dead letters somebody means: by their names, or all that a filter lets through."""
    from workers import dlq as letters

    if bool(ids) == every:
        raise typer.BadParameter(
            "name dead letters by their ids, or say --all (and which, by --reason, --topic, --since)"
        )
    found = asyncio.run(letters.read(Settings.load()))
    return letters.pick(found, ids) if ids else [letter for letter in found if wanted.wants(letter)]


def _done(output: Output, what: str, found: Sequence[Letter]) -> None:
    if output.as_json:
        output.data({what: [letter.id for letter in found]})
    else:
        output.note(f"{what} {len(found)} dead letter{'' if len(found) == 1 else 's'}")


def _utc(at: datetime | None) -> datetime | None:
    return at.replace(tzinfo=UTC) if at else None


# Looking after it -------------------------------------------------------------------------------------------------


@app.command(
    short_help="Say what is missing, and what to do.", epilog=_examples("perennial doctor", "perennial doctor --json")
)
def doctor(*, as_json: Json = False) -> None:
    """Look at everything that Perennial needs, and say what to do about what is not right. Changes nothing."""
    asyncio.run(_doctor(Settings.load(), _output(as_json=as_json)))


async def _doctor(settings: Settings, output: Output) -> None:
    from workers import views
    from workers.doctor import examine

    with output.working("looking ..."):
        checks = await examine(settings)
    if output.as_json:
        output.data(checks)
    else:
        for line in views.checks(checks):
            output.say(line)
    wrong = [check.what for check in checks if check.needed and not check.ok]
    if wrong:
        output.note(f"not right: {', '.join(wrong)}")
        raise typer.Exit(FAILED)
    output.note("all is well")


@specs.command("check", epilog=_examples("perennial specs check", "perennial specs check my-agents/"))
def specs_check(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder with *.yaml.", show_default="PERENNIAL_SPECS, or deploy/agents")
    ] = None,
    *,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask MCP servers for their tools.")] = False,
    as_json: Json = False,
) -> None:
    """Check the agents' YAML files and their tools. All faults are named, with file and line; exit status 2.

    MCP servers are asked for their tools; those that are commands are started for it.
    """
    from workers import views
    from workers.operations import check_specs_and_servers

    output = _output(as_json=as_json)
    folder = folder or Settings.load().specs
    with output.working("asking for tools"):
        found = check_specs_and_servers(folder, ask_servers=not offline)
    if not found:
        raise CommandError(f"There are no specs (*.yaml) in {folder}.", BAD_INPUT)
    if output.as_json:
        output.data(found)
        return
    output.table(
        ["AGENT", "ROUTE", "TOOLS", "SUBSCRIBES TO"],
        [
            (
                f"{spec.tenant}/{spec.name}",
                spec.route,
                ", ".join(spec.offers),
                ", ".join(f"{sub.topic} ({', '.join(sub.types)})" for sub in spec.subscriptions),
            )
            for spec in found
        ],
    )
    output.note(f"in order: {views.count(len(found), 'spec')}")


@app.command(
    short_help="Kill workers in mid-turn, and count what is lost.",
    epilog=_examples("perennial demo", "perennial demo --stay", "perennial demo --events my-events.jsonl"),
)
def demo(
    *,
    events: Annotated[
        Path | None, typer.Option(help="JSON Lines with events of one's own.", show_default="deploy/demo/events.jsonl")
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Keep everything up afterwards, to look around.")] = False,
    seed: Annotated[int | None, typer.Option(help="Repeats the moments at which workers are killed.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Let the configured model provider answer; it may cost money.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Watch a small store's agents answer real events while their workers are killed, and count what came of it.

    Exit status 0 only when nothing was lost, nothing answered twice and no model call paid for twice.
    """
    from workers.demo import main as run_demo

    raise typer.Exit(run_demo(events=events, stay=stay, seed=seed, live=live, output=_output(as_json=as_json)))


# The console entry ------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """Run a command; its exit status."""
    try:
        app(list(arguments), prog_name="perennial")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else OK if left.code is None else FAILED
    return OK


def main() -> NoReturn:
    """The console entry. Leaves by `os._exit`: temporalio may abort at interpreter exit (DESIGN.md, "Facts")."""
    status = run(sys.argv[1:])
    with contextlib.suppress(BrokenPipeError):  # whoever read our output has seen enough
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
