"""The agent's definition, as written in a YAML file: `AgentSpec`.

    name: customer-service
    tenant: store
    instructions: You answer the customers of an online store ...
    tools:
      - python: activities.demo_store:look_up_order
      - python: activities.demo_store:refund
        approval: {rules: [{when: {amount_cents: {above: 20000}}, then: ask}], default: allow} # see workflows.approval
      - mcp: clock # an MCP server: a command of this machine, which is spoken to over stdio
        command: [mcp-server-time, --local-timezone, Europe/Lisbon]
      - mcp: crm # or one that is reached over streamable HTTP
        url: https://crm.internal/mcp
        headers: {Authorization: "Bearer ${CRM_TOKEN}"} # the variable's value stays out of the file
        only: [find_*, add_note]
        prefix: crm_
    context: {tokens: 24000, compact: true}
    memory:
      read: [key, tenant]
    wake_ups: {} # it may wake itself, at a time or when an event comes
    quiet_hours: {from: "22:00", to: "07:00", time_zone: Europe/Lisbon} # it begins no turn then
    schedules: # what comes to it by the clock, see workflows.schedule
      - {name: morning-review, cron: 0 8 * * mon-fri, time_zone: Europe/Lisbon, key: all, text: What came in?}
    reply: # answers are JSON that this schema describes
      schema: {type: object, properties: {urgent: {type: boolean}}, required: [urgent]}
    budget:
      limits:
        - {scope: key, per: day, turns: 200, usd: 5}
    subscriptions:
      - topic: store.events
        types: ["store.customer.*"]

Files are read by `activities.specs`. Unknown fields are an error in a spec, so that a typing mistake is not silently
ignored; what the workflow carries is `ResolvedSpec`, whose unknown fields are ignored (DESIGN.md, "Contracts").
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
    model_validator,
)

from workflows.approval import ApprovalPolicy, Condition, Rule
from workflows.budget import Limit
from workflows.quiet_hours import QuietHours
from workflows.schedule import ScheduleSpec
from workflows.steering import TurnRule

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
"""Lower-case letters, digits, dot, dash and underscore; 63 characters at most."""

TopicName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,249}$")]
"""A Kafka topic's name."""

KeyPath = Annotated[str, StringConstraints(pattern=r"^(subject|data(\.[^.\s]+)+)$")]
"""Where an event carries the agent's key: `subject`, or a dotted path into its data such as `data.order_id`."""

PythonPath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""A Python function or class, `module:name`; the module may also be a file beside the spec."""


VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")]
"""An environment variable of the agent workers."""

HeaderTemplate = Annotated[str, StringConstraints(pattern=r"\$\{[A-Za-z_]\w*\}")]
"""An HTTP header's value, such as `Bearer ${CRM_TOKEN}`: it names the environment variables that it is made with."""

Prefix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{0,32}$")]


class _Strict(BaseModel):
    """As people write it: an unknown field is a typing mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Carried(BaseModel):
    """As agents carry it: an unknown field was written by a newer release, and is ignored."""

    model_config = ConfigDict(frozen=True)


class _ConditionSection(Condition, _Strict):
    pass


class _RuleSection(Rule, _Strict):
    when: dict[str, _ConditionSection] = Field(min_length=1)  # type: ignore[assignment]  # read only


class ApprovalSection(ApprovalPolicy, _Strict):
    """An approval policy as people write it; `approval: ask` is short for `approval: {default: ask}`."""

    rules: list[_RuleSection] = Field(default_factory=list)  # type: ignore[assignment]  # read only
    remind_seconds: float | None = Field(None, ge=60)

    @property
    def policy(self) -> ApprovalPolicy:
        """What agents carry of it."""
        return ApprovalPolicy.model_validate(self.model_dump())

    @model_validator(mode="before")
    @classmethod
    def _short(cls, written: Any) -> Any:
        return {"default": written} if isinstance(written, str) else written


class ToolSpec(_Strict):
    """A tool the agent may call."""

    python: PythonPath
    """The function; its signature and docstring tell the model how to call it."""
    approval: ApprovalSection | None = None
    """Which calls wait for a human's decision; None: none."""
    answers: Literal["at once", "later"] = "at once"
    """Whether what the function returns is the answer, or the answer comes later from outside, with the idempotency key
    as the call's id: by `perennial tool complete`, the update `complete` or an event."""
    answer_within_seconds: float = Field(86_400, ge=1, le=366 * 86_400)
    """How long an answer from outside is waited for; then the outcome is unknown."""
    timeout_seconds: float = Field(60, gt=0, le=86_400)
    """How long one attempt may take."""
    repeatable: bool = True
    """Whether a call whose outcome is unknown may be made again, with the same idempotency key."""
    attempts: int = Field(5, ge=1, le=100)
    """How often a repeatable call is tried before its error is shown to the model."""
    polls: bool = False
    """Whether the model may ask the same again and again, such as whether something is done. Else a call that had the
    same result three times in a row is not made a fourth time in that turn."""


