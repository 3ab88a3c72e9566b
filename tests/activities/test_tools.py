"""Tools: ordinary functions, run as activities; what they refuse is shown to the model, what breaks is raised."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai.tools import Tool
from servers import eventually
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.ledger import Ledger
from activities.mcp_servers import Servers
from activities.tools import ToolCallContext, ToolError, Tools, call_context, current_call, define, load_tool
from workflows.errors import NOT_RUN
from workflows.messages import ToolCall, ToolOutcome, ToolRequest, ToolResult
from workflows.spec import ResolvedSpec, ToolSpec
from workflows.state import result_bytes

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


def unused() -> Ledger:
    """A ledger that is connected to when something is kept, and here nothing is."""
    return Ledger("sqlite:////dev/null/ledger.db")


async def call(
    function: Callable[..., Any],
    arguments: str | dict[str, Any] = "{}",
    name: str = "",
    ledger: Ledger | None = None,
    agent: str = AGENT,
    room: int = 32_768,
    spec: str = "s",
) -> ToolResult:
    """Run a tool as Temporal does, with arguments as the model wrote them."""
    tool = Tool(function, takes_ctx=False)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    tools = Tools(
        lambda of, wanted: tool if (of, wanted) == (agent, tool.name) else None,
        Path("/some/workspace"),
        ledger or unused(),
        Servers(lambda _: {}),
    )
    request = ToolRequest(
        workflow_id=agent,
        turn=3,
        call=ToolCall(id="call-1", name=name or tool.name, arguments=text),
        spec_digest=spec,
        idempotency_key=KEY,
        result_bytes=room,
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
        (add, "[" * 100_000, "arguments: Invalid JSON"),
        (add, '{"first": NaN}', "first: "),
        (refuse, '{"reason": "\\ud800"}', "arguments: Invalid JSON"),
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
    tools = Tools(lambda _agent, _name: tool, Path("/some/workspace"), unused(), Servers(lambda _: {}))
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


async def test_a_tool_this_worker_does_not_know_is_an_error_for_the_operator(tmp_path: Path) -> None:
    """Its specs are older than the agent's: tried again, by another worker perhaps; it certainly had no effect."""
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        digest = await ledger.put_spec(ResolvedSpec(name="desk", tenant="store", instructions="Answer."))
        with pytest.raises(ApplicationError, match=r"look was not run.*Deploy the new specs") as failed:
            await call(add, name="look", ledger=ledger, spec=digest)
    assert (failed.value.type, failed.value.non_retryable) == (NOT_RUN, False)


async def test_a_call_that_the_ledger_is_needed_for_was_not_run_without_it() -> None:
    """P9: what the tool is, only the ledger knows; that it had no effect is certain."""
    with pytest.raises(ApplicationError, match=r"look was not run: The ledger .* did not work") as failed:
        await call(add, name="look")
    assert failed.value.type == NOT_RUN


async def test_a_parsers_complaint_is_not_the_tools_own_word() -> None:
    """P9: what a library raises may come after the effect: it broke, and is not taken for a refusal."""

    def pay() -> str:
        return str(json.loads("<html>"))  # the gateway's answer, once it has paid

    with pytest.raises(json.JSONDecodeError):
        await call(pay)


@pytest.mark.parametrize("interrupts", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration()])
@pytest.mark.parametrize("slowly", [False, True])
async def test_a_tool_that_wants_to_end_the_process_only_breaks(interrupts: BaseException, slowly: bool) -> None:
    """`sys.exit()` in a function of somebody's own ends neither the worker nor the wait for the call."""

    def leave() -> str:
        raise interrupts

    async def leave_slowly() -> str:
        await asyncio.sleep(0)
        raise interrupts

    with pytest.raises(RuntimeError, match=type(interrupts).__name__):
        await call(leave_slowly if slowly else leave)


