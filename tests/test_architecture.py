"""The house: registered names are the interface's, imports and the environment stay where they belong."""

from __future__ import annotations

import ast
import re
from abc import ABC
from collections.abc import Iterator
from inspect import isabstract, isclass
from pathlib import Path

import pytest
from fakes import World
from servers import TemporalServer
from temporalio import activity
from temporalio.worker import Worker

from activities.endpoints import ModelsConfig, PoolConfig, Pools
from activities.kafka import Kafka
from activities.ledger import Ledger
from activities.publish import Publish
from activities.specs import SpecSet
from workers import wiring
from workers.agent import agent_worker, mcp_servers
from workers.model import model_worker
from workers.settings import PREFIX, Settings
from workflows import interface, names
from workflows.agent import AgentWorkflow
from workflows.alarm import AlarmWorkflow
from workflows.occurrence import OccurrenceWorkflow

ROOT = Path(__file__).parents[1]
PACKAGES = ("workflows", "activities", "workers")
INTERFACES = [
    found
    for found in vars(interface).values()
    if isclass(found) and found.__module__ == interface.__name__ and issubclass(found, ABC)
]


def modules(*packages: str) -> Iterator[tuple[str, ast.Module]]:
    """The modules of packages, parsed."""
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """Everything a module imports, as dotted names: `a.b` for `import a.b`, and for `from a import b`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def interface_names() -> set[str]:
    """The names of the activities that the workflow may call."""
    return {
        definition.name or ""
        for one in INTERFACES
        for method in vars(one).values()
        if callable(method) and (definition := activity._Definition.from_callable(method))
    }


def registered(worker: Worker) -> set[str]:
    """The names of the activities that a worker serves."""
    return {
        activity._Definition.must_from_callable(served).name or "" for served in worker.config().get("activities", ())
    }


async def test_the_workers_serve_all_activities_and_no_others(temporal_server: TemporalServer, tmp_path: Path) -> None:
    """An activity nobody serves would wait for ever; one that nobody calls is dead code."""
    settings = Settings(temporal_address=temporal_server.address, state_dir=tmp_path, task_queue="house")
    client = await wiring.connect(settings)
    config = ModelsConfig(pools={"only": PoolConfig(model="openai-chat:small", base_url="http://127.0.0.1:9/v1")})
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger, Pools(config, {}) as pools:
        publisher, servers = Publish(Kafka("127.0.0.1:9")), mcp_servers(tmp_path)
        agents = agent_worker(client, settings, SpecSet([]), ledger, publisher, servers)
        models = model_worker(client, settings, ledger, pools)
    assert registered(agents) | registered(models) == interface_names()
    assert registered(models) == {"think", "compact"}
    assert not registered(agents) & registered(models)
    assert (agents.task_queue, models.task_queue) == ("house", names.model_queue("house"))
    assert agents.config().get("workflows") == [AgentWorkflow, AlarmWorkflow, OccurrenceWorkflow]


def test_the_names_of_activities_never_change() -> None:
    """They stand in every history."""
    ledger = {"wake", "keep_snapshot", "find_reply", "record_rewind", "record_approval", "record_lift", "close_step"}
    clock = {"set_alarm", "deliver", "look_at_clock"}
    assert interface_names() == {"think", "compact", "run_tool", "keep_result", "load_spec", "publish", *ledger, *clock}


def test_the_interface_is_abstract() -> None:
    """A bare interface, registered by mistake, would be accepted by a worker; so it can't be made."""
    assert len(INTERFACES) >= 5
    for one in INTERFACES:
        assert isabstract(one), one
        with pytest.raises(TypeError, match="abstract"):
            one()
    assert all(issubclass(World, one) for one in INTERFACES)


def test_only_the_agent_and_its_parts_speak_temporal_s_workflow_api() -> None:
    """Everything else in workflows/ is plain data and decisions, tested without Temporal."""
    users = [
        file
        for file, tree in modules("workflows")
        if any(name.startswith("temporalio.workflow") for name in imported(tree))
    ]
    assert set(users) == {
        f"workflows/{part}.py"
        for part in ("acting", "agent", "alarm", "attending", "life", "occurrence", "over_budget", "turn")
    }


def test_only_settings_touch_the_environment() -> None:
    """Everything a process needs arrives through its constructor."""
    readers = set()
    for file, tree in modules(*PACKAGES):
        for node in ast.walk(tree):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            if named and node.attr in {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}:
                readers.add(file)
        if imported(tree) & {"os.environ", "os.getenv", "os.environb"}:
            readers.add(file)
    assert readers == {"workers/settings.py"}


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("prometheus_client", {"activities/metrics.py", "workers/wiring.py", "workers/demo.py"}),
        ("mcp", {"activities/mcp_servers.py", "activities/demo_carrier.py"}),
        ("sqlalchemy", {"activities/ledger.py", "activities/memory.py", "activities/spend.py"}),
        ("genai_prices", {"activities/prices.py"}),
        ("pydantic_settings", {"workers/settings.py"}),
        (
            "typer",
            {
                f"workers/{part}.py"
                for part in ("arguments", "cli", "cli_budget", "cli_calls", "cli_schedules", "cli_steering")
            },
        ),
    ],
)
def test_a_library_is_known_where_it_belongs(library: str, homes: set[str]) -> None:
    """STYLE.md: one place for each kind of knowledge."""
    users = {file for file, tree in modules(*PACKAGES) if any(name.split(".")[0] == library for name in imported(tree))}
    assert users <= homes


def test_the_readme_s_table_has_every_setting_and_no_other() -> None:
    """A newcomer finds each variable, and finds none that does nothing."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(rf"^\|\s*`({PREFIX}\w+)`\s*\|", readme, flags=re.MULTILINE)
    assert sorted(table) == sorted(PREFIX + name.upper() for name in Settings.model_fields)
