"""Specs: read the agents' YAML files, look up their tools, and give each agent its newest spec.

    specs = load_specs(Path("deploy/agents"))
    specs.agents                        # list[AgentSpec]
    activities = [Specs(specs, ledger).load_spec]

All mistakes in all files are reported together, each with its file, line or field, and what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from pydantic_ai.tools import Tool
from temporalio import activity
from typing_extensions import override

from activities import documents
from activities.documents import DocumentError
from activities.ledger import Ledger
from activities.tools import ToolError, define, load_tool
from workflows import names
from workflows.errors import Remedy, activity_error
from workflows.interface import SpecActivities
from workflows.messages import SpecRequest
from workflows.spec import AgentSpec, ControlSpec, ResolvedSpec, ToolDefinition

AgentName = tuple[str, str]
"""Tenant and agent."""


class SpecError(Exception):
    """One or more specs are wrong; the message names each file, the line or field, and the remedy."""


@dataclass
class Agent:
    """A spec with its tools looked up."""

    spec: AgentSpec
    file: Path
    tools: dict[str, Tool[None]] = field(default_factory=dict)
    definitions: list[ToolDefinition] = field(default_factory=list)

    def resolved(self) -> ResolvedSpec:
        """What the ledger keeps and entries refer to."""
        return ResolvedSpec(
            name=self.spec.name,
            tenant=self.spec.tenant,
            instructions=self.spec.instructions,
            route=self.spec.route,
            tools=self.definitions,
            description=self.spec.description,
            budget=self.spec.budget,
            mailbox=self.spec.mailbox,
            context=self.spec.context,
            hibernate_after=timedelta(seconds=idle) if (idle := self.spec.hibernate_after_seconds) else None,
        )


class SpecSet:
    """All specs of a deployment, by tenant and name."""

    def __init__(self, agents: list[Agent]) -> None:
        self._agents = {(agent.spec.tenant, agent.spec.name): agent for agent in agents}

    @property
    def agents(self) -> list[AgentSpec]:
        """The specs, as written."""
        return [agent.spec for agent in self._agents.values()]

    @property
    def topics(self) -> list[str]:
        """The topics that wake somebody: `agents.events` and those subscribed to, each once."""
        subscribed = {subscription.topic for spec in self.agents for subscription in spec.subscriptions}
        return sorted({names.EVENTS_TOPIC, *subscribed})

    def get(self, tenant: str, agent: str) -> Agent | None:
        """The agent of that name, if there is one."""
        return self._agents.get((tenant, agent))

    def tool(self, workflow_id: str, name: str) -> Tool[None] | None:
        """The tool of that name of the agent with that workflow id."""
        address = names.parse_workflow_id(workflow_id)
        agent = self.get(address.tenant, address.agent)
        return agent.tools.get(name) if agent else None


class Specs(SpecActivities):
    """Gives an agent its newest spec, and keeps that spec in the ledger, where entries refer to it."""

    def __init__(self, specs: SpecSet, ledger: Ledger) -> None:
        self._specs = specs
        self._ledger = ledger
        self._controls: dict[AgentName, ControlSpec] = {}
        """Of the specs that are in the ledger: they don't change while this process runs."""

    @override
    @activity.defn(name="load_spec")
    async def load_spec(self, request: SpecRequest) -> ControlSpec | None:
        agent = self._specs.get(request.tenant, request.agent)
        if agent is None:
            known = ", ".join(f"{spec.tenant}/{spec.name}" for spec in self._specs.agents) or "none"
            raise activity_error(
                Remedy.RETRY_LATER,
                f"There is no spec for agent {request.agent!r} of tenant {request.tenant!r}; known are: {known}. "
                "Add its YAML file to the specs folder and restart the agent workers.",
            )
        name = (request.tenant, request.agent)
        control = self._controls.get(name)
        if control is None:
            resolved = agent.resolved()
            control = self._controls[name] = resolved.control(await self._ledger.put_spec(resolved))
        return None if control.digest == request.known_digest else control


def load_specs(folder: Path) -> SpecSet:
    """Read every `*.yaml` in a folder.

    Raises:
        SpecError: a file can't be read or is wrong, or two files define the same agent; all faults are named.
    """
    if not folder.is_dir():
        raise SpecError(f"There is no specs folder {folder}. Set PERENNIAL_SPECS to the folder with your agents' YAML.")
    agents: list[Agent] = []
    faults: list[str] = []
    files: dict[AgentName, Path] = {}
    for path in documents.files(folder):
        try:
            agent = load_agent(path)
        except SpecError as error:
            faults.append(str(error))
            continue
        name = (agent.spec.tenant, agent.spec.name)
        if name in files:
            faults.append(f"{path}: agent {name[0]}/{name[1]} is defined in {files[name]} already; rename one of them")
            continue
        files[name] = path
        agents.append(agent)
    if faults:
        raise SpecError("\n".join(faults))
    return SpecSet(agents)


def load_agent(path: Path) -> Agent:
    """Read one spec and look up its tools.

    Raises:
        SpecError: naming the file and the line (of a YAML mistake) or the field (of a wrong value).
    """
    try:
        spec, document = documents.read(path, AgentSpec)
    except DocumentError as error:
        raise SpecError(str(error)) from error
    agent = Agent(spec=spec, file=path)
    faults: list[str] = []
    for number, tool_spec in enumerate(spec.tools):
        place = document.place("tools", number)
        try:
            tool = load_tool(tool_spec.python, beside=path.parent)
        except ToolError as error:
            faults.append(f"{place}: {error}")
            continue
        if tool.name in agent.tools:
            faults.append(f"{place}: a tool named {tool.name} is there already; tools of one agent need own names")
            continue
        agent.tools[tool.name] = tool
        agent.definitions.append(define(tool_spec, tool))
    if faults:
        raise SpecError("\n".join(faults))
    return agent
