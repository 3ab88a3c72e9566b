"""MCP servers: real ones, over stdio and streamable HTTP; what they do wrong has an outcome agents recover from."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import mcp_server
import pytest
from processes import alive
from servers import Server, eventually
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment
from typing_extensions import override

from activities import mcp_servers
from activities.ledger import Ledger
from activities.mcp_servers import NotRun, Servers
from activities.tools import Tools
from workers.spawn import launcher
from workflows.errors import NOT_RUN, Remedy
from workflows.messages import ToolCall, ToolOutcome, ToolRequest, ToolResult
from workflows.spec import McpServer, McpTool, ResolvedSpec, ToolDefinition

HERE = Path(__file__).parents[1]
AGENT = "agent/store/desk/order-42"
CLOCK = McpServer(command=["mcp-server-time", "--local-timezone", "UTC"])
LOOK = {"name": "look", "inputSchema": {"type": "object"}}


def over_stdio(state: Path, **more: Any) -> McpServer:
    return McpServer(command=[sys.executable, str(HERE / "mcp_server.py"), str(state)], **more)


def raw(tools: list[Any], garbage: int = 0, answer: Any = None) -> McpServer:
    arguments = [json.dumps(tools), str(garbage), json.dumps(answer) if answer else "none"]
    return McpServer(command=[sys.executable, str(HERE / "raw_mcp_server.py"), *arguments])


class HttpServer(Server):
    """The test's own MCP server over streamable HTTP."""

    def __init__(self, state: Path) -> None:
        super().__init__()
        self._state = state

    @override
    def command(self) -> list[str]:
        return [sys.executable, str(HERE / "mcp_server.py"), str(self._state), str(self.port)]

    @property
    def server(self) -> McpServer:
        return McpServer(url=f"http://127.0.0.1:{self.port}/mcp")


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[Servers]:
    async with Servers(lambda _: {}, folder=tmp_path, launcher=launcher()) as running:
        yield running


@pytest.fixture
def http(tmp_path: Path) -> Iterator[HttpServer]:
    with HttpServer(tmp_path) as server:
        yield server


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as opened:
        yield opened


class Caller:
    """Runs tools of an MCP server as Temporal does, by an agent's recorded spec."""

    def __init__(self, servers: Servers, ledger: Ledger, server: McpServer) -> None:
        self._tools = Tools(lambda _agent, _name: None, Path("/some/workspace"), ledger, servers)
        self._ledger, self._server = ledger, server

    async def __call__(
        self, tool: str, environment: ActivityEnvironment | None = None, /, **arguments: Any
    ) -> ToolResult:
        return await self.with_text(tool, json.dumps(arguments), environment)

    async def with_text(self, tool: str, arguments: str, environment: ActivityEnvironment | None = None) -> ToolResult:
        """Call it with arguments as a model wrote them."""
        definition = ToolDefinition(name=f"x_{tool}", mcp=McpTool(server="x", tool=tool))
        spec = ResolvedSpec(
            name="desk", tenant="store", instructions="Answer.", tools=[definition], servers={"x": self._server}
        )
        request = ToolRequest(
            workflow_id=AGENT,
            turn=1,
            call=ToolCall(id="1", name=definition.name, arguments=arguments),
            spec_digest=await self._ledger.put_spec(spec),
            idempotency_key=f"{AGENT}/1/1/0",
        )
        return await (environment or ActivityEnvironment()).run(self._tools.run_tool, request)


def started(state: Path) -> list[int]:
    """The processes of the test's own server, in the order of their starts."""
    return [line["pid"] for line in mcp_server.done(state, "started")]


# Listing -------------------------------------------------------------------------------------------------------------


async def test_a_server_of_a_registry_lists_its_tools_and_answers(servers: Servers, ledger: Ledger) -> None:
    """mcp-server-time, as anybody would install it."""
    tools, faults = await servers.list_tools("x", CLOCK)
    assert ([tool.name for tool in tools], faults) == (["get_current_time", "convert_time"], [])
    assert tools[0].parameters["required"] == ["timezone"]
    call = Caller(servers, ledger, CLOCK)
    now = await call("get_current_time", timezone="Asia/Tokyo")
    assert now.outcome is ToolOutcome.OK
    assert json.loads(now.content)["timezone"] == "Asia/Tokyo"
    wrong = await call("get_current_time", timezone="Mars/Olympus")
    assert wrong.outcome is ToolOutcome.ERROR
    assert "Mars/Olympus" in wrong.content


