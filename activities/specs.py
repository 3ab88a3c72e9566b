"""Specs: read the agents' YAML files, look up their tools, and give each agent its newest spec.

    specs = load_specs(Path("deploy/agents"))
    specs.agents                        # list[AgentSpec]
    activities = [Specs(specs, ledger, servers).load_spec]

All mistakes in all files are reported together, each with its file, line or field, and what was expected.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import zoneinfo
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from pydantic_ai.tools import Tool
from temporalio import activity
from typing_extensions import override

from activities import documents
from activities.documents import DocumentError
from activities.forms import FormError, resolve
from activities.ledger import Ledger
from activities.mcp_servers import NotRun, Servers
from activities.memory_tools import memory_tool_spec, memory_tools
from activities.results import READ_RESULT
from activities.tools import ToolError, define, load_tool
from workflows import names, wake_ups
from workflows.errors import Remedy, activity_error
from workflows.interface import SpecActivities
from workflows.messages import SpecRequest
from workflows.spec import (
    AgentSpec,
    ControlSpec,
    ListedTool,
    McpSpec,
    McpTool,
    ReplyForm,
    ResolvedSpec,
    Scope,
    ToolDefinition,
)

log = logging.getLogger(__name__)

AgentName = tuple[str, str]
"""Tenant and agent."""

Listings = Mapping[str, list[ListedTool]]
"""The tools of an agent's MCP servers, by the servers' names."""

_PATIENCE_SECONDS = 20  # less than `interface.LEDGER` gives: the agent's owner is told what is waited for
_TOOL_NAME = 64  # characters that every model provider takes
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")


class SpecError(Exception):
    """One or more specs are wrong; the message names each file, the line or field, and the remedy."""


@dataclass
class Agent:
    """A spec with its Python tools looked up."""

    spec: AgentSpec
    file: Path
    version: str = ""
    """SHA-256 of the file."""
    tools: dict[str, Tool[None]] = field(default_factory=dict)
    definitions: list[ToolDefinition] = field(default_factory=list)
    servers: dict[str, McpSpec] = field(default_factory=dict)
    """Its MCP servers, by name."""
    places: dict[str, str] = field(default_factory=dict)
    """Where in the file each of them stands."""
    reply: ReplyForm | None = None
    """What its answers have to fit."""

    @property
    def name(self) -> AgentName:
        """Tenant and agent."""
        return self.spec.tenant, self.spec.name

    def resolved(self, listings: Listings) -> ResolvedSpec:
        """What the ledger keeps and entries refer to.

        Raises:
            SpecError: the MCP servers' tools are not those that the spec asks for, or two tools have one name.
        """
        definitions = [*self.definitions, *self._remote(listings)]
        return ResolvedSpec(
            name=self.spec.name,
            tenant=self.spec.tenant,
            team=self.spec.team,
            instructions=self.spec.instructions,
            route=self.spec.route,
            tools=[*definitions, READ_RESULT] if definitions else [],
            servers={name: server.server for name, server in self.servers.items()},
            description=self.spec.description,
            budget=self.spec.budget,
            mailbox=self.spec.mailbox,
            context=self.spec.context,
            memory=self.spec.memory,
            wake_ups=self.spec.wake_ups,
            quiet_hours=self.spec.quiet_hours,
            reply=self.reply,
            stream=self.spec.stream,
            hibernate_after=timedelta(seconds=idle) if (idle := self.spec.hibernate_after_seconds) else None,
        )

    def _remote(self, listings: Listings) -> list[ToolDefinition]:
        """The tools of the MCP servers, as the model is told of them."""
        taken = dict.fromkeys(self.tools, "a Python function")
        own = {names.READ_RESULT, *(definition.name for definition in self.definitions if definition.built_in)}
        definitions: list[ToolDefinition] = []
        faults: list[str] = []
        for name, server in self.servers.items():
            listed = listings[name]
            known = {tool.name for tool in listed}
            wanted = [tool for tool in listed if server.wants(tool.name)]
            missing = [tool for tool in server.only if tool not in known and not set("*?[") & set(tool)]
            if missing or not wanted:
                lacks = f"has no tool {', '.join(missing or server.only)}"
                faults.append(f"{self.places[name]}: MCP server {name} {lacks if known else 'lists no tools'}")
            for tool in wanted:
                definition = _remote_definition(server, tool)
                if definition.name in taken or definition.name in own:
                    of = taken.get(definition.name, "Perennial's own")
                    faults.append(
                        f"{self.places[name]}: MCP server {name} has a tool {definition.name}, and there is "
                        f"one of that name already ({of}); give the server a prefix, or leave the tool out with only"
                    )
                taken[definition.name] = f"of MCP server {name}"
                definitions.append(definition)
        if faults:
            raise SpecError("\n".join(faults))
        return definitions


def _remote_definition(server: McpSpec, tool: ListedTool) -> ToolDefinition:
    return ToolDefinition(
        name=_NOT_IN_NAMES.sub("_", f"{server.prefix}{tool.name}")[:_TOOL_NAME],
        description=tool.description,
        parameters=tool.parameters,
        mcp=McpTool(server=server.mcp, tool=tool.name),
        timeout=timedelta(seconds=server.timeout_seconds),
        repeatable=tool.repeatable if server.repeatable is None else server.repeatable,
        attempts=server.attempts,
        polls=server.polls,
        approval=server.approval.policy if server.approval else None,
    )


class SpecSet:
    """All specs of a deployment, by tenant and name."""

    def __init__(self, agents: list[Agent]) -> None:
        self._agents = {agent.name: agent for agent in agents}

    def __iter__(self) -> Iterator[Agent]:
        return iter(self._agents.values())

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

    def __init__(self, specs: SpecSet, ledger: Ledger, servers: Servers) -> None:
        self._specs = specs
        self._ledger = ledger
        self._servers = servers
        self._controls: dict[AgentName, ControlSpec] = {}
        """Of the specs that are in the ledger: they don't change while this process runs."""
        self._resolving: dict[AgentName, asyncio.Task[ControlSpec]] = {}
        """A slow server is asked once, and goes on being asked when the try that began it is over."""

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
        control = self._controls.get(agent.name) or await self._resolved(agent)
        return None if control.digest == request.known_digest else control

    async def _resolved(self, agent: Agent) -> ControlSpec:
        task = self._resolving.get(agent.name)
        if task is None:
            task = self._resolving[agent.name] = asyncio.create_task(self._resolve(agent))
            task.add_done_callback(lambda done: self._finished(agent.name, done))
        done, _ = await asyncio.wait([task], timeout=_PATIENCE_SECONDS)
        if not done:
            raise activity_error(
                Remedy.RETRY_LATER,
                f"The MCP servers of agent {agent.spec.name} ({', '.join(agent.servers)}) have not listed their tools "
                f"within {_PATIENCE_SECONDS} s; they are waited for, and so does the agent's mail.",
            )
        return task.result()

    def _finished(self, name: AgentName, task: asyncio.Task[ControlSpec]) -> None:
        del self._resolving[name]
        if not task.cancelled() and not task.exception():
            self._controls[name] = task.result()

    async def _resolve(self, agent: Agent) -> ControlSpec:
        """The agent's spec with the tools of its MCP servers, as recorded; listed and recorded where they are not."""
        recorded = {name: await self._ledger.get_listing(agent.name, agent.version, name) for name in agent.servers}
        listings = {name: tools for name, tools in recorded.items() if tools is not None}
        missing = {name: agent.servers[name] for name in agent.servers if name not in listings}
        try:
            fresh = dict(zip(missing, await asyncio.gather(*map(self._listed, missing.values())), strict=True))
            agent.resolved({**listings, **fresh})  # what can't be used is not recorded: somebody will mend the server
            for name, tools in fresh.items():
                # Another worker may have been first.
                listings[name] = await self._ledger.put_listing(agent.name, agent.version, name, tools)
            resolved = agent.resolved(listings)
        except (NotRun, SpecError) as error:
            raise activity_error(
                Remedy.RETRY_LATER,
                f"Agent {agent.spec.name} waits for the tools of its MCP servers, and so does its mail: {error}",
            ) from error
        return resolved.control(await self._ledger.put_spec(resolved))

    async def _listed(self, server: McpSpec) -> list[ListedTool]:
        tools, faults = await self._servers.list_tools(server.mcp, server.server)
        for fault in faults:
            log.warning("MCP server %s: %s", server.mcp, fault)
        return tools