async def test_a_sync_tool_that_hangs_is_given_up() -> None:
    """Its thread is left behind: the call that was cancelled ends at once."""
    begun, release = threading.Event(), threading.Event()

    def hang() -> str:
        begun.set()
        release.wait()
        return ""

    task = asyncio.create_task(call(hang))
    await eventually(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await task
    assert (await call(add, {"first": 1})).content == "2"
    release.set()


# Long results, and what is no result ---------------------------------------------------------------------------------


async def read_on(note: str, ledger: Ledger, agent: str = AGENT, room: int = 32_768) -> ToolResult:
    """Call `read_result` as a note says."""
    found = re.search(r'read_result\(id="(\w+)", offset=(\d+)\)', note)
    assert found, note[-300:]
    arguments = {"id": found[1], "offset": int(found[2])}
    return await call(add, arguments, name="read_result", ledger=ledger, agent=agent, room=room)


@pytest.mark.parametrize("letter", ["x", "é", "🙂"])
async def test_a_long_result_is_kept_whole_and_can_be_read_to_its_end(tmp_path: Path, letter: str) -> None:
    """A megabyte: the model is shown its beginning, and reads on part by part; nothing that travels is large."""
    whole = "".join(f"{number} {letter}\n" for number in range(120_000))
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        result = await call(lambda: whole, ledger=ledger)
        assert result.outcome is ToolOutcome.OK
        parts: list[str] = []
        while True:
            assert len(result.content.encode()) <= 32_768
            part, _, note = result.content.rpartition("\n[")
            assert part
            parts.append(part)
            if "This is the end." in note:
                break
            result = await read_on(note, ledger)
        assert "".join(parts) == whole
        assert len(parts) > len(whole.encode()) // 32_768


async def test_what_fits_comes_whole(tmp_path: Path) -> None:
    """To the byte; nothing is kept of it."""
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        assert len((await call(talk, {"characters": 32_768}, ledger=ledger)).content) == 32_768
        assert ledger._engine is None
        assert len((await call(talk, {"characters": 32_769}, ledger=ledger)).content) < 32_769


async def test_many_calls_share_the_room(tmp_path: Path) -> None:
    """A step with many calls gives each less; what is left out can be read like any other."""
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        room = result_bytes(64)
        result = await call(talk, {"characters": 20_000}, ledger=ledger, room=room)
        assert len(result.content) <= room == 8 * 1024
        assert (await read_on(result.content, ledger, room=room)).content.startswith("xxx")


async def test_nobody_reads_another_tenants_results(tmp_path: Path) -> None:
    """Other agents of the tenant may, as agents that work together do."""
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        note = (await call(talk, {"characters": 40_000}, ledger=ledger)).content
        assert (await read_on(note, ledger, agent="agent/store/guard/7")).outcome is ToolOutcome.OK
        refused = await read_on(note, ledger, agent="agent/bank/desk/order-42")
    assert refused.outcome is ToolOutcome.ERROR
    assert refused.content.startswith("There is no result ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("{}", "Wrong arguments: id: Field required"),
        ("id=1", "Wrong arguments: : Invalid JSON"),
        ({"id": "0123456789abcdef", "offset": -1}, "Wrong arguments: offset: "),
        ({"id": "0123456789abcdef"}, "There is no result '0123456789abcdef'"),
        ({"id": ""}, "There is no result ''"),
        ({"id": "%"}, "There is no result '%'"),
    ],
)
async def test_a_result_that_is_not_there_is_said(
    tmp_path: Path, arguments: str | dict[str, Any], complaint: str
) -> None:
    """P14: models invent ids, too; it is shown to them, and they can do better."""
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        result = await call(add, arguments, name="read_result", ledger=ledger)
    assert result.outcome is ToolOutcome.ERROR
    assert result.content.startswith(complaint)


async def test_a_result_that_cannot_be_kept_is_still_a_result() -> None:
    """P9: the tool has run; that the ledger is away must not make its call be repeated, or unknown."""
    result = await call(talk, {"characters": 40_000})
    assert result.outcome is ToolOutcome.OK
    assert result.content.endswith("The rest could not be kept.]")


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("not even that")


_LOOP: list[Any] = []
_LOOP.append(_LOOP)
_DEEP: list[Any] = []
for _ in range(100_000):
    _DEEP = [_DEEP]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"\xff\xfe", "b'\\xff\\xfe'"),
        (_LOOP, "[[...]]"),
        (_DEEP, "(what list holds can't be shown)"),
        (bytearray(b"\xff"), "bytearray(b'\\xff')"),
        ({"now": lambda: 1}, "function"),
        (object, "<class 'object'>"),
        (float("nan"), "NaN"),
        (
            {
                1: {
                    2,
                }
            },
            '{"1": [2]}',
        ),
        ("a \ud800 surrogate", "a \ufffd surrogate"),
        (Silent(), "(what Silent holds can't be shown)"),
    ],
)
async def test_what_is_no_json_is_shown_all_the_same(value: object, shown: str) -> None:
    """P9: the tool has run: what it returned never makes the call fail, so that it would be made again."""
    result = await call(lambda: value)
    assert result.outcome is ToolOutcome.OK
    assert shown in result.content
    assert result.model_dump_json()


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
