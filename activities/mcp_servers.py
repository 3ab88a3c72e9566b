"""MCP servers: sessions with them, made when first needed, shared by all calls, and made anew when they break.

    async with Servers(environment, folder=specs, launcher=spawn.launcher()) as servers:
        tools = await servers.list_tools("clock", server)
        text, outcome = await servers.call("clock", server, "get_current_time", {"timezone": "UTC"}, key)

A server's process ends with this one: its input is closed, then its group is told to end and killed; `launcher` sees to
it where this process is killed itself.

What goes wrong is told apart by what it means for the call. `NotRun`: it certainly had no effect (the server is away).
`Lost`: it may have had one. What the server refuses, and what a tool calls an error, is a result for the model.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2
from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft202012Validator, validator_for
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import get_default_environment, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import (
    CONNECTION_CLOSED,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    Implementation,
    ResourceLink,
    TextContent,
    TextResourceContents,
    Tool,
)
from pydantic import ValidationError
from pydantic_core import to_json
from typing_extensions import override

from workflows import names
from workflows.errors import Remedy, remedy_for_jsonrpc
from workflows.messages import ToolOutcome
from workflows.spec import ListedTool, McpServer

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_SECONDS = 60  # a first start may download the server
_LIST_SECONDS = 30
_PROBE_SECONDS = 10
_PAGES = 100
_TOOLS = 1000
_GARBAGE_LINES = 100  # a log line on standard output is forgiven, a flood is not
_EVENT_BYTES = 32 * 1024 * 1024
_NOT_SENT = -32950  # our own code, of a request that did not reach the server, or was turned away at the door
_TURNED_AWAY = frozenset({401, 403, 404, 405, 406, 413, 415, 421, 429, 503})
_CLIENT_ERRORS = 400
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class NotRun(Exception):  # noqa: N818  # what it says of the call is what matters
    """The server could not be reached, and the call was certainly not run; the message says what to do."""


class Lost(Exception):  # noqa: N818
    """The call did not end, and may have taken effect; it may be made again if the tool is repeatable."""


class Servers:
    """Sessions with MCP servers.

    Args:
        environment: gives those of the named environment variables that are set.
        folder: where commands are run.
        launcher: put before a command, so that it does not outlive this process.
    """

    def __init__(
        self,
        environment: Callable[[Iterable[str]], Mapping[str, str]],
        *,
        folder: Path | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        self._environment = environment
        self._folder = folder
        self._launcher = launcher
        self._sessions: dict[str, _Session] = {}
        logging.getLogger("mcp.client.stdio").setLevel(logging.CRITICAL)  # a traceback a line; `_Session` says it once

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        sessions, self._sessions = self._sessions, {}
        await asyncio.gather(*(session.close() for session in sessions.values()))

    async def list_tools(self, name: str, server: McpServer) -> tuple[list[ListedTool], list[str]]:
        """The server's tools, and what is wrong with those that can't be used.

        Raises:
            NotRun: it can't be reached, does not answer, or answers with something that is no list of tools.
        """
        try:
            async with asyncio.timeout(_CONNECT_SECONDS + _LIST_SECONDS):
                return await self._using(name, server, _listed)
        except TimeoutError:
            raise NotRun(f"MCP server {name} does not list its tools: it has not answered in time") from None
        except (MCPError, ValidationError) as error:
            raise NotRun(f"MCP server {name} does not list its tools: {_line(error)}") from error

    async def call(
        self, name: str, server: McpServer, tool: str, arguments: dict[str, Any], key: str
    ) -> tuple[str, ToolOutcome]:
        """Call a tool; what the model is to be shown.

        Raises:
            NotRun: the server could not be reached.
            Lost: the call's outcome is not known.
        """
        meta: Any = {names.IDEMPOTENCY_META: key}
        try:
            result = await self._using(
                name, server, lambda client: client.call_tool(tool, arguments, meta=meta), may_hang=True
            )
        except MCPError as error:
            if remedy_for_jsonrpc(error.code) is Remedy.FINAL:
                return f"MCP server {name} refused the call: {error.message}", ToolOutcome.ERROR
            broke = "it ended during the call" if error.code == CONNECTION_CLOSED else error.message
            raise Lost(f"MCP server {name}: {broke}") from error
        except (RuntimeError, ValidationError) as error:  # it has run, and what it returned is not what it may be
            wrong = f"{tool} has run, but MCP server {name} returned something else than it says it does"
            return f"{wrong}: {_line(error)}", ToolOutcome.ERROR
        return _as_text(result), ToolOutcome.ERROR if result.is_error else ToolOutcome.OK

    async def _using(
        self, name: str, server: McpServer, ask: Callable[[Client], Awaitable[T]], *, may_hang: bool = False
    ) -> T:
        """Ask the server something, in a new session if there is none or the old one did not carry the request."""
        session = self._session(name, server)
        try:
            return await session.use(ask, may_hang=may_hang)
        except MCPError as error:
            if error.code != _NOT_SENT:
                raise
        await session.close()
        try:
            return await self._session(name, server).use(ask, may_hang=may_hang)
        except MCPError as error:
            if error.code != _NOT_SENT:
                raise
            raise NotRun(f"MCP server {name} at {server.url} can't be reached: {error.message}") from error

    def _session(self, name: str, server: McpServer) -> _Session:
        """The session with a server; a new one if there is none that lives."""
        key = server.model_dump_json()
        session = self._sessions.get(key)
        if session is None or session.ended:
            session = self._sessions[key] = _Session(name, lambda: self._transport(name, server))
        return session

    @asynccontextmanager
    async def _transport(self, name: str, server: McpServer) -> AsyncIterator[Any]:
        """The way to a server, as the MCP client wants it.

        Raises:
            NotRun: a variable or the command is missing.
        """
        if server.url:
            headers = {header: self._filled(name, text) for header, text in server.headers.items()}
            timeout = httpx2.Timeout(30, read=None)  # how long a call may take, its tool's own timeout says
            async with (
                _Http(headers=headers, timeout=timeout) as http,
                streamable_http_client(server.url, http_client=http, max_sse_event_size=_EVENT_BYTES) as streams,
            ):
                yield streams
        else:
            async with stdio_client(self._program(name, server), errlog=sys.__stderr__ or sys.stderr) as streams:
                yield streams

    def _program(self, name: str, server: McpServer) -> StdioServerParameters:
        found = get_default_environment()
        path = f"{Path(sys.executable).parent}:{found.get('PATH', '')}"
        program, *arguments = server.command
        at = shutil.which(str(self._folder / program) if self._folder and "/" in program else program, path=path)
        if at is None:
            raise NotRun(f"MCP server {name}: there is no program {program}. Install it where the agent workers run.")
        values = {variable: self._variable(name, variable) for variable in server.env}
        command, *before = [*self._launcher, at]
        return StdioServerParameters(
            command=command,
            args=[*before, *arguments],
            env={"PATH": path, **values},
            cwd=self._folder,
            encoding_error_handler="replace",
        )

    def _filled(self, name: str, template: str) -> str:
        return _VARIABLE.sub(lambda found: self._variable(name, found[1]), template)

    def _variable(self, name: str, variable: str) -> str:
        value = self._environment([variable]).get(variable)
        if value is None:
            raise NotRun(f"MCP server {name} needs the environment variable {variable}. Set it for the agent workers.")
        return value


class _Session:
    """A session with one server. It lives in a task of its own, and is over when that is."""

    def __init__(self, name: str, transport: Callable[[], Any]) -> None:
        self._name = name
        self._over = asyncio.Event()
        self._calls = 0
        self._garbage = 0
        self._probes: set[asyncio.Task[None]] = set()
        self._client: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._client.add_done_callback(lambda client: client.cancelled() or client.exception())  # nobody may wait
        self._life = asyncio.create_task(self._live(transport))

    @property
    def ended(self) -> bool:
        """Whether it can't be used any more."""
        return self._over.is_set()

    async def use(self, ask: Callable[[Client], Awaitable[T]], *, may_hang: bool) -> T:
        """Ask something of the server.

        Raises:
            NotRun: there is no session to be had.
            MCPError: the server said so, or the session has ended meanwhile.
        """
        client = await asyncio.shield(self._client)
        if self.ended:
            raise MCPError(_NOT_SENT, "the session has ended")
        self._calls += 1
        try:
            return await ask(client)
        except asyncio.CancelledError:
            if may_hang and self._calls == 1 and not self.ended:
                probe = asyncio.create_task(self._probe(client))
                self._probes.add(probe)
                probe.add_done_callback(self._probes.discard)
            raise
        finally:
            self._calls -= 1

    async def close(self) -> None:
        """End it, and the server's process with it."""
        for probe in self._probes:
            probe.cancel()
        self._end("this worker is stopping")
        await asyncio.wait([self._life])

    def _end(self, why: str) -> None:
        self._over.set()
        if not self._client.done():
            self._client.set_exception(NotRun(f"MCP server {self._name}: {why}"))
            self._life.cancel()

    async def _live(self, transport: Callable[[], Any]) -> None:
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    client = await stack.enter_async_context(
                        Client(
                            _watched(transport, self._over),
                            client_info=Implementation(name="perennial", version=version("perennial")),
                            message_handler=self._hear,
                            cache=None,
                        )
                    )
                if not self._client.done():
                    self._client.set_result(client)
                await self._over.wait()
        except Exception as error:  # noqa: BLE001  # whatever it is, the session is over
            cause = _cause(error)
            if self._client.done():
                log.warning("the session with MCP server %s has ended: %s", self._name, _line(cause))
            else:
                self._client.set_exception(self._away(cause))
        finally:
            self._end("this worker is stopping")

    def _away(self, cause: BaseException) -> Exception:
        if isinstance(cause, NotRun) or (isinstance(cause, MCPError) and cause.code == _NOT_SENT):
            return cause
        if isinstance(cause, TimeoutError):
            return NotRun(f"MCP server {self._name} did not answer within {_CONNECT_SECONDS} s")
        ended = isinstance(cause, MCPError) and cause.code == CONNECTION_CLOSED
        why = "its program ended at once; what it said is in this worker's log" if ended else _line(cause)
        return NotRun(f"MCP server {self._name} could not be started: {why}")

    async def _hear(self, message: object) -> None:
        """Notice what the server says that is no MCP."""
        if not isinstance(message, Exception):
            return
        self._garbage += 1
        if self._garbage == 1:
            log.warning("MCP server %s writes what is not JSON-RPC; log lines belong on standard error", self._name)
        elif self._garbage == _GARBAGE_LINES:
            log.warning("MCP server %s has written %d such lines and is ended", self._name, _GARBAGE_LINES)
            self._end("it writes what is not JSON-RPC")

    async def _probe(self, client: Client) -> None:
        """After a call was given up: end a server that answers nothing else either."""
        with suppress(MCPError, ValidationError):
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    await client.list_tools()
            except TimeoutError:
                log.warning("MCP server %s hangs, and is ended", self._name)
                self._end("it hangs")