async def test_what_a_server_says_of_its_tools_tells_which_are_repeatable(servers: Servers, tmp_path: Path) -> None:
    """P9: those that only read, and those whose repetition changes nothing; of all others it is not assumed."""
    tools, _ = await servers.list_tools("x", over_stdio(tmp_path))
    assert [tool.name for tool in tools if tool.repeatable] == ["wait", "die"]
    assert {"note", "hang"} < {tool.name for tool in tools}


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"type": "object", "properties": {"a": {"type": "nonsense"}}}, "'nonsense' is not valid"),
        ({"type": "object", "minProperties": -1}, "-1 is less than the minimum"),
    ],
)
async def test_a_tool_whose_schema_is_none_is_left_out(
    servers: Servers, schema: dict[str, Any], complaint: str
) -> None:
    """P14: a model provider would refuse every request with it; the server's other tools are there."""
    tools, (fault,) = await servers.list_tools("x", raw([{"name": "bad", "inputSchema": schema}, LOOK]))
    assert [tool.name for tool in tools] == ["look"]
    assert fault.startswith("tool bad is left out: ")
    assert complaint in fault


@pytest.mark.parametrize(
    "tools", [["look"], [{"name": "look", "inputSchema": "none"}], [LOOK, {"name": "bad", "inputSchema": {}}]]
)
async def test_what_is_no_list_of_tools_is_said(servers: Servers, tools: list[Any]) -> None:
    """P14: an operator is told which server it is, and mail waits until it is mended."""
    with pytest.raises(NotRun, match="MCP server x does not list its tools: "):
        await servers.list_tools("x", raw(tools))


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        (McpServer(command=["no-such-program"]), "there is no program no-such-program"),
        (McpServer(command=["false"]), "could not be started: its program ended at once"),
        (McpServer(command=["yes"]), "it writes what is not JSON-RPC"),
        (McpServer(command=["sleep", "300"], env=["NOT_SET"]), "needs the environment variable NOT_SET"),
        (McpServer(url="http://127.0.0.1:9/mcp"), "at http://127.0.0.1:9/mcp can't be reached: "),
        (McpServer(url="http://127.0.0.1:9/", headers={"A": "${NOT_SET}"}), "needs the environment variable NOT_SET"),
    ],
)
async def test_a_server_that_is_away_was_not_asked(
    servers: Servers, ledger: Ledger, server: McpServer, complaint: str
) -> None:
    """P9: the call certainly had no effect, and says so; so may even one that must not be repeated be made again."""
    with pytest.raises(NotRun) as away:
        await servers.list_tools("x", server)
    assert complaint in str(away.value)
    with pytest.raises(ApplicationError) as refused:
        await Caller(servers, ledger, server)("look")
    assert refused.value.type == NOT_RUN
    assert complaint in refused.value.message


