"""Tools: what an agent may call, named in its spec and run as activities: Python functions and tools of MCP servers.

A Python tool is an ordinary function, sync or async. Its signature and docstring tell the model how to call it; what it
returns is shown to the model. It says that it was asked for the wrong thing by raising ValueError itself (no subclass:
those are raised by parsers and libraries), which the model is shown too; any other exception means that it broke, and
it is tried again if the spec says it is repeatable. A sync one has a thread of its own (activities/threads.py).

    def look_up_order(order_id: str) -> dict[str, str]:
        \"\"\"Look up an order by its number, such as order-1042.\"\"\"

A tool with a side effect takes the key under which a repetition is recognised from `current_call().idempotency_key`.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pydantic_core
from pydantic import ValidationError
from pydantic_ai.tools import RunContext, Tool
from temporalio import activity
from temporalio.exceptions import ApplicationError
from typing_extensions import override

from activities import metrics
from activities.conversation import storable
from activities.heartbeat import beating
from activities.ledger import Ledger
from activities.mcp_servers import Lost, NotRun, Servers
from activities.memory import Memory
from activities.results import Results
from activities.threads import HungError, Threads
from workflows import names
from workflows.errors import NOT_RUN, Remedy, activity_error
from workflows.interface import ToolActivities
from workflows.messages import ResultToKeep, ToolOutcome, ToolRequest, ToolResult
from workflows.spec import McpServer, McpTool, ToolDefinition, ToolSpec

_NO_RUN_CONTEXT = cast("RunContext[None]", None)  # our tools take none: `takes_ctx=False`
_Shown = tuple[str, ToolOutcome]


@dataclass(frozen=True)
class ToolCallContext:
    """What a tool may know of the call it serves."""

    idempotency_key: str
    """The same on every try of one call, and different for every other call."""
    workspace: Path
    """A folder where this deployment's tools may keep files."""
    workflow_id: str
    turn: int
    memory: Memory | None = None
    """The facts agents have kept (activities/memory_tools.py); none in a test of a tool that needs none."""


_context: contextvars.ContextVar[ToolCallContext] = contextvars.ContextVar("perennial_tool_call")


def current_call() -> ToolCallContext:
    """The call that the running tool serves.

    Raises:
        LookupError: not called from within a tool.
    """
    return _context.get()


