"""Tools: ordinary functions, run as activities; what they refuse is shown to the model, what breaks is raised."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai.tools import Tool
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.tools import ToolCallContext, ToolError, Tools, call_context, current_call, define, load_tool
from workflows.errors import NOT_RUN
from workflows.messages import ToolCall, ToolOutcome, ToolRequest, ToolResult
from workflows.spec import ToolSpec

AGENT = "agent/store/desk/order-42"
KEY = f"{AGENT}/3/1/0"


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


class Parcel(BaseModel):
    """Something to send."""

    size: Size
    grams: int


def add(first: int, second: int = 1) -> int:
    """Add two numbers."""
    return first + second


async def add_slowly(first: int) -> int:
    """Add one, in its own time."""
    await asyncio.sleep(0)
    return first + 1


def send(parcel: Parcel, labels: list[str]) -> dict[str, Any]:
    """Send a parcel."""
    return {"parcel": parcel, "labels": labels}


def say_key() -> str:
    """Say under which key this call is made."""
    call = current_call()
    return f"{call.idempotency_key} {call.turn} {call.workflow_id} {call.workspace.name}"


async def say_key_slowly() -> str:
    """As `say_key`, in an async function."""
    await asyncio.sleep(0)
    return say_key()


def refuse(reason: str) -> str:
    """Refuse."""
    raise ValueError(reason)


def break_down() -> str:
    """Break."""
    raise ConnectionError("the warehouse does not answer")


def talk(characters: int) -> str:
    """Talk for so long."""
    return "x" * characters


def nothing() -> None:
    """Do nothing."""


async def call(function: Callable[..., Any], arguments: str | dict[str, Any] = "{}", name: str = "") -> ToolResult:
    """Run a tool as Temporal does, with arguments as the model wrote them."""
    tool = Tool(function, takes_ctx=False)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    tools = Tools(
        lambda agent, wanted: tool if (agent, wanted) == (AGENT, tool.name) else None, Path("/some/workspace")
    )
    request = ToolRequest(
        workflow_id=AGENT,
        turn=3,
        call=ToolCall(id="call-1", name=name or tool.name, arguments=text),
        spec_digest="s",
        idempotency_key=KEY,
    )
    return await ActivityEnvironment().run(tools.run_tool, request)


# Calls ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments", "shown"),
    [
        (add, {"first": 2, "second": 3}, "5"),
        (add, {"first": 2}, "3"),
        (add_slowly, {"first": 2}, "3"),
        (
            send,
            {"parcel": {"size": "small", "grams": 5}, "labels": ["à"]},
            '{"parcel": {"size": "small", "grams": 5}, "labels": ["à"]}',
        ),
        (talk, {"characters": 3}, "xxx"),
        (nothing, "", "null"),
    ],
)
async def test_what_a_tool_returns_is_shown_as_text(
    function: Callable[..., Any], arguments: str | dict[str, Any], shown: str
) -> None:
    """Sync or async; text as it is, anything else as JSON; arguments arrive as the types of the signature."""
    result = await call(function, arguments)
    assert result == ToolResult(call_id="call-1", name=function.__name__, content=shown, outcome=ToolOutcome.OK)


@pytest.mark.parametrize(
    ("function", "arguments", "complaint"),
    [
        (add, "{}", "first: "),
        (add, {"first": "two"}, "first: Input should be a valid integer"),
        (add, {"first": 1, "third": 3}, "third: "),
        (add, {"first": "x", "second": "y"}, "; second: "),
        (add, "first=1", "arguments: Invalid JSON"),
        (add, "[1]", "arguments: "),
        (
            send,
            {"parcel": {"size": "huge", "grams": 5}, "labels": []},
            "parcel.size: Input should be 'small' or 'large'",
        ),
    ],
)
async def test_wrong_arguments_are_shown_to_the_model(
    function: Callable[..., Any], arguments: str | dict[str, Any], complaint: str
) -> None:
    """P14: as a result that names each argument and what was expected, so that the model can do better."""
    result = await call(function, arguments)
    assert result.outcome is ToolOutcome.ERROR
    assert result.content.startswith("Wrong arguments: ")
    assert complaint in result.content


@pytest.mark.parametrize(
    ("reason", "shown"), [("order-7 is not known", "order-7 is not known"), ("", "ValueError('')")]
)
async def test_what_a_tool_refuses_is_shown_to_the_model(reason: str, shown: str) -> None:
    """A ValueError is an answer, and no attempt is wasted on it; it never comes without a word."""
    result = await call(refuse, {"reason": reason})
    assert (result.outcome, result.content) == (ToolOutcome.ERROR, shown)


async def test_a_tool_that_breaks_raises() -> None:
    """Then Temporal tries it again, if the spec says that it may."""
    with pytest.raises(ConnectionError, match="the warehouse does not answer"):
        await call(break_down)


@pytest.mark.parametrize("function", [say_key, say_key_slowly])
async def test_a_tool_knows_its_idempotency_key(function: Callable[..., Any]) -> None:
    """P9: the key of the request, on whatever thread the tool runs; outside of a call there is none."""
    result = await call(function)
    assert result.content == f"{KEY} 3 {AGENT} workspace"
    with pytest.raises(LookupError):
        current_call()


async def test_calls_side_by_side_have_their_own_keys() -> None:
    """A step's calls run at the same time and do not see each other's."""
    tool = Tool(say_key_slowly, takes_ctx=False)
    tools = Tools(lambda _agent, _name: tool, Path("/some/workspace"))
    requests = [
        ToolRequest(
            workflow_id=AGENT,
            turn=1,
            call=ToolCall(id=f"{n}", name=tool.name),
            spec_digest="s",
            idempotency_key=f"key-{n}",
        )
        for n in range(20)
    ]
    results = await asyncio.gather(*(ActivityEnvironment().run(tools.run_tool, request) for request in requests))
    assert [result.content.split()[0] for result in results] == [f"key-{n}" for n in range(20)]


def test_a_tool_can_be_tested_without_temporal(tmp_path: Path) -> None:
    """`call_context` stands in for the activity, and ends with its block."""
    with call_context(ToolCallContext("a key", tmp_path, AGENT, 1)):
        assert say_key().startswith("a key 1 ")
    with pytest.raises(LookupError):
        current_call()


async def test_a_long_result_is_shortened_and_says_so() -> None:
    """One tool can't crowd out the conversation; what fits comes whole."""
    assert len((await call(talk, {"characters": 50_000})).content) == 50_000
    result = await call(talk, {"characters": 50_123})
    assert result.outcome is ToolOutcome.OK
    assert result.content.endswith("x\n[shortened: 123 more characters]")
    assert len(result.content) < 50_100