async def test_a_server_that_does_not_answer_is_given_up(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It takes its input, and says nothing; its program is not left behind."""
    monkeypatch.setattr(mcp_servers, "_CONNECT_SECONDS", 0.5)
    (tmp_path / "mute.sh").write_text("#!/bin/sh\necho $$ > pid\nwhile read -r line; do :; done\n")
    (tmp_path / "mute.sh").chmod(0o700)
    with pytest.raises(NotRun, match=r"MCP server x did not answer within 0\.5 s"):
        await servers.list_tools("x", McpServer(command=["./mute.sh"]))
    await eventually(lambda: not alive(int((tmp_path / "pid").read_text())))


# Calls ---------------------------------------------------------------------------------------------------------------


async def test_calls_share_one_process(servers: Servers, ledger: Ledger, tmp_path: Path) -> None:
    """It is started when first needed, and by whichever call; all calls side by side are answered."""
    call = Caller(servers, ledger, over_stdio(tmp_path))
    assert not started(tmp_path)
    results = await asyncio.gather(*(call("note", text=str(number)) for number in range(10)))
    assert [result.content for result in results] == [f"noted: {number}" for number in range(10)]
    assert len(started(tmp_path)) == 1


async def test_the_idempotency_key_goes_along(servers: Servers, ledger: Ledger, tmp_path: Path) -> None:
    """P9: in the request's `_meta`, over either transport."""
    await Caller(servers, ledger, over_stdio(tmp_path))("note", text="a")
    with HttpServer(tmp_path) as http:
        await Caller(servers, ledger, http.server)("note", text="b")
    notes = mcp_server.done(tmp_path, "note")
    assert [(line["text"], line["key"]) for line in notes] == [("a", f"{AGENT}/1/1/0"), ("b", f"{AGENT}/1/1/0")]


async def test_a_server_is_given_the_variables_that_it_asks_for(ledger: Ledger, tmp_path: Path) -> None:
    """And no others of the worker's, such as the keys of model providers."""
    ours = {"SECRET": "s3cret"}
    async with Servers(lambda names: {name: ours[name] for name in names if name in ours}) as servers:
        await Caller(servers, ledger, over_stdio(tmp_path, env=["SECRET"]))("note", text="with")
        await Caller(servers, ledger, over_stdio(tmp_path))("note", text="without")
    assert [line["secret"] for line in mcp_server.done(tmp_path, "note")] == ["s3cret", None]


async def test_what_a_tool_calls_an_error_is_shown_to_the_model(
    servers: Servers, ledger: Ledger, http: HttpServer
) -> None:
    """As an error; so is what the server refuses: a tool that it has no more, or arguments that are wrong."""
    call = Caller(servers, ledger, http.server)
    for result, said in (
        (await call("refuse", reason="not on Sundays"), "not on Sundays"),
        (await call("gone"), "gone"),
        (await call("note", txt="a"), "text"),
    ):
        assert result.outcome is ToolOutcome.ERROR
        assert said in result.content


async def test_what_is_no_text_is_named(servers: Servers, ledger: Ledger, tmp_path: Path) -> None:
    """Models of any provider can read that it is there."""
    result = await Caller(servers, ledger, over_stdio(tmp_path))("draw")
    assert result.content == "a picture\n[image/png, not shown]"


async def test_a_megabyte_from_a_server_is_kept_and_shortened(
    servers: Servers, ledger: Ledger, http: HttpServer
) -> None:
    """Over HTTP too, where one event of a stream holds it whole."""
    result = await Caller(servers, ledger, http.server)("talk", characters=1_000_000)
    assert result.outcome is ToolOutcome.OK
    assert len(result.content.encode()) <= 32 * 1024
    assert "of 1000000 characters. To read on: read_result(" in result.content


@pytest.mark.parametrize("answer", [{"content": "text"}, {"content": [{"type": "smell"}]}, {"contents": []}])
async def test_a_result_that_is_none_is_an_error_after_the_call(servers: Servers, ledger: Ledger, answer: Any) -> None:
    """P9: the tool has run: the model is told, and it is not run again."""
    result = await Caller(servers, ledger, raw([LOOK], answer=answer))("look")
    assert result.outcome is ToolOutcome.ERROR
    assert result.content.startswith("look has run, but MCP server x returned something else")


async def test_a_result_that_its_own_schema_does_not_allow_is_an_error_after_the_call(
    servers: Servers, ledger: Ledger
) -> None:
    """As the protocol wants it checked."""
    tool = {**LOOK, "outputSchema": {"type": "object", "required": ["n"]}}
    answer = {"content": [], "structuredContent": {"m": 1}}
    result = await Caller(servers, ledger, raw([tool], answer=answer))("look")
    assert result.outcome is ToolOutcome.ERROR
    assert "'n' is a required property" in result.content


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("{", "Expecting"),
        ("[]", "they are no JSON object"),
        ('{"text": NaN}', "not JSON compliant"),
        ('{"text": "\\ud800"}', "surrogates not allowed"),
        ('{"text": ' + "[" * 100_000, "recursion"),
    ],
)
async def test_arguments_that_cannot_be_sent_are_shown_to_the_model(
    servers: Servers, ledger: Ledger, tmp_path: Path, arguments: str, complaint: str
) -> None:
    """The server is not asked, and its session goes on."""
    call = Caller(servers, ledger, over_stdio(tmp_path))
    refused = await call.with_text("note", arguments)
    assert refused.outcome is ToolOutcome.ERROR
    assert refused.content.startswith("Wrong arguments: ")
    assert complaint in refused.content
    assert (await call("note", text="fine")).outcome is ToolOutcome.OK