async def check_servers(specs: SpecSet, servers: Servers) -> tuple[dict[AgentName, ResolvedSpec], list[str]]:
    """Ask all MCP servers for their tools: the agents with these, and what is wrong, with file and line."""
    found: dict[AgentName, ResolvedSpec] = {}
    faults: list[str] = []

    async def check(agent: Agent) -> None:
        listings: dict[str, list[ListedTool]] = {}
        for name, server in agent.servers.items():
            try:
                listings[name], unusable = await servers.list_tools(name, server.server)
            except NotRun as error:
                faults.append(f"{agent.places[name]}: {error}")
            else:
                faults.extend(f"{agent.places[name]}: MCP server {name}: {fault}" for fault in unusable)
        if len(listings) < len(agent.servers):
            return
        try:
            found[agent.name] = agent.resolved(listings)
        except SpecError as error:
            faults.extend(str(error).splitlines())

    await asyncio.gather(*map(check, specs))
    return found, sorted(faults)


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
    agent = Agent(spec=spec, file=path, version=hashlib.sha256(path.read_bytes()).hexdigest())
    faults: list[str] = []
    for number, tool_spec in enumerate(spec.tools):
        place = document.place("tools", number)
        if isinstance(tool_spec, McpSpec):
            if tool_spec.mcp in agent.servers:
                faults.append(f"{place}: an MCP server named {tool_spec.mcp} is there already; give each its own name")
            agent.servers[tool_spec.mcp] = tool_spec
            agent.places[tool_spec.mcp] = place
            continue
        try:
            tool = load_tool(tool_spec.python, beside=path.parent)
            definition = define(tool_spec, tool)
        except ToolError as error:
            faults.append(f"{place}: {error}")
            continue
        if tool.name in agent.tools or tool.name == names.READ_RESULT:
            faults.append(f"{place}: a tool named {tool.name} is there already; tools of one agent need own names")
            continue
        agent.tools[tool.name] = tool
        agent.definitions.append(definition)
    faults += [f"{document.place(*place)}: {fault}" for place, fault in _add_sections(agent)]
    if spec.reply:
        try:
            agent.reply = resolve(spec.reply, beside=path.parent)
        except FormError as error:
            faults.append(f"{document.place('reply')}: {error}")
    if faults:
        raise SpecError("\n".join(faults))
    return agent


