"""The README's promise: who has nothing else gets an own agent answering. Its blocks are run as they are written."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio
from servers import eventually
from stack import ROOT, Command, Finished, Stack, none_alive, run

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code in the README."""

    language: str
    code: str

    @property
    def lines(self) -> list[str]:
        """Its lines of shell, without what can't be had in a test, and with continuations joined."""
        return [
            line
            for line in self.code.replace("\\\n", " ").splitlines()
            if line and not line.startswith("source ")  # the test sets PATH instead
        ]


def blocks(begin: str, end: str) -> list[Block]:
    """The blocks between two texts that are in the README once."""
    assert README.count(begin) == README.count(end) == 1, f"{begin!r} and {end!r} have to be in the README, once each"
    part = README[README.index(begin) : README.index(end)]
    return [Block(*found) for found in _BLOCK.findall(part)]


def of(language: str, found: list[Block]) -> list[Block]:
    return [block for block in found if block.language == language]


async def shell(line: str, cwd: Path) -> Finished:
    """Run a line of shell as it is written."""
    return await run("bash", "-euc", line, cwd=cwd)


@pytest.mark.timeout(300)
async def test_the_first_agent_of_ones_own_answers(tmp_path: Path) -> None:
    """Spec, tool, check, event, question, show: as written, and in under thirty lines."""
    found = blocks("<!-- first agent:", "## Talking to an agent")
    files = [*of("yaml", found), *of("python", found)]
    assert sum(len(block.code.splitlines()) for block in files) < 30
    for block in files:
        path = tmp_path / block.code.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.code, encoding="utf-8")
    prepare, use = of("sh", found)
    check, start = prepare.lines
    checked = await shell(check, tmp_path)
    assert checked.status == 0, checked.err
    assert "hotel/concierge" in checked.out
    variables, command = start.partition("#")[0].split(maxsplit=1)
    name, _, value = variables.partition("=")
    program, *arguments = shlex.split(command)
    assert program == "perennial"
    state = tmp_path / ".perennial"  # where `perennial dev` keeps it by itself
    async with Command(*arguments, state=state, cwd=tmp_path, variables={name: value}) as dev:
        await dev.up()
        await _use(use, tmp_path)
        children = dev.send_signal(signal.SIGINT)
        assert await dev.ended() == 0, dev.said()
        await none_alive(children)


async def _use(block: Block, folder: Path) -> None:
    """The second terminal: what runs until Ctrl-C is left out, and looked at with an end to it."""
    export, tail, send, ask, show = block.lines
    assert tail.partition("#")[0].strip() == "perennial tail &"
    sent = await shell(f"{export}\n{send}", folder)
    assert sent.status == 0, sent.err
    assert "warning" not in sent.err, sent.err
    told = await shell(f"{export}\nperennial tail --from-beginning --count 2 --json", folder)
    replies = [event for line in told.out.splitlines() if (event := json.loads(line))["type"] == "perennial.reply.v1"]
    assert [reply["data"]["answers"][0]["id"] for reply in replies] == [sent.out.strip()]
    assert "sunny" in replies[0]["data"]["text"], "the answer comes of the tool"
    assert replies[0]["data"]["rehearsal"]
    asked = await shell(f"{export}\n{ask}", folder)
    assert asked.status == 0, asked.err
    assert "Do I need an umbrella?" in asked.out, "it remembers the event"
    assert asked.out.startswith("[rehearsal]")
    shown = await shell(f"{export}\n{show}", folder)
    assert shown.status == 0, shown.err
    assert "hotel/concierge/room-7" in shown.out
    assert "http://127.0.0.1:" in shown.out, "its page in the Web UI"