class McpServer(_Carried):
    """How an MCP server is reached: by a command or by a URL. It holds names of variables, never a secret."""

    command: list[str] = Field(default_factory=list)
    """The program to start and its arguments; it is spoken to over stdio. It is looked for beside Perennial's own
    Python first, then as a shell would; it runs in the folder of the specs, and each agent worker has one of its own,
    from its first use until the worker ends."""
    env: list[VariableName] = Field(default_factory=list)
    """Environment variables that the command is given, beside PATH, HOME and the like."""
    url: str = ""
    """The endpoint of a server that is spoken to over streamable HTTP."""
    headers: dict[str, HeaderTemplate] = Field(default_factory=dict)
    """Headers of each request, with environment variables in them, as in `Bearer ${CRM_TOKEN}`."""


class McpSpec(McpServer, _Strict):
    """The tools of an MCP server.

    They are listed once for each version of the YAML file, when an agent first needs it, and recorded in the ledger:
    agents go on with what was recorded while the server is away or changes. To have them listed anew, change the file.
    """

    mcp: Name
    """What the server is called here, in messages and in the ledger."""
    only: list[str] = Field(default=["*"], min_length=1)
    """Which of its tools are offered, by the server's names; `*` stands for any text."""
    prefix: Prefix = ""
    """Put before the names of its tools: two tools of one agent can't have one name."""
    timeout_seconds: float = Field(60, gt=0, le=86_400)
    """How long one attempt of a call may take."""
    approval: ApprovalSection | None = None
    """Which calls of these tools wait for a human's decision; None: none."""
    repeatable: bool | None = None
    """Whether a call whose outcome is unknown may be made again; None: where the server says so of the tool
    (`readOnlyHint` or `idempotentHint`), and else not. The idempotency key is in the request's `_meta`, under
    `perennial/idempotencyKey`; only a server that knows it makes use of it."""
    attempts: int = Field(5, ge=1, le=100)
    """How often a repeatable call is tried before its error is shown to the model."""
    polls: bool = False
    """Whether the model may ask the same again and again, see `ToolSpec.polls`."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server has either a command or a url")
        if self.command and self.headers:
            raise ValueError("headers go with a url; a command is given environment variables by env")
        if self.url and self.env:
            raise ValueError("env goes with a command; a url is given environment variables by headers")
        parts = urlsplit(self.url)
        if self.url and (parts.scheme not in {"http", "https"} or not parts.hostname):
            raise ValueError("the url is not http://host/path or https://host/path")
        if parts.username or parts.password:
            raise ValueError("the url holds a password, which does not belong in a file; use headers")
        return self

    def wants(self, tool: str) -> bool:
        """Whether the server's tool of this name is offered."""
        return any(fnmatchcase(tool, pattern) for pattern in self.only)

    @property
    def server(self) -> McpServer:
        """How the server is reached."""
        return McpServer(command=self.command, env=self.env, url=self.url, headers=self.headers)


def _kind(written: Any) -> str:
    is_mcp = isinstance(written, McpSpec) or (isinstance(written, dict) and "mcp" in written)
    return "<mcp>" if is_mcp else "<python>"


