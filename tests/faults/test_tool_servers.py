"""Agents with MCP servers and bad tools, on the whole stack: P6 and P9 while workers and servers die and change."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import mcp_server
import pytest
import pytest_asyncio
from processes import alive
from servers import Server, eventually
from stack import Stack
from temporalio.service import RPCError
from traffic import letter, workflow_of
from typing_extensions import override

from activities.entries import ToolMessage
from workers.embedded import AGENT
from workflows import names
from workflows.messages import ToolOutcome
from workflows.names import Address

SERVER = Path(__file__).parents[1] / "mcp_server.py"

BAD_TOOLS = '''
import asyncio


async def hang() -> str:
    """Never answer."""
    await asyncio.Event().wait()
    return ""


def shout(characters: int) -> str:
    """Say so much."""
    return "".join(f"{number:09d}\\n" for number in range(characters // 10))


def crash() -> str:
    """Break."""
    raise ConnectionError("the warehouse does not answer")


def odd() -> bytes:
    """Return what is no JSON."""
    return b"\\xff"
'''

AGENTS = {
    "customer-service": """
tools:
  - {{python: "bad_tools:hang", timeout_seconds: 2, attempts: 1}}
  - {{python: "bad_tools:shout"}}
  - {{python: "bad_tools:crash", attempts: 2}}
  - {{python: "bad_tools:odd"}}
  - mcp: local
    command: {command}
    only: [note, wait, die]
    attempts: 3
  - mcp: once
    command: {command}
    prefix: once_
    repeatable: false
  - {{mcp: remote, url: "http://127.0.0.1:{port}/mcp", prefix: remote_, only: [note, hang], timeout_seconds: 2}}
  - {{mcp: clock, command: [mcp-server-time, --local-timezone, UTC]}}
""",
    "guard": """
tools: [{{mcp: late, url: "http://127.0.0.1:{port}/mcp"}}]
""",
}


class Remote(Server):
    """The test's own MCP server over HTTP."""

    def __init__(self, state: Path) -> None:
        super().__init__()
        self._state = state

    @override
    def command(self) -> list[str]:
        return [sys.executable, str(SERVER), str(self._state), str(self.port)]


