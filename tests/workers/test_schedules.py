"""Schedules in Temporal are those of the specs, and their overlap is what the agent has not answered yet."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import World, answer
from servers import TemporalServer
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from workers import schedules, wiring
from workers.exits import CommandError
from workers.schedules import Change, Listed
from workers.settings import Settings
from workflows import names
from workflows.messages import Decision, ThinkRequest
from workflows.names import ScheduleId
from workflows.spec import AgentSpec

Eventually = Callable[..., Awaitable[Any]]


@pytest.fixture
async def client(temporal_server: TemporalServer) -> Client:
    client = await Client.connect(temporal_server.address, data_converter=pydantic_data_converter)
    await wiring.ensure_search_attributes(client)
    return client


@pytest.fixture
def settings(temporal_server: TemporalServer, tmp_path: Path) -> Settings:
    return Settings(temporal_address=temporal_server.address, state_dir=tmp_path)


@pytest.fixture
def tenant() -> str:
    """Of the test's own: the server is shared."""
    return f"t-{uuid.uuid4()}"


def spec(tenant: str, *written: dict[str, Any], name: str = "desk") -> AgentSpec:
    return AgentSpec.model_validate({"name": name, "tenant": tenant, "instructions": "x", "schedules": list(written)})


NIGHTLY = {"name": "nightly", "cron": "0 3 * * *", "time_zone": "Europe/Lisbon"}


def done(changes: list[Change], tenant: str) -> dict[str, str]:
    return {one.schedule.removeprefix(f"{tenant}/"): one.did for one in changes}


async def listed(client: Client, settings: Settings, tenant: str, *specs: AgentSpec) -> list[Listed]:
    return [one for one in await schedules.listed(client, settings, specs) if one.schedule.startswith(tenant)]


async def test_schedules_are_made_changed_and_removed_as_the_specs_say(
    client: Client, settings: Settings, tenant: str, eventually: Eventually
) -> None:
    """Applied again, nothing changes; who has paused one finds it paused; those of other agents stay."""
    first = spec(tenant, NIGHTLY, {"name": "often", "every": "6 h", "jitter_seconds": 60})
    other = spec(tenant, {"name": "x", "calendar": {"hour": 8, "day_of_week": "mon-fri"}}, name="other")
    assert done(await schedules.apply(client, "q", [first, other]), tenant) == {
        "desk/nightly": "created",
        "desk/often": "created",
        "other/x": "created",
    }
    assert set(done(await schedules.apply(client, "q", [first]), tenant).values()) == {"unchanged"}
    nightly = ScheduleId(tenant, "desk", "nightly")
    await schedules.steer(client, settings, nightly, "pause", "on holiday")

    async def all_there() -> bool:
        return len(await listed(client, settings, tenant)) == 3

    await eventually(all_there)
    later = spec(tenant, {**NIGHTLY, "cron": "0 4 * * *", "overlap": "buffer_all"})
    assert done(await schedules.apply(client, "q", [later]), tenant) == {
        "desk/nightly": "changed",
        "desk/often": "removed",
    }
    found = {one.schedule: one for one in await listed(client, settings, tenant, later)}
    changed = found[f"{tenant}/desk/nightly"]
    assert (changed.when, changed.state, changed.overlap) == ("0 4 * * * (Europe/Lisbon)", "paused", "buffer_all")
    assert (changed.agent, changed.note) == (f"{tenant}/desk/main", "on holiday")
    assert found[f"{tenant}/other/x"].state == "active, left over"
    await schedules.steer(client, settings, nightly, "resume", "")
    (now,) = [one for one in await listed(client, settings, tenant, later) if one.schedule.endswith("nightly")]
    assert now.next is not None
    await schedules.steer(client, settings, nightly, "remove", "")
    with pytest.raises(CommandError, match="There is no schedule"):
        await schedules.steer(client, settings, nightly, "trigger", "")
    (gone,) = [one for one in await listed(client, settings, tenant, later) if one.schedule.endswith("nightly")]
    assert gone.state == "missing"


async def test_what_temporal_does_not_take_is_said_with_the_schedule_s_name(client: Client, tenant: str) -> None:
    wrong = spec(tenant, {**NIGHTLY, "time_zone": "Europe/Atlantis"})
    with pytest.raises(CommandError, match=f"does not take the schedule {tenant}/desk/nightly: .*Atlantis"):
        await schedules.apply(client, "q", [wrong])


@pytest.mark.parametrize(("overlap", "expected"), [("skip", 2), ("buffer_one", 3), ("allow_all", 5)])
async def test_an_occurrence_overlaps_with_one_that_is_not_answered_yet(
    client: Client, settings: Settings, tenant: str, eventually: Eventually, overlap: str, expected: int
) -> None:
    """While the agent thinks, three more come; when it is done, one more: what becomes of them, the spec says."""
    go_on, thinking = asyncio.Event(), asyncio.Event()

    async def think(request: ThinkRequest) -> Decision:
        thinking.set()
        await go_on.wait()
        return answer("seen", request)

    world, queue = World(think_with=think), str(uuid.uuid4())
    nightly = ScheduleId(tenant, "desk", "nightly")
    await schedules.apply(client, queue, [spec(tenant, {**NIGHTLY, "overlap": overlap})])

    async def trigger() -> None:
        await schedules.steer(client, settings, nightly, "trigger", "")

    async def heeded(count: int) -> None:
        async def has_been() -> bool:
            described = await schedules.handle(client, nightly).describe()
            seen = described.info.num_actions + described.info.num_actions_skipped_overlap
            return seen + described.raw_description.info.buffer_size >= count

        await eventually(has_been)

    def answered() -> list[str]:
        return [one.id for reply in world.replies for one in reply.answers]

    async with world.workers(client, queue):
        await trigger()
        await thinking.wait()
        for number in range(2, 5):
            await asyncio.sleep(1.1)  # Temporal tells occurrences apart by the second
            await trigger()
            await heeded(number)
        go_on.set()
        await eventually(lambda: len(answered()) == expected - 1)
        await asyncio.sleep(1.1)
        await trigger()
        await eventually(lambda: len(answered()) == expected)
        agent = client.get_workflow_handle(names.workflow_id(names.Address(tenant, "desk", "main")))
        await agent.terminate()
    assert len(set(answered())) == expected
    await schedules.steer(client, settings, nightly, "remove", "")
