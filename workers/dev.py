"""`perennial dev`: the embedded stack at a terminal, until Ctrl-C or SIGTERM.

asyncio.run(run_stack(settings, output))
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
from pathlib import Path
from urllib.parse import quote

from rich.text import Text

from workers.console import Output
from workers.embedded import TOPICS, EmbeddedStack, PortTaken, StackAddresses, StackError, StackReport, StackUp
from workers.exits import CommandError
from workers.operations import known_specs
from workers.settings import Settings
from workers.supervisor import Died, Ended, NotStarted, Ready
from workflows import names
from workflows.spec import AgentSpec

_LABEL_WIDTH = 9


async def run_stack(settings: Settings, output: Output) -> None:
    """Start the stack, say where everything is, wait to be stopped, and drain.

    Raises:
        CommandError: the stack can't be started.
    """
    specs = known_specs(settings.specs) or []
    subscribed = {subscription.topic for spec in specs for subscription in spec.subscriptions}

    def tell(happened: StackReport) -> None:
        for line in lines(happened):
            output.say(line)

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    output.say(f"starting, with the state in {settings.state_dir.absolute()}")
    try:
        stack = EmbeddedStack(settings, report=tell, topics=sorted({*TOPICS, *subscribed}))
        with output.working("starting Temporal, Kafka and the workers"):
            started = await _started(stack, stop)
        if started:
            for line in hints(settings, specs):
                output.say(line)
            await stop.wait()
        with output.working("draining: what runs is finished first"):
            output.say("stopping: events in flight and running turns are finished first")
            await stack.stop()
    except StackError as error:
        raise CommandError(str(error)) from error
    output.say("stopped; the next `perennial dev` goes on with the same agents")


async def _started(stack: EmbeddedStack, stop: asyncio.Event) -> bool:
    """Start the stack; False if asked to stop first, and then nothing is left running."""
    starting = asyncio.ensure_future(stack.start())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            return True
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return False
    finally:
        stopped.cancel()


def lines(happened: StackReport) -> list[Text]:
    """What happened in the stack, for people."""
    match happened:
        case StackUp():
            return [Text(f"up after {happened.seconds:.1f} s", "bold green"), *_places(happened.addresses)]
        case Ready():
            return [Text.assemble(("ok   ", "green"), str(happened))]
        case Died() | NotStarted():
            return [Text.assemble(("!!   ", "bold red"), str(happened))]
        case PortTaken():
            return [Text.assemble(("note ", "yellow"), str(happened))]
        case Ended() if happened.killed:
            return [Text.assemble(("!!   ", "bold red"), str(happened))]
        case _:
            return [Text.assemble("     ", (str(happened), "dim"))]


def _places(addresses: StackAddresses) -> list[Text]:
    agents = quote(f"WorkflowType = '{names.WORKFLOW_TYPE}'")
    places = [
        ("Web UI", addresses.ui),
        ("agents", f"{addresses.ui}/namespaces/default/workflows?query={agents}"),
        ("Temporal", addresses.temporal),
        ("Kafka", addresses.kafka),
        *((("rehearsal", f"{addresses.rehearsal} (no model provider is configured)"),) if addresses.rehearsal else ()),
        *(("metrics", f"{url} ({name})") for name, url in addresses.metrics.items()),
        ("logs", str(addresses.logs)),
    ]
    return [Text.assemble("  ", (label.ljust(_LABEL_WIDTH), "dim"), " ", place) for label, place in places]


def hints(settings: Settings, specs: list[AgentSpec]) -> list[Text]:
    """What to do next, with an agent that is there."""
    spec = specs[0] if specs else None
    tenant, agent = (spec.tenant, spec.name) if spec else ("TENANT", "AGENT")
    elsewhere = settings.state_dir.absolute() != Path(".perennial").absolute()
    commands = [
        *([f"export PERENNIAL_STATE_DIR={shlex.quote(str(settings.state_dir.absolute()))}"] if elsewhere else []),
        "perennial tail",
        f"perennial ask {tenant}/{agent}/me 'Hello?'",
        f"perennial send --tenant {tenant} --agent {agent} --subject me --type greeting --data '\"Hello?\"'",
        "perennial doctor",
    ]
    return [
        Text("next, in another terminal:", "bold"),
        *(Text(f"  {command}") for command in commands),
        Text("Ctrl-C drains and stops everything.", "dim"),
    ]