class _Watched:
    """A stream from a server, that says when it has ended."""

    def __init__(self, stream: Any, over: asyncio.Event) -> None:
        self._stream = stream
        self._over = over

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except StopAsyncIteration:
            self._over.set()
            raise

    async def __aenter__(self) -> Self:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> Any:
        return await self._stream.__aexit__(*details)


@asynccontextmanager
async def _watched(transport: Callable[[], Any], over: asyncio.Event) -> AsyncIterator[Any]:
    async with transport() as (read, write):
        yield _Watched(read, over), write


class _Http(httpx2.AsyncClient):
    """HTTP, with what goes wrong told as the answer to the request it befell; the session and other calls go on."""

    @override
    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            response = await super().send(request, **options)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            return _failed(request, _NOT_SENT, _line(error))
        except httpx2.TransportError as error:
            return _failed(request, CONNECTION_CLOSED, _line(error))
        status = response.status_code
        said = response.headers.get("content-type", "").startswith("application/json")
        forgotten = status == httpx2.codes.NOT_FOUND and "mcp-session-id" in request.headers
        if request.method != "POST" or status < _CLIENT_ERRORS or (said and not forgotten):
            return response
        await response.aclose()
        code = _NOT_SENT if status in _TURNED_AWAY else CONNECTION_CLOSED
        return _failed(request, code, f"HTTP status {status} {response.reason_phrase}".strip())


