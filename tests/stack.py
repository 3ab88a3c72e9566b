"""The whole embedded stack for tests: real servers, real workers, the rehearsal endpoint; and what came of events.

    async with Stack(tmp_path) as stack:
        await stack.send(letter("customer-07", "[[latency 1.5]] Where is my order?"))
        await stack.call_in_flight()
        stack.kill(MODEL)
        await stack.all_answered()
        assert (await stack.tally()).kept

Each has a state directory of its own and any free ports. What events come to can be asked as of any `Traffic`.
`Command` runs `perennial` as people do, as a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from processes import alive
from servers import eventually
from traffic import Traffic, tails
from typing_extensions import override

from activities.kafka import Kafka
from workers.embedded import TOPICS, EmbeddedStack, Ports, StackAddresses, StackReport
from workers.settings import PROVIDER_VARIABLES, Settings, provider_environment

ROOT = Path(__file__).parents[1]
STORE = ROOT / "deploy" / "agents"
PERENNIAL = Path(sys.executable).with_name("perennial")
ANY_PORTS = Ports(temporal=0, temporal_ui=0, kafka=0, rehearsal=0, ingest=0, agent=0, model=0)


class Stack(Traffic):
    """A running stack.

    Args:
        state: its state directory, and where the tools keep their files.
        specs: the agents.
        rehearse: the rehearsal endpoint answers; else the provider that `variables` name.
        variables: environment variables for the processes, instead of the PERENNIAL_ and provider variables of the
            test's own environment.
    """

    def __init__(
        self,
        state: Path,
        *,
        specs: Path = STORE,
        rehearse: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(specs)
        self.reports: list[StackReport] = []
        self._rehearse = rehearse
        self._variables = {
            "PERENNIAL_STATE_DIR": str(state),
            "PERENNIAL_SPECS": str(specs),
            "PERENNIAL_REHEARSAL_LATENCY": "0.01",
            **(variables or {}),
        }
        self._state = state
        self._exits = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        with only_these_variables(self._variables):
            self.settings = Settings.load()
            self._embedded = EmbeddedStack(
                self.settings,
                report=self.reports.append,
                topics=sorted({*TOPICS, *self.routes.topics}),
                ports=ANY_PORTS,
                rehearse=self._rehearse,
            )
            await self._embedded.start()
        self._exits.push_async_callback(self._embedded.stop)
        try:
            await self._exits.enter_async_context(self.watched())
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    @property
    def addresses(self) -> StackAddresses:
        return self._embedded.addresses

    @property
    def tools(self) -> Path:
        """Where the tools keep their files."""
        return self._state / "tools"

    @property
    @override
    def kafka(self) -> Kafka:
        return Kafka(self.addresses.kafka, idempotence=False)

    @property
    @override
    def temporal_address(self) -> str:
        return self.addresses.temporal

    @property
    @override
    def ledger_url(self) -> str:
        return self.addresses.ledger

    @property
    @override
    def rehearsal_url(self) -> str:
        return self.addresses.rehearsal or ""

    @override
    def logs(self) -> str:
        return tails(self.addresses.logs)

    # Faults ----------------------------------------------------------------------------------------------------------

    def kill(self, component: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a component."""
        self._embedded.kill(component, number)

    def pid(self, component: str) -> int | None:
        return self._embedded.pid(component)

    async def ready_again(self, component: str) -> None:
        """Wait until a component that was killed works again."""
        async with asyncio.timeout(60):
            await self._embedded.wait_ready(component)


def own_variables() -> list[str]:
    """The names of the variables in this environment that speak of Perennial or of model providers."""
    ours = [name for name in os.environ if name.startswith("PERENNIAL_")]
    return [*ours, *PROVIDER_VARIABLES, *provider_environment()]


@contextlib.contextmanager
def only_these_variables(variables: Mapping[str, str]) -> Any:
    """This process's environment with these variables, and no others of ours or of model providers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in own_variables():
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


class Command:
    """A `perennial` command that runs until it is asked to stop, such as `perennial dev`.

    Its output goes to files in `state`, so that it never waits for a reader.
    """

    def __init__(
        self, *arguments: str, state: Path, cwd: Path = ROOT, variables: Mapping[str, str] | None = None
    ) -> None:
        self.state = state
        self._arguments = arguments
        self._cwd = cwd
        self._variables = {"PERENNIAL_STATE_DIR": str(state), **(variables or {})}
        self.process: asyncio.subprocess.Process
        self.children: list[int] = []

    async def __aenter__(self) -> Self:
        self.state.mkdir(parents=True, exist_ok=True)
        with self.output.open("wb") as output:
            self.process = await asyncio.create_subprocess_exec(
                *(str(PERENNIAL), *self._arguments),
                cwd=self._cwd,
                env=environment(self._variables),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    @property
    def output(self) -> Path:
        return self.state.with_name(f"{self.state.name}-output.txt")

    def said(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace")

    async def up(self) -> None:
        """Wait until its stack is up."""

        def is_up() -> bool:
            assert self.process.returncode is None, self.said()
            return "up after" in self.said()

        await eventually(is_up, 60)

    def send_signal(self, number: signal.Signals) -> list[int]:
        """Signal it as a terminal would, the whole group; the processes of its stack that are there now."""
        children = descendants(self.process.pid)
        os.killpg(self.process.pid, number)
        return children

    async def ended(self, seconds: float = 60) -> int:
        """Wait for its end; its exit status."""
        async with asyncio.timeout(seconds):
            return await self.process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that this process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, _, rest = stat.read_text().rpartition(")")
            children.setdefault(int(rest.split()[1]), []).append(int(number.split()[0]))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


async def none_alive(pids: Sequence[int]) -> None:
    """Wait until none of these processes runs."""
    await eventually(lambda: not any(map(alive, pids)))


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This environment with these variables, and no others of ours or of model providers."""
    left_out = own_variables()
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    path = f"{PERENNIAL.parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, **variables}


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def run(
    *command: str, cwd: Path = ROOT, variables: Mapping[str, str] | None = None, seconds: float = 90
) -> Finished:
    """Run a command to its end, with only these variables of ours."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=environment(variables or {}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


async def perennial(*arguments: str, state: Path, cwd: Path = ROOT, seconds: float = 90) -> Finished:
    """Run a `perennial` command to its end, beside a stack on this state directory."""
    variables = {"PERENNIAL_STATE_DIR": str(state)}
    return await run(str(PERENNIAL), *arguments, cwd=cwd, variables=variables, seconds=seconds)
