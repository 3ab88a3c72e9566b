"""Who is meant, what is said of them, and what is made of Temporal's refusals."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st
from servers import TemporalServer
from temporalio.client import Client

from workers import operations, wiring
from workers.exits import BAD_INPUT, FAILED, CommandError
from workers.report import report
from workers.settings import Settings
from workflows import names
from workflows.messages import AskRequest, Intervention
from workflows.names import Address
from workflows.spec import AgentSpec


def spec(tenant: str, name: str) -> AgentSpec:
    return AgentSpec.model_validate({"tenant": tenant, "name": name, "instructions": "Be kind."})


SPECS = [spec("acme", "logistics"), spec("acme", "twin"), spec("store", "twin"), spec("twin", "logistics-2")]
PART = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=20)


def settings_of(address: str, folder: Path) -> Settings:
    ledger = f"sqlite:///{folder}/ledger.db"
    return Settings(temporal_address=address, ledger_url=ledger, task_queue="test.operations", _env_file=None)


# Who is meant -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acme/logistics/order-42", ("acme", "logistics", "order-42")),
        ("logistics/order-42", ("acme", "logistics", "order-42")),
        ("logistics/a/b", ("acme", "logistics", "a/b")),
        ("acme/logistics/a/b", ("acme", "logistics", "a/b")),
        ("store/twin/1", ("store", "twin", "1")),
        ("agent/acme/logistics/a%2Fb", ("acme", "logistics", "a/b")),
        ("twin/logistics-2/1", ("twin", "logistics-2", "1")),
    ],
)
def test_an_agent_is_found_by_what_people_write(text: str, expected: tuple[str, str, str]) -> None:
    """Three forms; a key may hold slashes; the tenant is found where only one has such an agent."""
    assert operations.resolve(text, SPECS) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("twin/1", "may be an agent of several tenants: acme, store. Write TENANT/AGENT/KEY"),
        ("store/logistics/1", "no agent for 'store/logistics/1'. Known are: acme/logistics, acme/twin, "),
        ("logistics", "names no key: write logistics/KEY"),
        ("logistics/", "names no key"),
        ("", "no agent for ''"),
        (f"logistics/{'x' * 2000}", "bytes long; Temporal takes"),
    ],
)
def test_what_is_no_agent_is_refused_with_what_to_write(text: str, message: str) -> None:
    """Bad input, not a question to nobody."""
    with pytest.raises(CommandError) as error:
        operations.resolve(text, SPECS)
    assert message in str(error.value)
    assert error.value.status == BAD_INPUT


@given(PART, PART, PART)
def test_what_is_shown_can_be_typed(tenant: str, agent: str, key: str) -> None:
    """An address as `perennial agents` prints it, and a workflow id from the Web UI, are the same agent again."""
    address = Address(tenant, agent, key)
    if tenant != "agent":
        assert operations.resolve(operations.shown(address), None) == address
    assert operations.resolve(names.workflow_id(address), None) == address


def test_the_web_ui_link_is_one_address() -> None:
    """A workflow id holds slashes and percent signs; both are encoded in the link."""
    settings = Settings(temporal_ui="http://127.0.0.1:8233/", temporal_namespace="my/space", _env_file=None)
    assert operations.ui_link(settings, "agent/a/b/c%2Fd") == (
        "http://127.0.0.1:8233/namespaces/my%2Fspace/workflows/agent%2Fa%2Fb%2Fc%252Fd"
    )


def test_specs_are_read_without_their_tools(tmp_path: Path) -> None:
    """None where there is no folder: then any agent may be meant."""
    assert operations.known_specs(tmp_path / "none") is None
    text = "name: a\ntenant: acme\ninstructions: Be kind.\ntools:\n  - python: not_a_module:tool\n"
    (tmp_path / "a.yaml").write_text(text)
    assert [found.name for found in operations.known_specs(tmp_path) or []] == ["a"]
    with pytest.raises(CommandError, match=r"a\.yaml.*not_a_module"):
        operations.check_specs(tmp_path)


# On Temporal, with no worker --------------------------------------------------------------------------------------


async def started(client: Client, settings: Settings, *addresses: Address) -> None:
    for address in addresses:
        await client.start_workflow(names.WORKFLOW_TYPE, **wiring.start_options(address, settings.task_queue))


async def test_agents_are_listed_once_newest_first_and_by_their_state(
    temporal_server: TemporalServer, tmp_path: Path
) -> None:
    """An agent with several runs is one line, its newest; no filter breaks out of its quotes."""
    settings = settings_of(temporal_server.address, tmp_path)
    client = await operations.connect(settings)
    tenant = "o'ne"
    one, two = Address(tenant, "lister", "1"), Address(tenant, "lister", "2")
    await started(client, settings, one, two)
    await client.get_workflow_handle(names.workflow_id(one)).terminate()
    await started(client, settings, one)
    await client.get_workflow_handle(names.workflow_id(two)).terminate()

    async def states() -> dict[str, str]:
        found = await operations.list_agents(client, settings, tenant=tenant)
        assert len({line.agent for line in found}) == len(found)
        return {line.key: line.state for line in found}

    async def settled() -> bool:  # the list follows a little later
        return await states() == {"1": "active", "2": "terminated"}

    await servers.eventually(settled)
    assert await operations.list_agents(client, settings, tenant=tenant, agent="other") == []
    for text in ("' OR '' = '", '" OR "" = "', "\\", '\\" OR "" = "'):
        assert await operations.list_agents(client, settings, tenant=text) == []
    assert len(await operations.list_agents(client, settings, tenant=tenant, limit=1)) == 1
    awake = await operations.list_agents(client, settings, tenant=tenant, states=("paused", "active"))
    assert [line.key for line in awake] == ["1"]
    assert await operations.list_agents(client, settings, tenant=tenant, states=("waiting", '" OR "" = "')) == []


async def test_missing_workers_are_named_for_a_question_and_for_an_order(
    temporal_server: TemporalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody polls: what is waited for in vain is said, with the id under which the question can be asked again."""
    settings = settings_of(temporal_server.address, tmp_path)
    client = await operations.connect(settings)
    address = Address("acme", "waiting", "1")
    with pytest.raises(CommandError, match=r"within 0.5 s: no agent worker polls.*--id q-7") as error:
        await operations.ask(client, settings, address, AskRequest(text="?", id="q-7"), seconds=0.5)
    assert error.value.status == FAILED
    monkeypatch.setattr(operations, "_STEER_SECONDS", 0.5)
    with pytest.raises(CommandError, match=r"acme/waiting/1 has not answered within 0.5 s: no agent worker polls"):
        await operations.steer(client, settings, address, names.PAUSE, Intervention(by="me", reason=""))
    monkeypatch.setattr("workers.report._QUERY", timedelta(seconds=1))
    told = await report(client, settings, address, limit=5)
    assert (told.awake, told.status, told.transcript) == (True, None, [])
    assert "does not answer" in told.note


async def test_an_agent_that_does_not_exist_can_not_be_steered_or_shown(
    temporal_server: TemporalServer, tmp_path: Path
) -> None:
    """Each says so; neither makes one."""
    settings = settings_of(temporal_server.address, tmp_path)
    client = await operations.connect(settings)
    address = Address("acme", "never", "1")
    with pytest.raises(CommandError, match="acme/never/1 has never been awake"):
        await operations.steer(client, settings, address, names.STOP, Intervention(by="", reason=""))
    with pytest.raises(CommandError, match="There has never been an agent acme/never/1"):
        await report(client, settings, address, limit=5)
    assert await operations.find(client, settings, address) is None