# Faults --------------------------------------------------------------------------------------------------------------


async def test_a_server_that_dies_in_mid_call_leaves_the_outcome_unknown(
    servers: Servers, ledger: Ledger, tmp_path: Path
) -> None:
    """P9: it may have had its effect; the next call has a new server."""
    call = Caller(servers, ledger, over_stdio(tmp_path))
    with pytest.raises(ApplicationError, match="MCP server x: it ended during the call") as lost:
        await call("die")
    assert (lost.value.type, lost.value.non_retryable) == (Remedy.RETRY_LATER, False)
    assert (await call("note", text="again")).outcome is ToolOutcome.OK
    assert len(started(tmp_path)) == 2


async def test_a_server_that_died_between_calls_is_started_again(
    servers: Servers, ledger: Ledger, tmp_path: Path
) -> None:
    """Nobody is told: no call was lost with it."""
    call = Caller(servers, ledger, over_stdio(tmp_path))
    await call("note", text="first")
    (first,) = started(tmp_path)
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: all(session.ended for session in servers._sessions.values()))
    assert (await call("note", text="second")).outcome is ToolOutcome.OK
    assert len(started(tmp_path)) == 2


async def test_an_http_server_that_was_restarted_is_called_again(
    servers: Servers, ledger: Ledger, http: HttpServer
) -> None:
    """Its sessions are gone with it; while it is away a call was not run, and in mid-call its outcome is unknown."""
    call = Caller(servers, ledger, http.server)
    await call("note", text="first")
    http.kill()
    with pytest.raises(ApplicationError, match="can't be reached") as away:
        await call("note", text="never")
    assert away.value.type == NOT_RUN
    http.start()
    assert (await call("note", text="second")).outcome is ToolOutcome.OK
    waiting = asyncio.create_task(call("wait", seconds=600))
    await eventually(lambda: mcp_server.done(http._state, "began"))
    http.kill()
    with pytest.raises(ApplicationError) as lost:
        await waiting
    assert lost.value.type == Remedy.RETRY_LATER
    http.start()
    assert (await call("note", text="third")).outcome is ToolOutcome.OK
    assert [line["text"] for line in mcp_server.done(http._state, "note")] == ["first", "second", "third"]