AnyToolSpec = Annotated[Annotated[ToolSpec, Tag("<python>")] | Annotated[McpSpec, Tag("<mcp>")], Discriminator(_kind)]
"""A Python function or an MCP server, told apart by the field that names it. (`documents` leaves the tags out.)"""


class Subscription(_Strict):
    """Which events of a topic wake the agent, and where they carry its key."""

    topic: TopicName
    types: list[str] = Field(default=["*"], min_length=1)
    """CloudEvents types; `*` stands for any text, as in `store.customer.*`."""
    key: KeyPath = "subject"
    start: Literal["earliest"] | AwareDatetime = "earliest"
    """Events that were written before this time are not for the agent; `earliest`: all are. A topic that was never read
    before is read from where its first subscription starts. One that is read already is not read again for an agent
    that comes later: `perennial ingest replay` brings it what was before."""

    def wants(self, event_type: str, written_ms: int = -1) -> bool:
        """Whether events of this type, written then (milliseconds since 1970; -1: not known), wake the agent."""
        if isinstance(self.start, datetime) and 0 <= written_ms < self.start.timestamp() * 1000:
            return False
        return any(fnmatchcase(event_type, pattern) for pattern in self.types)


class BudgetSpec(_Carried):
    """What the agent may spend."""

    steps_per_turn: int = Field(10, ge=1, le=1000)
    """Model calls in one turn; in the last one the agent is offered no tools and has to answer."""
    limits: tuple[Limit, ...] = ()
    """What may be spent, by whom and when; asked before each model call. An agent that may not go on waits."""


class MailboxSpec(_Carried):
    """How the agent takes its mail."""

    events_per_turn: int = Field(10, ge=1, le=100)
    """How many waiting events one turn takes, at most."""
    remember_ids: int = Field(2000, ge=10, le=20_000)
    """How many ids of events it has taken the agent remembers to recognise duplicates: the de-duplication horizon."""
    during_turn: tuple[TurnRule, ...] = ()
    """What new events do to a turn in progress; the first rule that fits decides, and without one they wait."""


class ContextSpec(_Carried):
    """What of the conversation the model is shown."""

    tokens: int = Field(32_000, ge=1000)
    """Newest entries are shown as long as they fit into about this many tokens."""
    compact: bool = False
    """Whether what would no longer fit is summed up by the model, in a step of its own, instead of being left out."""


class WakeUpsSpec(_Carried):
    """Whether the agent may wake itself: it is offered the tools wake_me, list_wake_ups and cancel_wake_up."""

    at_most: int = Field(20, ge=1, le=50)
    """How many wake-ups may be set at a time."""


class Scope(StrEnum):
    """Whose a fact is that an agent has kept: who may be reminded of it."""

    KEY = "key"
    """This agent with this key alone, such as one customer's."""
    AGENT = "agent"
    """This agent, whatever its key."""
    TEAM = "team"
    """Every agent of the tenant whose spec names the same team."""
    TENANT = "tenant"
    """Every agent of the tenant."""


class MemorySpec(_Carried):
    """What the agent may keep and be reminded of. An agent whose spec has no `memory` has none."""

    read: list[Scope] = [Scope.KEY]
    """The scopes whose facts it is reminded of, and may look through with the tool `recall`."""
    write: list[Scope] = [Scope.KEY]
    """The scopes that it may change with the tools `remember` and `forget`. What strangers write to an agent may end up
    in its memory: where they do, let it write to its key alone."""
    recalled: int = Field(8, ge=0, le=50)
    """Of how many facts it is reminded at the start of a turn, at most: those that are pinned, and those that fit what
    has arrived. 0: of none; it has to look itself."""
    characters: int = Field(2000, ge=1000, le=20_000)
    """How long these facts may be together."""


def _written(schema: Any) -> str:
    return "<file>" if isinstance(schema, str) else "<schema>"


