"""Issue 2: a second `perennial dev` on the same state goes on with the same agents, however the first one ended."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from servers import eventually
from stack import ROOT, Command, none_alive, only_these_variables
from temporalio.client import Client
from temporalio.service import RPCError
from traffic import letter, workflow_of

from workers import operations, topics
from workers.settings import Settings
from workflows import names
from workflows.agent import AgentWorkflow
from workflows.messages import AskRequest, Status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

_KEY = "visitor-9"


class _Dev:
    """A running `perennial dev`, and what is asked of its stack."""

    def __init__(self, command: Command, settings: Settings, client: Client) -> None:
        self._command = command
        self._settings = settings
        self._client = client

    async def ask(self, text: str) -> str:
        """A question to the agent, and its answer."""
        address = names.parse_workflow_id(workflow_of(_KEY))
        reply = await operations.ask(self._client, self._settings, address, AskRequest(text=text), seconds=60)
        return reply.text

    async def send(self) -> None:
        """An event for the agent, through Kafka: the same one each time."""
        line = topics.Line("event", letter(_KEY, "[[say Noted.]] Please note that I have moved.", "moved-1"))
        prepared, _ = topics.prepare([line], names.EVENTS_TOPIC, None)
        await topics.send(self._settings, names.EVENTS_TOPIC, prepared)

    async def status(self) -> Status:
        """What the agent says of itself."""
        return await self._client.get_workflow_handle_for(AgentWorkflow.run, workflow_of(_KEY)).query(
            AgentWorkflow.status
        )

    async def ended_by(self, number: signal.Signals) -> int:
        """Its exit status after this signal, once none of its processes is left."""
        children = self._command.send_signal(number)
        status = await self._command.ended()
        await none_alive(children)
        return status


@asynccontextmanager
async def _dev(state: Path) -> AsyncIterator[_Dev]:
    """`perennial dev` on this state, up; with no rules, the rehearsal endpoint tells what it was shown."""
    rules = state.with_name("rules.yaml")
    rules.write_text("rules: []\n")
    async with Command("dev", state=state, cwd=ROOT, variables={"PERENNIAL_REHEARSAL_RULES": str(rules)}) as command:
        await command.up()
        with only_these_variables({"PERENNIAL_STATE_DIR": str(state)}):
            settings = Settings.load()
        yield _Dev(command, settings, await operations.connect(settings))


async def test_a_second_start_remembers_also_after_a_crash(tmp_path: Path) -> None:
    """The conversation goes on after Ctrl-C, and after SIGKILL of everything; events seen before are still dropped."""
    state = tmp_path / "state"
    async with _dev(state) as first:
        await first.send()
        await eventually(lambda: _counts(first, accepted=1, duplicates=0))
        assert "Is the museum open on Monday?" in await first.ask("Is the museum open on Monday?")
        assert await first.ended_by(signal.SIGINT) == 0

    async with _dev(state) as second:
        assert "museum" in await second.ask("What did I ask you before?")
        await second.send()
        await eventually(lambda: _counts(second, accepted=3, duplicates=1))
        assert "Where is the cloakroom?" in await second.ask("Where is the cloakroom?")
        assert await second.ended_by(signal.SIGKILL) == -signal.SIGKILL

    async with _dev(state) as third:
        assert "cloakroom" in await third.ask("What did I ask you before?")
        await third.send()
        await eventually(lambda: _counts(third, accepted=5, duplicates=2))


async def _counts(dev: _Dev, *, accepted: int, duplicates: int) -> bool:
    try:
        status = await dev.status()
    except RPCError:  # there is no such agent yet
        return False
    return (status.accepted, status.duplicates) == (accepted, duplicates)
