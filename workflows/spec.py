"""The agent's definition, as written in a YAML file: `AgentSpec`.

    name: customer-service
    tenant: store
    instructions: You answer the customers of an online store ...
    tools:
      - python: activities.demo_store:look_up_order
    subscriptions:
      - topic: store.events
        types: ["store.customer.*"]

Files are read by `activities.specs`. Unknown fields are an error in a spec, so that a typing mistake is not silently
ignored; what the workflow carries is `ResolvedSpec`, whose unknown fields are ignored (DESIGN.md, "Contracts").
"""

from __future__ import annotations

from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
"""Lower-case letters, digits, dot, dash and underscore; 63 characters at most."""

TopicName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,249}$")]
"""A Kafka topic's name."""

KeyPath = Annotated[str, StringConstraints(pattern=r"^(subject|data(\.[^.\s]+)+)$")]
"""Where an event carries the agent's key: `subject`, or a dotted path into its data such as `data.order_id`."""

PythonPath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""A Python function, `module:function`; the module may also be a file beside the spec."""


class _Strict(BaseModel):
    """As people write it: an unknown field is a typing mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Carried(BaseModel):
    """As agents carry it: an unknown field was written by a newer release, and is ignored."""

    model_config = ConfigDict(frozen=True)


class ToolSpec(_Strict):
    """A tool the agent may call."""

    python: PythonPath
    """The function; its signature and docstring tell the model how to call it."""
    timeout_seconds: float = Field(60, gt=0, le=86_400)
    """How long one attempt may take."""
    repeatable: bool = True
    """Whether a call whose outcome is unknown may be made again, with the same idempotency key."""
    attempts: int = Field(5, ge=1, le=100)
    """How often a repeatable call is tried before its error is shown to the model."""


class Subscription(_Strict):
    """Which events of a topic wake the agent, and where they carry its key."""

    topic: TopicName
    types: list[str] = Field(default=["*"], min_length=1)
    """CloudEvents types; `*` stands for any text, as in `store.customer.*`."""
    key: KeyPath = "subject"

    def wants(self, event_type: str) -> bool:
        """Whether events of this type wake the agent."""
        return any(fnmatchcase(event_type, pattern) for pattern in self.types)


class BudgetSpec(_Carried):
    """What the agent may spend."""

    steps_per_turn: int = Field(10, ge=1, le=1000)
    """Model calls in one turn; in the last one the agent is offered no tools and has to answer."""


class MailboxSpec(_Carried):
    """How the agent takes its mail."""

    events_per_turn: int = Field(10, ge=1, le=100)
    """How many waiting events one turn takes, at most."""
    remember_ids: int = Field(2000, ge=10, le=20_000)
    """How many event ids the agent remembers to recognise duplicates: the de-duplication horizon."""


class ContextSpec(_Carried):
    """What of the conversation the model is shown."""

    tokens: int = Field(32_000, ge=1000)
    """Newest entries are shown as long as they fit into about this many tokens."""


class _BudgetSection(BudgetSpec, _Strict):
    pass


class _MailboxSection(MailboxSpec, _Strict):
    remember_ids: int = Field(2000, ge=1000, le=20_000)
    """More than ingest delivers again after a crash (`workers.flow.Limits.window_records`), from two partitions."""


class _ContextSection(ContextSpec, _Strict):
    pass


class AgentSpec(_Strict):
    """One agent's definition."""

    name: Name
    tenant: Name = "default"
    description: str = ""
    instructions: str = Field(min_length=1)
    route: Name = "default"
    """The route in models.yaml: which pools of model endpoints are tried, in order."""
    tools: list[ToolSpec] = Field(default_factory=list)
    subscriptions: list[Subscription] = Field(default_factory=list)
    budget: _BudgetSection = _BudgetSection()
    mailbox: _MailboxSection = _MailboxSection()
    context: _ContextSection = _ContextSection()
    hibernate_after_seconds: float | None = Field(None, gt=0)
    """After how long without mail the agent's workflow closes, keeping its snapshot; None: it stays open."""


class ToolDefinition(_Carried):
    """A tool as the model is told of it, and as the workflow runs it."""

    name: str
    description: str = ""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """JSON Schema of the arguments."""
    python: str
    timeout: timedelta = timedelta(seconds=60)
    repeatable: bool = True
    attempts: int = 5


class ResolvedSpec(_Carried):
    """A spec with its tools looked up: what the ledger keeps under its digest, and an entry refers to."""

    name: str
    tenant: str
    description: str = ""
    instructions: str
    route: str = "default"
    tools: list[ToolDefinition] = Field(default_factory=list)
    budget: BudgetSpec = BudgetSpec()
    mailbox: MailboxSpec = MailboxSpec()
    context: ContextSpec = ContextSpec()
    hibernate_after: timedelta | None = None

    def control(self, digest: str) -> ControlSpec:
        """What the workflow decides by; the digest is that of this spec."""
        return ControlSpec(
            digest=digest,
            budget=self.budget,
            mailbox=self.mailbox,
            hibernate_after=self.hibernate_after,
            tools={
                tool.name: ToolControl(timeout=tool.timeout, repeatable=tool.repeatable, attempts=tool.attempts)
                for tool in self.tools
            },
        )


class ToolControl(_Carried):
    """How the workflow runs one tool."""

    timeout: timedelta = timedelta(seconds=60)
    repeatable: bool = True
    attempts: int = 5


class ControlSpec(_Carried):
    """The part of a spec that the workflow decides by; small, since it is part of every agent's history."""

    digest: str
    """SHA-256 of the canonical encoding of the `ResolvedSpec`, under which the ledger keeps it."""
    budget: BudgetSpec = BudgetSpec()
    mailbox: MailboxSpec = MailboxSpec()
    hibernate_after: timedelta | None = None
    tools: dict[str, ToolControl] = Field(default_factory=dict)