TOUR = [
    ("ask customer-service/customer-07", ["order-1007 is delivered"]),
    ("send", []),
    ("tail", ["order-1007 is delivered", "I have made a note", "completed", "2 tool calls"]),
    ("memory", ["Please don't send it with Royal Mail. (pinned)"]),
    ("ask customer-service/customer-07", ["I keep in mind", "Royal Mail"]),
    ("show customer-service/customer-07", ["spent", "Web UI", "calls: remember", "turn 3, step 2"]),
    ("budget show", ["today", "3 of 200", "2,000,000"]),
    ("fork", ["what-if begins behind entry", "(turn 1, step 2)"]),
    ("ask customer-service/what-if", ["The last one was: Where is order-1007?"]),
    ("rewind", ["remember", "goes on behind entry"]),
    ("show customer-service/customer-07 --tree", ["○ turn 3, step 2", "← head", "what-if begins here"]),
    ("verify", []),
    ("ask security", ['"verdict": "harmless"', "The last login was from"]),
    ("send", []),
    ("ask logistics", ["order-1008 is delayed"]),
    ("show logistics", ["flag_shipment", "calls: track_parcel", "wakes    when store.order.delivered comes, or at "]),
    ("schedules list", ["store/security/morning-handover", "0 7 * * *", "store/security/duty-officer"]),
    ("agents", ["store/security/customer-07", "store/logistics/order-1008", "store/customer-service/what-if"]),
    ("doctor", []),
]
"""What the commands of the tour print."""


@pytest.mark.timeout(300)
async def test_the_tour_of_the_demo_company_shows_what_it_says(tmp_path: Path) -> None:
    """Every command of it, in order, as it is written; the reader waits until an event is answered, and so do we."""
    (block,) = blocks("<!-- tour:", "## Your first agent")
    commands = [line for line in block.lines if not line.startswith("#")]
    state = tmp_path / "state"
    async with Stack(state) as stack:

        def is_answered(event_id: str) -> bool:
            return any(of.id == event_id for answer in stack.observer.answers for of in answer.reply.answers)

        for command, (begins, said) in zip(commands, TOUR, strict=True):
            assert command.startswith(f"perennial {begins}")
            done = await run("bash", "-euc", command, variables={"PERENNIAL_STATE_DIR": str(state)})
            assert done.status == 0, (command, done.err)
            for text in said:
                assert text in done.out + done.err, (command, done.out, done.err)
            if begins == "send":
                await eventually(partial(is_answered, done.out.strip()))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """The store's agents, as `make dev` starts them."""
    async with Stack(tmp_path_factory.mktemp("store")) as running:
        yield running


async def test_an_agent_is_asked_from_python_with_the_temporal_client(store: Stack, tmp_path: Path) -> None:
    """The block is a program; only the address is that of the test's stack. Run again, it gets the same answer."""
    (block,) = of("python", blocks("### From Python, with the Temporal client", "### From Kafka, in any language"))
    assert "127.0.0.1:7233" in block.code
    program = tmp_path / "talk.py"
    program.write_text(block.code.replace("127.0.0.1:7233", store.addresses.temporal), encoding="utf-8")
    first = await run("python", str(program), cwd=ROOT)
    again = await run("python", str(program), cwd=ROOT)
    # On Python 3.11 temporalio may crash when the interpreter has done all and exits (DESIGN.md, "Facts").
    assert {first.status, again.status} <= {0, -signal.SIGSEGV, -signal.SIGABRT}, first.err + again.err
    assert "order-1007" in first.out
    assert "customer-07" in first.out, "its status"
    assert again.out.splitlines()[0] == first.out.splitlines()[0]
    assert again.out.count("turn=1 ") == 1, "the same id was not answered again"


async def test_the_event_in_the_readme_reaches_its_agent(store: Stack) -> None:
    """The CloudEvent shown under 'From Kafka' is one, for an agent of the store."""
    (block,) = [Block(*found) for found in re.findall(r"^```(\w*)\n(topic .*?)^```$", README, re.MULTILINE | re.DOTALL)]
    topic = re.search(r"^topic +(\S+)", block.code, re.MULTILINE)
    value = re.search(r"^value +(\{.*\})", block.code, re.MULTILINE | re.DOTALL)
    assert topic
    assert value
    event = json.loads(value[1])
    await store.send(json.dumps(event).encode(), topic=topic[1])
    await store.all_answered()
    assert "order-1007" in store.replies(event["subject"])[0]