def _add_sections(agent: Agent) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Give the agent the tools that its memory and its wake-ups bring; what is wrong there, and in its schedules."""
    for fault in _add_memory(agent):
        yield ("memory",), fault
    for fault in _add_wake_ups(agent):
        yield ("wake_ups",), fault
    zones: list[tuple[tuple[str | int, ...], str]] = [
        (("schedules", number), schedule.time_zone) for number, schedule in enumerate(agent.spec.schedules)
    ]
    if agent.spec.quiet_hours:
        zones.append((("quiet_hours",), agent.spec.quiet_hours.time_zone))
    for place, zone in zones:
        if zone not in zoneinfo.available_timezones():
            yield place, f"no time zone is named {zone!r}; name one as in Europe/Lisbon"


def _add_memory(agent: Agent) -> Iterator[str]:
    """Give the agent the tools of its memory; what is wrong with that."""
    spec = agent.spec
    if spec.memory is None:
        return
    if spec.team is None and Scope.TEAM in {*spec.memory.read, *spec.memory.write}:
        yield "it names the scope team, and the agent is in none; say which with `team: NAME`, or leave the scope out"
    for tool in memory_tools(spec.memory, spec.team):
        if tool.name in agent.tools:
            yield f"it brings a tool {tool.name}; rename the one among the tools"
            continue
        agent.tools[tool.name] = tool
        agent.definitions.append(define(memory_tool_spec(tool), tool))


def _add_wake_ups(agent: Agent) -> Iterator[str]:
    """Give the agent the tools by which it wakes itself; what is wrong with that."""
    for definition in wake_ups.definitions() if agent.spec.wake_ups else []:
        if definition.name in agent.tools:
            yield f"it brings a tool {definition.name}; rename the one among the tools"
        agent.definitions.append(definition)
