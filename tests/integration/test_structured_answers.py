"""Issue 4, point 9, on the real stack: answers that have to fit a schema, repaired or visibly failed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from servers import eventually
from stack import Stack, perennial
from traffic import letter, workflow_of

from activities.entries import AssistantMessage, RepairMessage
from workers.embedded import MODEL
from workflows import repair

_SPEC = """
name: customer-service
tenant: store
instructions: You judge.
reply:
  pydantic: court_forms:Verdict
  repairs: 2
"""
_FORMS = """
from typing import Literal

from pydantic import BaseModel


class Verdict(BaseModel):
    verdict: Literal["yes", "no"]
    reason: str
"""
GOOD = {"verdict": "yes", "reason": "I saw it."}
UNFIT = "$.verdict: 'maybe' is not one of ['yes', 'no']"

pytestmark = pytest.mark.slow


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("answers")
    specs = folder / "specs"
    specs.mkdir()
    (specs / "agent.yaml").write_text(_SPEC)
    (specs / "court_forms.py").write_text(_FORMS)
    async with Stack(folder / "state", specs=specs) as running:
        yield running


def scripted(first: str, *then: str) -> str:
    """A question to which the model says this first, and then, each time it is sent back, the next of these."""
    return " ".join([f"[[say {first}]]", *(f"[[again {text}]]" for text in then)])


def maybe(number: int = 1) -> str:
    return json.dumps({"verdict": "maybe", "reason": str(number)})


async def test_a_wrong_answer_is_repaired(stack: Stack) -> None:
    """The person gets the answer as data; transcript and ledger show what was wrong, twice."""
    state = stack.settings.state_dir
    asked = await perennial(
        "ask", "customer-service/case-1", scripted("I think so.", maybe(), json.dumps(GOOD)), "--json", state=state
    )
    assert asked.status == 0, asked.err
    reply = asked.json
    assert (reply["data"], json.loads(reply["text"]), reply["outcome"]) == (GOOD, GOOD, "completed")
    assert reply["steps"] == 3
    async with stack.ledger() as ledger:
        entries = await ledger.of_turn(workflow_of("case-1"), 1)
    said = [entry.answer.text if entry.answer else "" for entry in entries]
    assert said == ["I think so.", maybe(), json.dumps(GOOD)]
    assert all(entry.usage.output_tokens for entry in entries)
    told = [message.text for entry in entries for message in entry.messages if isinstance(message, RepairMessage)]
    assert told == [
        repair.message(["the answer is not JSON: Expecting value: line 1 column 1 (char 0)"]),
        repair.message([UNFIT]),
    ]
    shown = await perennial("show", "customer-service/case-1", state=state)
    assert f"sent back: {repair.WRONG}" in shown.out
    assert "I think so." in shown.out


async def test_an_answer_that_stays_wrong_fails_visibly(stack: Stack) -> None:
    """Exit status 1 and what did not fit; the raw text is in the ledger; the next question is answered in form."""
    state = stack.settings.state_dir
    asked = await perennial("ask", "customer-service/case-2", scripted(maybe(1), maybe(2), maybe(3)), state=state)
    assert (asked.status, asked.out) == (1, "")
    assert UNFIT in " ".join(asked.err.split())
    async with stack.ledger() as ledger:
        entries = await ledger.of_turn(workflow_of("case-2"), 1)
    assert [entry.messages[-1] for entry in entries] == [AssistantMessage(text=maybe(n)) for n in (1, 2, 3)]
    fine = await perennial("ask", "customer-service/case-2", "And now?", "--json", state=state)
    assert fine.status == 0, fine.err
    assert fine.json["data"]["verdict"] in {"yes", "no"}


async def test_a_repair_survives_the_death_of_its_worker(stack: Stack) -> None:
    """P6: killed while the answer is repaired, the model worker goes on where it was; no call is paid for twice."""
    script = scripted(maybe(), maybe(2), json.dumps(GOOD))
    workflow_id = workflow_of("case-3")
    await stack.send(letter("case-3", f"[[latency 0.7]] {script}"))
    async with stack.ledger() as ledger:

        async def repairing() -> bool:
            return len(await ledger.of_turn(workflow_id, 1)) == 1

        await eventually(repairing, 60)
        await stack.call_in_flight("case-3")
        stack.kill(MODEL)
        await stack.all_answered()
        entries = await ledger.of_turn(workflow_id, 1)
    assert [entry.answer.text for entry in entries if entry.answer] == [maybe(), maybe(2), json.dumps(GOOD)]
    tally = await stack.tally()
    assert tally.paid_twice == 0
