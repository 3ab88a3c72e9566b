"""Tools: Python functions an agent may call, named in its spec and run as activities.

A tool is an ordinary function, sync or async. Its signature and docstring tell the model how to call it; what it
returns is shown to the model. It says that it was asked for the wrong thing by raising ValueError itself (no subclass:
those are raised by parsers and libraries), which the model is shown too; any other exception means that it broke, and
it is tried again if the spec says it is repeatable.

    def look_up_order(order_id: str) -> dict[str, str]:
        \"\"\"Look up an order by its number, such as order-1042.\"\"\"

A tool with a side effect takes the key under which a repetition is recognised from `current_call().idempotency_key`.
"""

from __future__ import annotations

import contextvars
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from activities.heartbeat import beating
from workflows.errors import NOT_RUN
from workflows.interface import ToolActivities
from workflows.messages import ToolCall, ToolOutcome, ToolRequest, ToolResult
from workflows.spec import ToolDefinition, ToolSpec

_NO_RUN_CONTEXT = cast("RunContext[None]", None)  # our tools take none: `takes_ctx=False`
_MAX_RESULT_CHARACTERS = 50_000  # about 12,000 tokens; a longer result would crowd out the conversation


@dataclass(frozen=True)
class ToolCallContext:
    """What a tool may know of the call it serves."""

    idempotency_key: str
    """The same on every try of one call, and different for every other call."""
    workspace: Path
    """A folder where this deployment's tools may keep files."""
    workflow_id: str
    turn: int


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
    """The tool as the model is told of it."""
    definition = tool.tool_def
    return ToolDefinition(
        name=definition.name,
        description=definition.description or "",
        parameters=definition.parameters_json_schema,
        python=spec.python,
        timeout=timedelta(seconds=spec.timeout_seconds),
        repeatable=spec.repeatable,
        attempts=spec.attempts,
    )


class Tools(ToolActivities):
    """Runs tools. `find` gives the tool of that name of the agent with that workflow id, if the specs have one."""

    def __init__(self, find: Callable[[str, str], Tool[None] | None], workspace: Path) -> None:
        self._find = find
        self._workspace = workspace

    @override
    @activity.defn(name="run_tool")
    async def run_tool(self, request: ToolRequest) -> ToolResult:
        tool = self._find(request.workflow_id, request.call.name)
        if tool is None:
            raise ApplicationError(
                f"{request.call.name} was not run: this worker does not know it, its specs are older than the agent's. "
                "Deploy the new specs to every agent worker.",
                type=NOT_RUN,
            )
        started = time.monotonic()
        result: ToolResult | None = None
        try:
            async with beating():
                result = await self._run(tool, request)
        finally:
            outcome = result.outcome.value if result is not None else "broke"
            metrics.tool_call(request.call.name, outcome, time.monotonic() - started)
        return result

    async def _run(self, tool: Tool[None], request: ToolRequest) -> ToolResult:
        schema = tool.function_schema
        try:
            arguments = schema.validator.validate_json(request.call.arguments or "{}")
        except ValidationError as error:
            return _result(request.call, f"Wrong arguments: {_explain(error)}", ToolOutcome.ERROR)
        context = ToolCallContext(request.idempotency_key, self._workspace, request.workflow_id, request.turn)
        with call_context(context):
            try:
                value = await schema.call(arguments, _NO_RUN_CONTEXT)
            except ValueError as error:
                if type(error) is not ValueError:
                    raise  # a parser's or a library's, not the tool's own words: it broke, perhaps after its effect
                return _result(request.call, str(error) or repr(error), ToolOutcome.ERROR)
        return _result(request.call, _as_text(value), ToolOutcome.OK)


def _result(call: ToolCall, content: str, outcome: ToolOutcome) -> ToolResult:
    if len(content) > _MAX_RESULT_CHARACTERS:
        left_out = len(content) - _MAX_RESULT_CHARACTERS
        content = f"{content[:_MAX_RESULT_CHARACTERS]}\n[shortened: {left_out} more characters]"
    return ToolResult(call_id=call.id, name=call.name, content=content, outcome=outcome)


def _explain(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}" for fault in error.errors())


def _as_text(value: Any) -> str:
    """What a tool returned, as text: strings as they are, everything else as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(pydantic_core.to_jsonable_python(value, fallback=repr), ensure_ascii=False)