@contextmanager
def call_context(context: ToolCallContext) -> Iterator[None]:
    """Make `current_call()` answer this, as it does within a tool; for tests of tools."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


class ToolError(ValueError):
    """A tool named in a spec cannot be used; the message says which and why."""


def load_tool(path: str, beside: Path | None = None) -> Tool[None]:
    """The tool at `module:function`; the module may be a file in the folder `beside`.

    Raises:
        ToolError: there is no such module or function, or its signature can't be described to a model.
    """
    module_name, _, function_name = path.partition(":")
    if beside is not None and str(beside) not in sys.path:
        sys.path.append(str(beside))
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # a module of somebody's own may raise anything
        where = f" (also looked in {beside})" if beside else ""
        raise ToolError(f"tool {path}: cannot import {module_name}: {_kind(error)}{error}{where}") from error
    if not inspect.isfunction(function):
        raise ToolError(f"tool {path}: {module_name} has no function {function_name}")
    try:
        return Tool(function, takes_ctx=False)
    except Exception as error:  # the library raises many kinds for a signature it can't describe
        raise ToolError(f"tool {path}: its arguments can't be described to a model: {error}") from error


def _kind(error: Exception) -> str:
    return "" if isinstance(error, ImportError) else f"{type(error).__name__}: "


def define(spec: ToolSpec, tool: Tool[None]) -> ToolDefinition:
    """The tool as the model is told of it.

    Raises:
        ToolError: its approval policy is about an argument that it does not have.
    """
    definition = tool.tool_def
    known = definition.parameters_json_schema.get("properties", {})
    for path in spec.approval.paths if spec.approval else ():
        if path.partition(".")[0] not in known:
            raise ToolError(
                f"tool {spec.python}: its approval has a rule about {path}, and it has no such argument; "
                f"it has: {', '.join(known) or 'none'}"
            )
    return ToolDefinition(
        name=definition.name,
        description=definition.description or "",
        parameters=definition.parameters_json_schema,
        python=spec.python,
        timeout=timedelta(seconds=spec.timeout_seconds),
        repeatable=spec.repeatable,
        attempts=spec.attempts,
        polls=spec.polls,
        approval=spec.approval.policy if spec.approval else None,
        answer_within=timedelta(seconds=spec.answer_within_seconds) if spec.answers == "later" else None,
    )


class Tools(ToolActivities):
    """Runs tools.

    Args:
        find: gives the Python tool of that name of the agent with that workflow id, if the specs have one.
        workspace: a folder where tools may keep files.
        ledger: has the recorded definitions of MCP servers' tools, and keeps what is too long to be shown.
        servers: the MCP servers.
        memory: what agents remember; None: they have none.
    """

    def __init__(
        self,
        find: Callable[[str, str], Tool[None] | None],
        workspace: Path,
        ledger: Ledger,
        servers: Servers,
        memory: Memory | None = None,
    ) -> None:
        self._find = find
        self._workspace = workspace
        self._ledger = ledger
        self._servers = servers
        self._memory = memory
        self._results = Results(ledger)
        self._threads = Threads()
        self._remote: dict[str, dict[str, tuple[McpTool, McpServer]]] = {}
        """The tools of MCP servers of each spec by its digest: what the ledger has under it never changes."""

    @override
    @activity.defn(name="run_tool")
    async def run_tool(self, request: ToolRequest) -> ToolResult:
        started = time.monotonic()
        outcome: ToolOutcome | None = None
        try:
            async with beating():
                content, outcome = await self._run(request)
        finally:
            metrics.tool_call(request.call.name, outcome.value if outcome else "broke", time.monotonic() - started)
        return ToolResult(call_id=request.call.id, name=request.call.name, content=content, outcome=outcome)

    @override
    @activity.defn(name="keep_result")
    async def keep_result(self, result: ResultToKeep) -> str:
        return await self._results.fit(result.workflow_id, storable(result.content), result.result_bytes)

    async def _run(self, request: ToolRequest) -> _Shown:
        name = request.call.name
        if name == names.READ_RESULT:
            return await self._read_on(request)
        tool = self._find(request.workflow_id, name)
        if tool is not None:
            text, outcome = await self._call(tool, request)
        elif remote := await self._remote_tool(request):
            text, outcome = await self._ask(*remote, request)
        else:
            raise _not_run(
                f"{name} was not run: this worker does not know it, its specs are older than the agent's. "
                "Deploy the new specs to every agent worker."
            )
        return await self._results.fit(request.workflow_id, storable(text), request.result_bytes), outcome

    async def _read_on(self, request: ToolRequest) -> _Shown:
        try:
            part = await self._results.read(request.workflow_id, request.call.arguments, request.result_bytes)
        except ValueError as error:
            return str(error), ToolOutcome.ERROR
        return part, ToolOutcome.OK

    async def _remote_tool(self, request: ToolRequest) -> tuple[McpTool, McpServer] | None:
        """The tool of an MCP server that the call is for, as the agent's spec has recorded it."""
        digest = request.spec_digest
        if digest not in self._remote:
            try:
                spec = await self._ledger.get_spec(digest)
            except ApplicationError as error:
                raise _not_run(f"{request.call.name} was not run: {error.message}") from error
            self._remote[digest] = {tool.name: (at, spec.servers[at.server]) for tool in spec.tools if (at := tool.mcp)}
        return self._remote[digest].get(request.call.name)

    async def _ask(self, tool: McpTool, server: McpServer, request: ToolRequest) -> _Shown:
        """Call a tool of an MCP server."""
        try:
            arguments = json.loads(request.call.arguments or "{}")
            json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # or it could not be sent
        except (ValueError, RecursionError) as error:
            return f"Wrong arguments: {error}", ToolOutcome.ERROR
        if not isinstance(arguments, dict):
            return "Wrong arguments: they are no JSON object", ToolOutcome.ERROR
        try:
            return await self._servers.call(tool.server, server, tool.tool, arguments, request.idempotency_key)
        except NotRun as error:
            raise _not_run(f"{request.call.name} was not run: {error}") from error
        except Lost as error:
            raise activity_error(Remedy.RETRY_LATER, str(error)) from error

    async def _call(self, tool: Tool[None], request: ToolRequest) -> _Shown:
        """Call a Python tool."""
        schema = tool.function_schema
        try:
            arguments = schema.validator.validate_json(request.call.arguments or "{}")
        except ValidationError as error:
            return f"Wrong arguments: {_explain(error)}", ToolOutcome.ERROR
        context = ToolCallContext(
            request.idempotency_key, self._workspace, request.workflow_id, request.turn, self._memory
        )
        try:
            with call_context(context), self._threads.calling(tool.name):
                value = await schema.call(arguments, _NO_RUN_CONTEXT)
        except HungError as error:
            raise _not_run(f"{tool.name} was not run: {error}") from error
        except ValueError as error:
            if type(error) is not ValueError:
                raise  # a parser's or a library's, not the tool's own words: it broke, perhaps after its effect
            return str(error) or repr(error), ToolOutcome.ERROR
        except Exception:
            raise
        except BaseException as error:  # such as sys.exit(), which must not end the worker
            if _is_cancelled():
                raise
            raise RuntimeError(f"it raised {type(error).__name__}") from error
        return _as_text(value), ToolOutcome.OK


def _is_cancelled() -> bool:
    """Whether this call was cancelled, and not only something in it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _not_run(message: str) -> ApplicationError:
    return ApplicationError(message, type=NOT_RUN)


def _explain(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}" for fault in error.errors())


def _as_text(value: Any) -> str:
    """What a tool returned, as text: strings as they are, else as JSON, else as Python writes it.

    It never raises: the tool has run, and its effect must not be put down to a failure, or be repeated.
    """
    if isinstance(value, str):
        return value
    with suppress(Exception):
        return json.dumps(pydantic_core.to_jsonable_python(value, fallback=repr), ensure_ascii=False)
    with suppress(Exception):
        return repr(value)
    return f"(what {type(value).__name__} holds can't be shown)"