class Sessions(BaseHTTPRequestHandler):
    """A server of the protocol's older kind, which keeps sessions, and forgets them when told to."""

    known: ClassVar[set[str]] = set()
    calls: ClassVar[int] = 0

    @override
    def log_message(self, format: str, *args: Any) -> None: ...

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if request["method"] == "initialize":
            self.known.add(name := str(uuid4()))
            server = {"name": "old", "version": "1"}
            result: Any = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": server}
            self.answer(200, {"id": request["id"], "result": result}, {"mcp-session-id": name})
        elif request["method"] == "server/discover":
            self.answer(200, {"id": request["id"], "error": {"code": -32601, "message": "Method not found"}})
        elif self.headers.get("mcp-session-id") not in self.known:
            self.answer(404, {"id": None, "error": {"code": -32600, "message": "Session not found"}})
        elif "id" not in request:
            self.answer(202, None)
        elif request["method"] == "tools/list":
            self.answer(200, {"id": request["id"], "result": {"tools": [LOOK]}})
        else:
            type(self).calls += 1
            self.answer(200, {"id": request["id"], "result": {"content": [{"type": "text", "text": "seen"}]}})

    def do_GET(self) -> None:
        self.answer(405, None)

    do_DELETE = do_GET  # noqa: N815

    def answer(self, status: int, message: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode() if message else b""
        self.send_response(status)
        for name, value in {**(headers or {}), "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(body)


async def test_a_session_that_the_server_has_forgotten_is_made_anew(servers: Servers, ledger: Ledger) -> None:
    """As after its restart: the call was not run in the old session, so it is made in a new one, once."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Sessions) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        call = Caller(servers, ledger, McpServer(url=f"http://127.0.0.1:{running.server_port}/mcp"))
        assert (await call("look")).content == "seen"
        Sessions.known.clear()
        assert (await call("look")).content == "seen"
        assert (Sessions.calls, len(Sessions.known)) == (2, 1)
        await servers.__aexit__()
        running.shutdown()


@pytest.mark.parametrize("kind", ["stdio", "http"])
async def test_a_cancelled_call_is_cancelled_at_the_server(
    servers: Servers, ledger: Ledger, http: HttpServer, kind: str
) -> None:
    """Its work ends; other calls of the session do not notice."""
    state = http._state
    call = Caller(servers, ledger, http.server if kind == "http" else over_stdio(state))
    environment = ActivityEnvironment()
    cancelled = asyncio.create_task(call("wait", environment, seconds=600, text="cancelled"))
    other = asyncio.create_task(call("wait", seconds=0.5, text="other"))
    await eventually(lambda: len(mcp_server.done(state, "began")) == 2)
    environment.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await eventually(lambda: mcp_server.done(state, "cancelled"))
    assert (await other).content == "waited"
    assert [line["text"] for line in mcp_server.done(state, "cancelled")] == ["cancelled"]


async def test_a_server_that_hangs_is_ended_once_a_call_is_given_up(
    servers: Servers, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool's own timeout gives it up; a server that then answers nothing is of no use to the next call."""
    monkeypatch.setattr(mcp_servers, "_PROBE_SECONDS", 0.2)
    call = Caller(servers, ledger, over_stdio(tmp_path))
    environment = ActivityEnvironment()
    hanging = asyncio.create_task(call("hang", environment, seconds=600))
    await eventually(lambda: mcp_server.done(tmp_path, "hangs"))
    environment.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    (first,) = started(tmp_path)
    await eventually(lambda: not alive(first))
    assert (await call("note", text="again")).outcome is ToolOutcome.OK


async def test_a_server_that_logs_on_its_output_is_understood(servers: Servers, ledger: Ledger) -> None:
    """Many do, by mistake."""
    answer = {"content": [{"type": "text", "text": "found"}]}
    result = await Caller(servers, ledger, raw([LOOK], garbage=20, answer=answer))("look")
    assert (result.outcome, result.content) == (ToolOutcome.OK, "found")


async def test_a_server_that_talks_garbage_is_ended(servers: Servers, ledger: Ledger) -> None:
    """Instead of an answer, and for long: the call ends before its timeout, and its outcome is unknown."""
    with pytest.raises(ApplicationError, match="it ended during the call") as lost:
        await Caller(servers, ledger, raw([LOOK], garbage=200))("look")
    assert lost.value.type == Remedy.RETRY_LATER


async def test_no_server_outlives_its_worker(ledger: Ledger, tmp_path: Path) -> None:
    """Neither one that is idle nor one that hangs, nor what it has started itself."""
    (tmp_path / "wrapped.sh").write_text(f"#!/bin/sh\n{sys.executable} {HERE / 'mcp_server.py'} {tmp_path}\n")
    (tmp_path / "wrapped.sh").chmod(0o700)
    async with Servers(lambda _: {}, folder=tmp_path, launcher=launcher()) as servers:
        call = Caller(servers, ledger, McpServer(command=["./wrapped.sh"]))
        hanging = asyncio.create_task(call("hang", seconds=600))
        await eventually(lambda: mcp_server.done(tmp_path, "hangs"))
        (pid,) = started(tmp_path)
    with pytest.raises(ApplicationError, match="it ended during the call"):
        await hanging
    assert not alive(pid)
