"""Entries: what the ledger keeps of each step, and how an entry gets its id. Pure.

An entry holds the messages that were new in a step and the model's answer to them; its parent is the entry before it.
Its id is the SHA-256 of its canonical encoding (RFC 8785), parent included, so an entry cannot be changed without
changing its id and those of all entries after it (DESIGN.md, P8). The format of version 1 may never change.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field

from workflows.events import EventReference
from workflows.messages import ToolCall, ToolOutcome, Usage
from workflows.spec import Scope


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class UserMessage(_Record):
    """An event, as the model was shown it."""

    role: Literal["user"] = "user"
    text: str


class AssistantMessage(_Record):
    """The model's answer."""

    role: Literal["assistant"] = "assistant"
    text: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    vendor: str | None = None
    """What the answer holds beyond text and tool calls (thinking, signatures), as the model library's own JSON."""


class ToolMessage(_Record):
    """The result of a tool call, as the model was shown it."""

    role: Literal["tool"] = "tool"
    call_id: str
    name: str
    content: str
    outcome: ToolOutcome = ToolOutcome.OK


class Fact(_Record):
    """Something an agent chose to keep, and where it comes from. Entries hold it: no field is ever added."""

    id: str
    text: str
    scope: Scope
    pinned: bool
    """Whether it is recalled in every turn, whatever that is about."""
    workflow_id: str
    """The agent that kept it."""
    turn: int
    entry: str | None
    """The entry in which it was decided to keep it."""
    kept_at: str
    """UTC, ISO 8601."""


class MemoryMessage(_Record):
    """What the agent was reminded of when a turn began, as the model was shown it."""

    role: Literal["memory"] = "memory"
    facts: list[Fact]


class SummaryMessage(_Record):
    """What the agent has put in the place of the older part of its conversation, in its own words."""

    role: Literal["summary"] = "summary"
    text: str
    """Empty if the entry's error says why there is none."""
    through: str
    """The newest of the entries that it stands for; together with the summary before it, it stands for all before."""


class RepairMessage(_Record):
    """What was wrong with the answer of the step before, as the model was shown it."""

    role: Literal["repair"] = "repair"
    text: str


class InterruptMessage(_Record):
    """Why the step was given up before the model had answered, as the model is shown it."""

    role: Literal["interrupt"] = "interrupt"
    text: str
    cancelled: bool = False
    """Whether the turn ended with it."""


Message = Annotated[
    UserMessage | AssistantMessage | ToolMessage | MemoryMessage | SummaryMessage | RepairMessage | InterruptMessage,
    Field(discriminator="role"),
]


class Entry(_Record):
    """One step of an agent, immutable. `parent` is the entry before it; None for the first of its life."""

    version: Literal[1] = 1
    workflow_id: str
    turn: int
    step: int
    parent: str | None
    messages: list[Message]
    """What was new in this step, the model's answer last; no answer when `error`, or an interruption, says why."""
    answers: list[EventReference] = Field(default_factory=list)
    """The events that were new in this step: why it was taken."""
    spec_digest: str = ""
    model: str = ""
    rehearsal: bool = False
    usage: Usage = Usage()
    error: str | None = None
    recorded_at: str
    """UTC, ISO 8601."""

    @property
    def id(self) -> str:
        """SHA-256 of the canonical encoding, in hexadecimal."""
        return hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        """The canonical encoding (RFC 8785), which is hashed and stored."""
        return canonical(self)

    @property
    def answer(self) -> AssistantMessage | None:
        """The model's answer, if there is one."""
        last = self.messages[-1] if self.messages else None
        return last if isinstance(last, AssistantMessage) else None

    @property
    def summary(self) -> SummaryMessage | None:
        """What this step has put in the place of what was before, if that is what it did or tried to do."""
        last = self.messages[-1] if self.messages else None
        return last if isinstance(last, SummaryMessage) else None

    @property
    def interruption(self) -> InterruptMessage | None:
        """Why this step was given up, if it was."""
        last = self.messages[-1] if self.messages else None
        return last if isinstance(last, InterruptMessage) else None


def canonical(model: BaseModel) -> bytes:
    """The canonical JSON of a model (RFC 8785): one encoding for one content, whatever the order of its fields."""
    return rfc8785.dumps(model.model_dump(mode="json"))
