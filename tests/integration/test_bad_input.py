"""What bad input gets, on the whole stack: tools and models that misbehave, each with an outcome agents recover from.

After each of them the same agent answers its next question properly.
"""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from servers import eventually
from stack import ROOT, Finished, Stack, perennial, run
from traffic import fetched, letter, workflow_of

from activities.entries import RepairMessage, ToolMessage
from workers.embedded import AGENT
from workers.supervisor import Died
from workflows import repair, repeats
from workflows.messages import ToolCall, ToolOutcome

_SPEC = """
name: customer-service
tenant: store
instructions: Answer.
tools:
  - {python: "bad_tools:look"}
  - {python: "bad_tools:crash", attempts: 2}
  - {python: "bad_tools:leave", attempts: 1}
  - {python: "bad_tools:jam", timeout_seconds: 1, repeatable: false}
  - {python: "bad_tools:stick", timeout_seconds: 3600, repeatable: false}
  - {python: "bad_tools:shout"}
  - {python: "bad_tools:odd"}
budget: {steps_per_turn: 40}
"""
_TOOLS = '''
import sys
import threading


def look(order_id: str) -> dict[str, str]:
    """Look up an order."""
    return {"order_id": order_id, "status": "shipped"}


def crash() -> str:
    """Break."""
    raise ConnectionError("the warehouse does not answer")


def leave() -> str:
    """Want to end the process."""
    sys.exit(3)


def jam(page: int) -> str:
    """Print, and never come back."""
    threading.Event().wait()
    return ""


def stick() -> str:
    """As jam, and it is waited for."""
    return jam(1)


def shout(characters: int) -> str:
    """Say so much."""
    return "".join(f"{number:09d}\\n" for number in range(characters // 10))


def odd(kind: str) -> object:
    """Return what is no JSON."""
    loop = []
    loop.append(loop)
    return {"bytes": b"\\xff", "set": {1}, "loop": loop, "half": "\\ud800", "nan": float("nan")}[kind]
'''