class Running(Stack):
    """A stack with the agents above, and what the test's servers were asked to do."""

    def __init__(self, folder: Path) -> None:
        self.local, self.remote, self.late = folder / "local", Remote(folder / "remote"), Remote(folder / "late")
        specs = folder / "specs"
        for made in (self.local, folder / "remote", folder / "late", specs):
            made.mkdir()
        (specs / "bad_tools.py").write_text(BAD_TOOLS)
        command = json.dumps([sys.executable, str(SERVER), str(self.local)])
        for name, tools in AGENTS.items():
            port = self.late.port if name == "guard" else self.remote.port
            text = tools.format(command=command, port=port)
            (specs / f"{name}.yaml").write_text(f"name: {name}\ntenant: store\ninstructions: Answer.\n{text}")
        super().__init__(folder / "state", specs=specs)

    def done(self, kind: str, text: str = "") -> list[dict[str, Any]]:
        return [line for line in mcp_server.done(self.local, kind) if line.get("text", "") == text or not text]

    async def call(self, key: str, tool: str, **arguments: Any) -> None:
        """Have an agent call a tool."""
        await self.send(letter(key, f"[[call {tool} {json.dumps(arguments)}]] [[say Done.]]"))

    async def results(self, key: str) -> list[ToolMessage]:
        """What the agent was shown of its calls."""
        entries = (await self.recorded())[workflow_of(key)]
        return [message for entry in entries for message in entry.messages if isinstance(message, ToolMessage)]

    async def result_of(self, key: str, tool: str, **arguments: Any) -> ToolMessage:
        """Have an agent call a tool; what it was shown, once it has answered."""
        await self.call(key, tool, **arguments)
        await self.all_answered(besides="/guard/")
        return (await self.results(key))[-1]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Each test has keys of its own."""
    running = Running(tmp_path_factory.mktemp("servers"))
    with running.remote:
        async with running:
            yield running


async def test_a_server_of_a_registry_answers_an_agent(stack: Stack) -> None:
    """mcp-server-time over stdio, by the whole road of an event."""
    result = await stack.result_of(
        "clock", "convert_time", source_timezone="UTC", time="12:00", target_timezone="Asia/Tokyo"
    )
    assert result.outcome is ToolOutcome.OK
    assert "T21:00:00+09:00" in result.content


async def test_kill_9_of_the_agent_worker_in_mid_call(stack: Running) -> None:
    """P6, P9: a repeatable call is made again, with the same key; one that is not is reported as unknown, and once.

    The servers that the worker had started are gone with it.
    """
    await stack.call("again", "wait", seconds=4, text="again")
    await stack.call("once", "once_wait", seconds=600, text="once")
    await eventually(lambda: stack.done("began", "again") and stack.done("began", "once"), 60)
    before = {line["pid"] for line in stack.done("started")}
    stack.kill(AGENT)
    await eventually(lambda: not any(map(alive, before)))
    await stack.ready_again(AGENT)
    await stack.all_answered(besides="/guard/")
    (again,), (once,) = await stack.results("again"), await stack.results("once")
    assert (again.outcome, again.content) == (ToolOutcome.OK, "waited")
    assert len(stack.done("began", "again")) == 2
    assert once.outcome is ToolOutcome.UNKNOWN
    assert "Whether it took effect is not known" in once.content
    assert len(stack.done("began", "once")) == 1
    assert {line["pid"] for line in stack.done("ended", "again")}.isdisjoint(before)


async def test_a_server_that_changes_does_not_break_a_running_agent(stack: Running) -> None:
    """It goes on with what was recorded, also with a new worker; a call of a tool that is gone is an error it sees."""
    assert (await stack.result_of("changed", "note", text="before")).content == "noted: before"
    async with stack.ledger() as ledger:
        spec = (await ledger.transcript(workflow_of("changed"), limit=1))[-1].spec_digest
    offer = stack.local / "offer"
    try:
        offer.write_text("note talk")
        stack.kill(AGENT)
        await stack.ready_again(AGENT)
        assert (await stack.result_of("changed", "note", text="after")).content == "noted: after"
        gone = await stack.result_of("changed", "wait", seconds=0)
        assert gone.outcome is ToolOutcome.ERROR
        assert "wait" in gone.content
        async with stack.ledger() as ledger:
            assert (await ledger.transcript(workflow_of("changed"), limit=1))[-1].spec_digest == spec
    finally:
        offer.unlink()
        stack.kill(AGENT)
        await stack.ready_again(AGENT)


async def test_mail_waits_for_a_server_that_is_away_when_first_needed(stack: Running) -> None:
    """P14: what is waited for stands in the Web UI; when the server is there, the mail is answered."""
    address = Address("store", "guard", "gate")
    event = {**json.loads(letter("gate", '[[call note {"text": "late"}]]')), "agent": "guard"}
    await stack.send(json.dumps(event).encode())

    async def said() -> str:
        try:
            described = await stack.client.get_workflow_handle(names.workflow_id(address)).describe()
        except RPCError:  # it has not been started yet
            return ""
        pending = described.raw_description.pending_activities
        return "".join(call.last_failure.message for call in pending if call.activity_type.name == "load_spec")

    waits = "Agent guard waits for the tools of its MCP servers, and so does its mail: MCP server late at http://"

    async def waits_for_it() -> bool:
        return waits in await said()

    await eventually(waits_for_it)
    with stack.late:
        await stack.all_answered()


async def test_a_server_that_dies_in_mid_call_is_started_again(stack: Running) -> None:
    """A call that may be repeated is tried as often as the spec says; then the agent is told, and goes on."""
    result = await stack.result_of("dies", "die")
    assert result.outcome is ToolOutcome.ERROR
    assert result.content.startswith("It failed 3 times: MCP server local: it ended during the call")
    assert len(stack.done("died")) == 3
    assert (await stack.result_of("dies", "note", text="alive")).content == "noted: alive"


@pytest.mark.parametrize("tool", ["hang", "remote_hang"])
async def test_a_tool_that_hangs_is_given_up(stack: Running, tool: str) -> None:
    """After its timeout; whether it took effect nobody knows, and the agent goes on."""
    arguments = {"seconds": 30} if tool == "remote_hang" else {}
    result = await stack.result_of(tool, tool, **arguments)
    assert result.outcome is ToolOutcome.UNKNOWN
    assert result.content.startswith("It took too long or its worker died")


async def test_a_tool_that_breaks_or_returns_no_json_is_told_of(stack: Running) -> None:
    """P14: both are shown to the model."""
    broken = await stack.result_of("breaks", "crash")
    assert (broken.outcome, broken.content) == (
        ToolOutcome.ERROR,
        "It failed 2 times: ConnectionError: the warehouse does not answer",
    )
    assert (await stack.result_of("breaks", "odd")).content == r"b'\xff'"


async def test_a_megabyte_stays_out_of_the_workflow(stack: Running) -> None:
    """P7: kept whole in the ledger, and read on in by the agent; its history grows by what it was shown."""
    whole = "".join(f"{number:09d}\n" for number in range(100_000))
    shown = await stack.result_of("large", "shout", characters=1_000_000)
    assert shown.outcome is ToolOutcome.OK
    name = hashlib.sha256(whole.encode()).hexdigest()[:16]
    assert f'read_result(id="{name}", offset=' in shown.content
    rest = await stack.result_of("large", "read_result", id=name, offset=999_990)
    assert rest.content == "000099999\n\n[Characters 999990 to 1000000 of 1000000. This is the end.]"
    history = await stack.client.get_workflow_handle(workflow_of("large")).fetch_history()
    assert sum(event.ByteSize() for event in history.events) < 150_000


async def test_a_cancelled_agent_cancels_its_call(stack: Running) -> None:
    """What was asked of the server is ended there, and the agent keeps its state."""
    await stack.call("cancelled", "wait", seconds=600, text="cancelled")
    await eventually(lambda: stack.done("began", "cancelled"), 60)
    await stack.client.get_workflow_handle(workflow_of("cancelled")).cancel()
    await eventually(lambda: stack.done("cancelled", "cancelled"))


async def test_a_server_that_hangs_does_not_outlive_a_killed_worker(stack: Running) -> None:
    """It notices nothing, and the kernel ends it; the call's outcome is unknown."""
    await stack.call("deaf", "once_hang", seconds=600)
    (hangs,) = await eventually(lambda: stack.done("hangs"), 60)
    stack.kill(AGENT)
    await eventually(lambda: not alive(hangs["pid"]))
    await stack.ready_again(AGENT)
    (result,) = await eventually(lambda: stack.results("deaf"), 60)
    assert result.outcome is ToolOutcome.UNKNOWN


async def test_no_server_outlives_a_worker_that_is_stopped(stack: Running) -> None:
    """SIGTERM: the worker drains, and its servers end with it."""
    await stack.call("stopped", "note", text="stopped")
    await eventually(lambda: stack.done("note", "stopped"), 60)
    servers = {line["pid"] for line in stack.done("started")}
    assert any(map(alive, servers))
    stack.kill(AGENT, signal.SIGTERM)
    await eventually(lambda: not any(map(alive, servers)))
    await stack.ready_again(AGENT)