async def test_a_tool_this_worker_does_not_know_is_an_error_for_the_operator() -> None:
    """Its specs are older than the agent's: tried again, by another worker perhaps; it certainly had no effect."""
    with pytest.raises(ApplicationError, match=r"look was not run.*Deploy the new specs") as failed:
        await call(add, name="look")
    assert (failed.value.type, failed.value.non_retryable) == (NOT_RUN, False)


async def test_a_parsers_complaint_is_not_the_tools_own_word() -> None:
    """P9: what a library raises may come after the effect: it broke, and is not taken for a refusal."""

    def pay() -> str:
        return str(json.loads("<html>"))  # the gateway's answer, once it has paid

    with pytest.raises(json.JSONDecodeError):
        await call(pay)


# Loading -------------------------------------------------------------------------------------------------------------


def test_a_tool_is_described_by_its_signature_and_docstring(tmp_path: Path) -> None:
    """The model is told name, description and JSON Schema; the workflow how to run it."""
    (tmp_path / "described_tool.py").write_text(
        'def weigh(parcel: str, exactly: bool = False) -> int:\n    """Weigh a parcel.\n\n'
        '    Args:\n        parcel: its number.\n        exactly: to the gram.\n    """\n    return 1\n'
    )
    spec = ToolSpec(python="described_tool:weigh", timeout_seconds=3, repeatable=False, attempts=2)
    definition = define(spec, load_tool(spec.python, beside=tmp_path))
    assert (definition.name, definition.description) == ("weigh", "Weigh a parcel.")
    assert (definition.python, definition.timeout) == ("described_tool:weigh", timedelta(seconds=3))
    assert (definition.repeatable, definition.attempts) == (False, 2)
    assert definition.parameters["required"] == ["parcel"]
    properties = definition.parameters["properties"]
    assert isinstance(properties, dict)
    assert properties["parcel"] == {"type": "string", "description": "its number."}


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("no_such_module:f", "cannot import no_such_module: No module named 'no_such_module'"),
        ("json:no_such_function", "json has no function no_such_function"),
        ("json:JSONDecoder", "json has no function JSONDecoder"),
        ("needy_tool:f", "cannot import needy_tool: No module named 'a_library_that_is_not_there'"),
        ("vague_tool:f", "its arguments can't be described to a model"),
    ],
)
def test_a_tool_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, path: str, complaint: str) -> None:
    """P14: no module, no function, or a signature nobody can describe."""
    (tmp_path / "needy_tool.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "vague_tool.py").write_text("class Odd: ...\ndef f(odd: Odd) -> None: ...\n")
    with pytest.raises(ToolError) as refused:
        load_tool(path, beside=tmp_path)
    assert str(refused.value).startswith(f"tool {path}: ")
    assert complaint in str(refused.value)


@pytest.mark.parametrize(
    ("name", "source"), [("misspelt_tool", "def f(:\n"), ("failing_tool", "raise RuntimeError('no database here')\n")]
)
def test_a_tool_module_with_a_mistake_is_named_with_the_reason(tmp_path: Path, name: str, source: str) -> None:
    """P14: one's own first tool has a syntax error sooner or later."""
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(ToolError, match=f"tool {name}:f: cannot import {name}"):
        load_tool(f"{name}:f", beside=tmp_path)