WrittenSchema = Annotated[
    Annotated[str, Tag("<file>")] | Annotated[dict[str, JsonValue], Tag("<schema>")], Discriminator(_written)
]
"""JSON Schema; or a file with it, .json or .yaml, by its path from the folder of the spec."""


class ReplySpec(_Strict):
    """What the agent's answers have to look like: JSON that fits a schema."""

    model_config = ConfigDict(serialize_by_alias=True)  # so that it can be read again

    written: WrittenSchema | None = Field(None, alias="schema")
    pydantic: PythonPath | None = None
    """Or a pydantic model: its JSON Schema is taken when the spec is read. Validators written in Python are not run."""
    repairs: int = Field(2, ge=0, le=10)
    """How often an answer that does not fit is sent back to the model, in one turn; then the turn fails."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.written is None) == (self.pydantic is None):
            raise ValueError("give either a schema or a pydantic model")
        return self


class _LimitSection(Limit, _Strict):
    pass


class _BudgetSection(BudgetSpec, _Strict):
    limits: tuple[_LimitSection, ...] = ()

    @model_validator(mode="after")
    def _names_no_limit_twice(self) -> Self:
        named = [(limit.scope.value, limit.per.value) for limit in self.limits]
        twice = sorted({f"{scope} per {per}" for scope, per in named if named.count((scope, per)) > 1})
        if twice:
            raise ValueError(f"there are two limits for {', '.join(twice)}; write them as one")
        return self


class _TurnRuleSection(TurnRule, _Strict):
    pass


class _MailboxSection(MailboxSpec, _Strict):
    during_turn: tuple[_TurnRuleSection, ...] = ()
    remember_ids: int = Field(2000, ge=1000, le=20_000)
    """More than ingest delivers again after a crash (`workers.flow.Limits.window_records`), from two partitions."""


class _ContextSection(ContextSpec, _Strict):
    pass


class _MemorySection(MemorySpec, _Strict):
    pass


class _QuietHoursSection(QuietHours, _Strict):
    pass


class _WakeUpsSection(WakeUpsSpec, _Strict):
    pass


class AgentSpec(_Strict):
    """One agent's definition."""

    name: Name
    tenant: Name = "default"
    team: Name | None = None
    """The agents of the tenant that name the same team may share facts (`memory`). None: it is in no team."""
    description: str = ""
    instructions: str = Field(min_length=1)
    route: Name = "default"
    """The route in models.yaml: which pools of model endpoints are tried, in order."""
    tools: list[AnyToolSpec] = Field(default_factory=list)
    subscriptions: list[Subscription] = Field(default_factory=list)
    budget: _BudgetSection = _BudgetSection()
    mailbox: _MailboxSection = _MailboxSection()
    context: _ContextSection = _ContextSection()
    memory: _MemorySection | None = None
    """What it may keep and be reminded of, beyond its conversation; `memory: {}` is the usual. None: nothing."""
    schedules: list[ScheduleSpec] = Field(default_factory=list)
    """What comes to it by the clock."""
    quiet_hours: _QuietHoursSection | None = None
    """When it begins no turn, save for questions by people and the types that are excepted."""
    wake_ups: _WakeUpsSection | None = None
    """How it may wake itself, at a time or when an event comes; `wake_ups: {}` is the usual. None: not at all."""
    reply: ReplySpec | None = None
    """What its answers have to look like. None: they are text."""
    stream: bool = False
    """Whether what the model says is told on `agents.stream` as it says it."""
    order: Literal["relaxed", "strict"] = "relaxed"
    """What becomes of later events when one that may have been for the agent was dead-lettered: they are taken, or they
    wait (`strict`) until it is redriven or dropped. Whose a record was that can't be read, only its key says: with
    `strict`, producers set the record's key to the agent's."""
    hibernate_after_seconds: float | None = Field(None, gt=0)
    """After how long without mail the agent's workflow closes, keeping its snapshot; None: it stays open."""

    @model_validator(mode="after")
    def _names_no_schedule_twice(self) -> Self:
        named = [schedule.name for schedule in self.schedules]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise ValueError(f"there are two schedules named {', '.join(twice)}; give each its own name")
        return self


