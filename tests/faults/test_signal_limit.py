"""A run of a workflow takes 10,000 signals and no more: a limit of Temporal's, and the real one here."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest
from prometheus_client import REGISTRY
from recorders import ORDERS, QUICK, Rig, numbered
from servers import AnyBroker, TemporalServer, eventually
from temporalio.client import WorkflowHandle
from temporalio.service import RPCError

from workflows import names
from workflows.events import Delivery
from workflows.names import Address
from workflows.state import AgentInput

_SIGNALS = 10_000
_LEFT = 100
_AT_ONCE = 30


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_run_that_takes_no_more_signals_is_waited_for(
    temporal_server: TemporalServer, fresh_broker: AnyBroker
) -> None:
    """P1, P3, P4: what a run does not take is neither lost nor dead-lettered; the next run has it, in order.

    The agent does not continue as new, and ingest delivers event by event. All but the last signals of the run come
    from somewhere else, which is quicker.
    """
    rig = Rig(temporal_server, fresh_broker)
    hot = names.workflow_id(Address(rig.spec.tenant, rig.spec.name, "hot"))
    client = await rig.connect()
    queue = rig.settings.task_queue
    full = await client.start_workflow(names.WORKFLOW_TYPE, AgentInput(), id=hot, task_queue=queue)
    nothing = Delivery(events=[])

    async def fill() -> None:
        for _ in range((_SIGNALS - _LEFT) // _AT_ONCE):
            await full.signal(names.DELIVER, nothing)

    await asyncio.gather(*(fill() for _ in range(_AT_ONCE)))

    async with rig.producing(), rig.ingesting(replace(QUICK, delivery_events=1, spacing=0)):
        before = refused()
        for number in range(_LEFT + 50):
            await rig.order("hot", number)
        await eventually(lambda: refused() > before)
        await rig.order("neighbour", 0)
        neighbour = names.workflow_id(Address(rig.spec.tenant, rig.spec.name, "neighbour"))
        await eventually(lambda: signalled(client.get_workflow_handle(neighbour)))

        async def committed_what_it_took() -> bool:
            return await rig.committed(ORDERS) == _LEFT

        await eventually(committed_what_it_took)
        tries = refused()
        await eventually(lambda: refused() > tries)  # it goes on trying
        assert await committed_what_it_took()
        assert await signalled(full) == numbered("hot", range(_LEFT))

        await full.terminate()  # what continue-as-new does for an agent: the next run has room

        async def committed_all() -> bool:
            return await rig.committed(ORDERS) == _LEFT + 51

        await eventually(committed_all)
        next_run = client.get_workflow_handle(hot)
        assert await signalled(next_run) == numbered("hot", range(_LEFT, _LEFT + 50))
        assert await rig.dead_letters(0) == []


def refused() -> float:
    """How many deliveries Temporal has called invalid."""
    return REGISTRY.get_sample_value("perennial_delivery_failures_total", {"status": "INVALID_ARGUMENT"}) or 0


async def signalled(run: WorkflowHandle[object, object]) -> list[str]:
    """The ids of the events that a run was given; none when there is no such run."""
    found = []
    with contextlib.suppress(RPCError):
        async for event in run.fetch_history_events():
            if event.HasField("workflow_execution_signaled_event_attributes"):
                (payload,) = event.workflow_execution_signaled_event_attributes.input.payloads
                found += [one.id for one in Delivery.model_validate_json(payload.data).events]
    return found