pytestmark = pytest.mark.slow


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Each test has keys of its own."""
    folder = tmp_path_factory.mktemp("bad")
    specs = folder / "specs"
    specs.mkdir()
    (specs / "agent.yaml").write_text(_SPEC)
    (specs / "bad_tools.py").write_text(_TOOLS)
    async with Stack(folder / "state", specs=specs, variables={"PERENNIAL_DRAIN_SECONDS": "2"}) as running:
        yield running


async def ask(stack: Stack, key: str, text: str) -> Finished:
    return await perennial("ask", f"customer-service/{key}", text, "--json", state=stack.settings.state_dir)


async def results(stack: Stack, key: str) -> list[ToolMessage]:
    """What the agent was shown of its calls in its first turn."""
    async with stack.ledger() as ledger:
        entries = await ledger.of_turn(workflow_of(key), 1)
    return [message for entry in entries for message in entry.messages if isinstance(message, ToolMessage)]


async def goes_on(stack: Stack, key: str) -> None:
    """Hold that the agent answers its next question, with a call of a tool that works."""
    fine = await ask(stack, key, f'[[call look {{"order_id": "{key}"}}]]')
    assert fine.status == 0, fine.err
    assert fine.json["outcome"] == "completed"
    assert f'{{"order_id": "{key}", "status": "shipped"}}' in fine.json["text"]


@pytest.mark.parametrize(
    ("call", "outcome", "shown"),
    [
        ("crash {}", ToolOutcome.ERROR, "It failed 2 times: ConnectionError: the warehouse does not answer"),
        ("leave {}", ToolOutcome.ERROR, "It failed 1 time: RuntimeError: it raised SystemExit"),
        ('jam {"page": 1}', ToolOutcome.UNKNOWN, "It took too long or its worker died. Whether it took effect is not"),
        ('shout {"characters": 1000000}', ToolOutcome.OK, "000000000\n"),
        ('odd {"kind": "bytes"}', ToolOutcome.OK, r"b'\xff'"),
        ('odd {"kind": "set"}', ToolOutcome.OK, "[1]"),
        ('odd {"kind": "loop"}', ToolOutcome.OK, "[[...]]"),
        ('odd {"kind": "half"}', ToolOutcome.OK, "\ufffd"),
        ('odd {"kind": "nan"}', ToolOutcome.OK, "NaN"),
        ('fly {"to": "Mars"}', ToolOutcome.ERROR, "There is no tool 'fly'. Tools you may call: look, crash, "),
        ('look {"order": 7}', ToolOutcome.ERROR, "Wrong arguments: order_id: Field required"),
        ("look {}", ToolOutcome.ERROR, "Wrong arguments: order_id: Field required"),
    ],
)
async def test_what_a_call_comes_to_is_shown_and_the_agent_goes_on(
    stack: Stack, call: str, outcome: ToolOutcome, shown: str
) -> None:
    """A tool that raises, hangs, returns a megabyte or no JSON; a model that invents a tool or its arguments."""
    key = f"call-{''.join(filter(str.isalnum, call))}"
    asked = await ask(stack, key, f"[[call {call}]] [[say I see.]]")
    assert (asked.status, asked.json["text"]) == (0, "I see."), asked.err
    (result,) = await results(stack, key)
    assert result.outcome is outcome
    assert result.content.startswith(shown)
    assert len(result.content) <= 32 * 1024
    await goes_on(stack, key)


async def test_a_model_that_loops_is_told_and_has_to_answer(stack: Stack) -> None:
    """Three calls are made; then it is told, and in the end gets no tools. It stands in `perennial show`."""
    asked = await ask(stack, "loops", '[[call look {"order_id": "order-1"} x30]] [[say I give up.]]')
    assert asked.status == 0, asked.err
    assert (asked.json["text"], asked.json["steps"]) == ("I give up.", 2 * repeats.MOST + 1)
    contents = [result.content for result in await results(stack, "loops")]
    assert contents[repeats.MOST :] == [repeats.refusal(ToolCall(id="", name="look"))] * repeats.MOST
    assert len(set(contents)) == 2
    state = stack.settings.state_dir
    shown = await perennial("show", "customer-service/loops", state=state)
    assert "look not made again: 3 times the same" in shown.out
    await goes_on(stack, "loops")


async def test_a_model_that_says_nothing_is_asked_again(stack: Stack) -> None:
    """With what it says then, all is well."""
    asked = await ask(stack, "shy", "[[empty]] [[again I was away.]]")
    assert asked.status == 0, asked.err
    assert (asked.json["text"], asked.json["steps"]) == ("I was away.", 2)
    async with stack.ledger() as ledger:
        entries = await ledger.of_turn(workflow_of("shy"), 1)
    assert entries[1].messages[0] == RepairMessage(text=repair.SAY_SOMETHING)
    await goes_on(stack, "shy")


async def test_a_model_that_goes_on_saying_nothing_fails_the_turn(stack: Stack) -> None:
    """Exit status 1 and why; the same when asked again with the same id, also of an agent that had to be woken."""
    state = stack.settings.state_dir
    question = ("ask", "customer-service/mute", "[[empty]]", "--id", "q-1")
    first = await perennial(*question, state=state)
    assert (await perennial("stop", "customer-service/mute", state=state)).status == 0
    again = await perennial(*question, state=state)
    for asked in (first, again):
        assert (asked.status, asked.out) == (1, "")
        assert repair.NOTHING in " ".join(asked.err.split())
    await goes_on(stack, "mute")


async def test_sync_tools_that_hang_stop_neither_others_nor_the_worker(stack: Stack) -> None:
    """More than a pool has threads; they are counted; SIGTERM drains the worker, which ends with status 0."""
    keys = [f"jam-{number}" for number in range(15)]
    await stack.send(*(letter(key, '[[call jam {"page": 1}]] [[say Jammed.]]') for key in keys))
    await stack.all_answered()
    await goes_on(stack, "besides")
    metrics = await fetched(stack.addresses.metrics[AGENT])
    (hung,) = [line for line in metrics.splitlines() if line.startswith("perennial_tool_hung_threads{")]
    assert float(hung.split()[-1]) >= len(keys)
    assert "a call of jam was given up and hangs" in (stack.addresses.logs / "agent.log").read_text()
    stack.kill(AGENT, signal.SIGTERM)
    (died,) = await eventually(lambda: [one for one in stack.reports if isinstance(one, Died)], 60)
    assert (died.component, died.status) == (AGENT, 0)
    await stack.ready_again(AGENT)
    await goes_on(stack, "jam-1")


async def test_a_worker_drains_though_a_call_hangs(stack: Stack) -> None:
    """One that is not given up yet: once the time to drain is over, it is; its outcome is unknown, and is told."""
    before = len(stack.reports)
    await stack.send(letter("sticks", "[[call stick {}]] [[say Stuck.]]"))

    async def is_called() -> bool:
        described = await stack.client.get_workflow_handle(workflow_of("sticks")).describe()
        return any(call.activity_type.name == "run_tool" for call in described.raw_description.pending_activities)

    async def has_begun() -> bool:
        async with stack.ledger() as ledger:
            return bool(await ledger.of_turn(workflow_of("sticks"), 1)) and await is_called()

    await eventually(has_begun)
    stack.kill(AGENT, signal.SIGTERM)
    (died,) = await eventually(lambda: [one for one in stack.reports[before:] if isinstance(one, Died)], 60)
    assert (died.component, died.status) == (AGENT, 0)
    await stack.ready_again(AGENT)
    await stack.all_answered()
    (result,) = await results(stack, "sticks")
    assert result.outcome is ToolOutcome.UNKNOWN
    assert "Whether it took effect is not known." in result.content
    await goes_on(stack, "sticks")


async def test_what_the_readme_has_one_try(tmp_path: Path) -> None:
    """With the demo's agents, as it is written there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## What bad input gets") : text.index("## The command")]
    lines = re.findall(r"^perennial .*$", section, re.MULTILINE)
    state = tmp_path / "state"
    async with Stack(state):
        variables = {"PERENNIAL_STATE_DIR": str(state)}
        done = [await run("bash", "-euc", line, variables=variables) for line in lines]
    assert [one.status for one in done] == [0] * 8 + [1, 0, 0], [one.err for one in done]
    for one, told in zip(
        done, ("It failed 2 times: Conn", "not known", "Long.", r"\xff", '"printed": true'), strict=False
    ):
        assert told in one.out
    assert [one.out.strip() for one in done[5:10]] == [
        "[rehearsal] I see.",
        "[rehearsal] I see.",
        "[rehearsal] Enough.",
        "",
        "[rehearsal] I was away.",
    ]
    for told in (
        "There is no tool 'open_vault'",
        "order_id: Field required",
        "list_orders not made again",
        "sent back",
    ):
        assert told in done[10].out
