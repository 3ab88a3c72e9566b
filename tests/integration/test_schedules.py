"""Schedules on the real stack: made when the worker starts, steered by the command, once through kill -9."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from servers import eventually
from stack import PERENNIAL, Finished, Stack, run
from temporalio.client import WorkflowExecutionStatus
from traffic import workflow_of

from activities.entries import Entry
from workers.embedded import AGENT
from workflows import names

_SPEC = """
name: customer-service
tenant: store
instructions: You answer customers.
schedules:
  - name: nightly
    cron: "0 3 * * *"
    time_zone: Europe/Lisbon
    key: all
    text: "[[say All is well.]] [[latency 3]] How was the day?"
"""

pytestmark = pytest.mark.slow


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("schedules")
    specs = folder / "specs"
    specs.mkdir()
    (specs / "customer-service.yaml").write_text(_SPEC)
    async with Stack(folder / "state", specs=specs) as running:
        yield running


async def perennial(stack: Stack, *arguments: str) -> Finished:
    variables = {
        "PERENNIAL_STATE_DIR": str(stack.settings.state_dir),
        "PERENNIAL_SPECS": str(stack.specs),
        "PERENNIAL_TEMPORAL_ADDRESS": stack.temporal_address,
    }
    return await run(str(PERENNIAL), *arguments, variables=variables)


async def nightly(stack: Stack) -> dict[str, Any]:
    (row,) = (await perennial(stack, "schedules", "list", "--json")).json
    assert isinstance(row, dict)
    return row


async def answered(stack: Stack) -> list[Entry]:
    """The entries of the turns that took an occurrence."""
    async with stack.ledger() as ledger:
        entries = await ledger.transcript(workflow_of("all"), limit=100)
    return [entry for entry in entries if any(one.source == names.SCHEDULE_SOURCE for one in entry.answers)]


async def test_a_schedule_is_there_when_the_worker_is_and_people_steer_it(stack: Stack) -> None:
    row = await nightly(stack)
    assert (row["schedule"], row["agent"]) == ("store/customer-service/nightly", "store/customer-service/all")
    assert (row["when"], row["state"], row["taken"]) == ("0 3 * * * (Europe/Lisbon)", "active", 0)
    again = await perennial(stack, "schedules", "apply")
    assert again.status == 0, again.err
    assert "unchanged" in again.out
    paused = await perennial(stack, "schedules", "pause", "customer-service/nightly", "--reason", "on holiday")
    assert paused.out == "store/customer-service/nightly paused.\n"
    row = await nightly(stack)
    assert row["state"] == "paused"
    assert row["note"].endswith(": on holiday")
    assert (await perennial(stack, "schedules", "resume", "customer-service/nightly")).status == 0
    wrong = await perennial(stack, "schedules", "trigger", "customer-service/daily")
    assert wrong.status == 1
    assert "There is no schedule store/customer-service/daily." in wrong.err


async def test_an_occurrence_takes_effect_once_though_the_worker_was_killed(stack: Stack) -> None:
    """P1, P6: while the agent thinks about it; the occurrence ends once it is answered."""
    assert (await perennial(stack, "schedules", "trigger", "customer-service/nightly")).status == 0
    await stack.call_in_flight("all")
    stack.kill(AGENT)
    await stack.ready_again(AGENT)
    await eventually(lambda: stack.replies("all") == ["All is well."], 60)
    (entry,) = await answered(stack)
    (event,) = entry.answers
    occurrence = stack.client.get_workflow_handle(event.id)

    async def is_over() -> bool:
        return (await occurrence.describe()).status is WorkflowExecutionStatus.COMPLETED

    await eventually(is_over)
    took = await occurrence.describe()
    assert took.close_time is not None
    assert took.close_time - took.start_time < timedelta(days=1), "it has been told, and has not just given up"
    assert (await nightly(stack))["taken"] == 1