def _failed(request: httpx2.Request, code: int, message: str) -> httpx2.Response:
    error = {"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": message}}
    return httpx2.Response(httpx2.codes.BAD_GATEWAY, json=error, request=request)


async def _listed(client: Client) -> tuple[list[ListedTool], list[str]]:
    tools: list[Tool] = []
    cursor: str | None = None
    for _ in range(_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None or len(tools) >= _TOOLS:
            break
    usable: list[ListedTool] = []
    faults: list[str] = []
    for tool in tools[:_TOOLS]:
        fault = _fault(tool.input_schema)
        if fault:
            faults.append(f"tool {tool.name} is left out: the schema of its arguments is none: {fault}")
            continue
        hints = tool.annotations
        usable.append(
            ListedTool(
                name=tool.name,
                description=tool.description or tool.title or "",
                parameters=tool.input_schema,
                repeatable=bool(hints and (hints.read_only_hint or hints.idempotent_hint)),
            )
        )
    return usable, faults


def _fault(schema: dict[str, Any]) -> str:
    """What is wrong with the schema of a tool's arguments; empty: nothing."""
    if schema.get("type") != "object":
        return "its type is not object"
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return str(error.message)
    return ""


def _as_text(result: CallToolResult) -> str:
    """What a tool returned, as text for the model."""
    if not result.content and result.structured_content is not None:
        return to_json(result.structured_content).decode()
    return "\n".join(map(_shown, result.content))


def _shown(block: ContentBlock) -> str:
    match block:
        case TextContent():
            return block.text
        case ResourceLink():
            return f"[{block.name}: {block.uri}]"
        case EmbeddedResource(resource=TextResourceContents() as text):
            return text.text
        case EmbeddedResource():
            return f"[{block.resource.uri}: {block.resource.mime_type or 'bytes'}, not shown]"
        case _:
            return f"[{block.mime_type}, not shown]"


def _cause(error: BaseException) -> BaseException:
    """What went wrong, taken out of the groups that task groups put around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _line(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())[:500]
    return " ".join(str(error).split())[:500] or type(error).__name__