class ListedTool(_Carried):
    """A tool as an MCP server lists it: what is recorded of it."""

    name: str
    description: str = ""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """JSON Schema of the arguments."""
    repeatable: bool = False
    """The server says that it only reads, or that a repetition has no further effect."""


class McpTool(_Carried):
    """Where a tool of an MCP server is found: the server's name in the spec, and the server's name of the tool."""

    server: str
    tool: str


class ToolDefinition(_Carried):
    """A tool as the model is told of it, and as the workflow runs it."""

    name: str
    description: str = ""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """JSON Schema of the arguments."""
    python: str = ""
    """The function, if it is one."""
    mcp: McpTool | None = None
    """The tool of an MCP server, if it is one."""
    built_in: bool = False
    """It is about the agent itself: the workflow runs it, not an activity."""
    timeout: timedelta = timedelta(seconds=60)
    repeatable: bool = True
    attempts: int = 5
    polls: bool = False
    approval: ApprovalPolicy | None = None
    answer_within: timedelta | None = None
    """How long an answer from outside is waited for; None: what the tool returns is the answer."""


class ReplyForm(_Carried):
    """What answers have to look like, as the model is told of it and `think` checks it."""

    json_schema: dict[str, JsonValue]
    repairs: int = 2


class ResolvedSpec(_Carried):
    """A spec with its tools looked up: what the ledger keeps under its digest, and an entry refers to."""

    name: str
    tenant: str
    team: str | None = None
    description: str = ""
    instructions: str
    route: str = "default"
    tools: list[ToolDefinition] = Field(default_factory=list)
    servers: dict[str, McpServer] = Field(default_factory=dict)
    """The MCP servers that the tools are of, by their names in the spec."""
    budget: BudgetSpec = BudgetSpec()
    mailbox: MailboxSpec = MailboxSpec()
    context: ContextSpec = ContextSpec()
    memory: MemorySpec | None = None
    wake_ups: WakeUpsSpec | None = None
    quiet_hours: QuietHours | None = None
    reply: ReplyForm | None = None
    stream: bool = False
    hibernate_after: timedelta | None = None

    def control(self, digest: str) -> ControlSpec:
        """What the workflow decides by; the digest is that of this spec."""
        return ControlSpec(
            digest=digest,
            budget=self.budget,
            mailbox=self.mailbox,
            hibernate_after=self.hibernate_after,
            compact=self.context.compact,
            repairs=self.reply.repairs if self.reply else 0,
            wake_ups=self.wake_ups,
            quiet_hours=self.quiet_hours,
            tools={
                tool.name: ToolControl(
                    timeout=tool.timeout,
                    repeatable=tool.repeatable,
                    attempts=tool.attempts,
                    polls=tool.polls,
                    approval=tool.approval,
                    answer_within=tool.answer_within,
                    built_in=tool.built_in,
                )
                for tool in self.tools
            },
        )


class ToolControl(_Carried):
    """How the workflow runs one tool."""

    timeout: timedelta = timedelta(seconds=60)
    repeatable: bool = True
    attempts: int = 5
    polls: bool = False
    approval: ApprovalPolicy | None = None
    answer_within: timedelta | None = None
    built_in: bool = False

    @property
    def may_wait(self) -> bool:
        """Whether a call may wait for people, or for an answer from outside."""
        return self.approval is not None or self.answer_within is not None


class ControlSpec(_Carried):
    """The part of a spec that the workflow decides by; small, since it is part of every agent's history."""

    digest: str
    """SHA-256 of the canonical encoding of the `ResolvedSpec`, under which the ledger keeps it."""
    budget: BudgetSpec = BudgetSpec()
    mailbox: MailboxSpec = MailboxSpec()
    hibernate_after: timedelta | None = None
    compact: bool = False
    repairs: int = 0
    """How often an answer that does not fit its schema may be sent back in one turn."""
    wake_ups: WakeUpsSpec | None = None
    quiet_hours: QuietHours | None = None
    tools: dict[str, ToolControl] = Field(default_factory=dict)
