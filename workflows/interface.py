"""What an agent may ask of the world: the activities' signatures, and how each is called.

The workflow owns the signatures; `activities/` implements them. Beside each stands its options (timeouts, retries),
so that an operator finds every timeout in this file. Task queues are the exception: activities run on the agent's
own queue, model calls on `names.model_queue` of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta

from temporalio import activity
from temporalio.common import RetryPolicy
from typing_extensions import TypedDict

from workflows.budget import Lifted, LiftRecord
from workflows.messages import (
    Alarm,
    Approval,
    CloseRequest,
    CompactRequest,
    Decision,
    Mail,
    PublishRequest,
    Reply,
    ReplyRequest,
    ResultToKeep,
    RewindRecord,
    Rewound,
    SpecRequest,
    ThinkRequest,
    ToolRequest,
    ToolResult,
)
from workflows.quiet_hours import Hush, LookRequest
from workflows.spec import ControlSpec, ToolControl
from workflows.state import AgentState, Snapshot


class CallOptions(TypedDict, total=False):
    """How an activity is called: the part of Temporal's `ActivityConfig` that does not depend on the call."""

    schedule_to_close_timeout: timedelta
    start_to_close_timeout: timedelta
    heartbeat_timeout: timedelta
    retry_policy: RetryPolicy


class LocalCallOptions(TypedDict, total=False):
    """How a local activity is called."""

    start_to_close_timeout: timedelta
    retry_policy: RetryPolicy


HEARTBEAT = timedelta(seconds=10)
"""An activity that has not been heard of for so long is taken for dead, and made again elsewhere."""

THINK = CallOptions(
    start_to_close_timeout=timedelta(hours=6),  # a pool's own timeout ends a call; heartbeats notice a dead worker
    schedule_to_close_timeout=timedelta(days=1),  # then the turn fails, and its owner is told
    heartbeat_timeout=HEARTBEAT,
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=2)),
)
PUBLISH = CallOptions(
    start_to_close_timeout=timedelta(minutes=2),
    heartbeat_timeout=HEARTBEAT,
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30)),
)
LEDGER = CallOptions(
    start_to_close_timeout=timedelta(seconds=30),
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30)),
)
CLOCK = CallOptions(
    start_to_close_timeout=timedelta(seconds=30),
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30)),
)
REWIND = CallOptions(
    start_to_close_timeout=timedelta(minutes=30),  # all that is left behind is read, and that may be years
    heartbeat_timeout=HEARTBEAT,
    retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30)),
)
LEDGER_LOCAL = LocalCallOptions(
    start_to_close_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=3),
)
"""The first tries at a quick ledger call, within the workflow task; what fails here is made again under `LEDGER`."""


def tool_retries(tool: ToolControl) -> RetryPolicy:
    """How often a tool is tried: once when it must not be repeated, else as often as the spec says."""
    return RetryPolicy(
        initial_interval=timedelta(seconds=1),
        maximum_interval=timedelta(minutes=1),
        maximum_attempts=tool.attempts if tool.repeatable else 1,
    )


class ModelActivities(ABC):
    """Model calls; served by the model worker."""

    @activity.defn(name="think")
    @abstractmethod
    async def think(self, request: ThinkRequest) -> Decision:
        """Make one model call, record it in the ledger, and return what was decided.

        Idempotent on (workflow id, turn, step): a call that is recorded already is not made again.
        """

    @activity.defn(name="compact")
    @abstractmethod
    async def compact(self, request: CompactRequest) -> Decision:
        """Have the older part of the conversation summed up, and record that as a step of its own.

        Idempotent as `think` is. The decision has an error if the model would not do it.
        """


class ToolActivities(ABC):
    """The agent's tools; served by the agent worker."""

    @activity.defn(name="run_tool")
    @abstractmethod
    async def run_tool(self, request: ToolRequest) -> ToolResult:
        """Run one tool call. What the tool refuses is a result; what breaks is raised, and tried again if it may be."""

    @activity.defn(name="keep_result")
    @abstractmethod
    async def keep_result(self, result: ResultToKeep) -> str:
        """Keep an answer from outside; as much of it as the model is shown, and how it reads on."""


class LedgerActivities(ABC):
    """The agent's control state in the ledger; served by the agent worker."""

    @activity.defn(name="wake")
    @abstractmethod
    async def wake(self, workflow_id: str) -> AgentState | None:
        """The state an agent left when it was last open, or None when it is new."""

    @activity.defn(name="keep_snapshot")
    @abstractmethod
    async def keep_snapshot(self, snapshot: Snapshot) -> None:
        """Keep the state of an agent whose workflow is about to close."""

    @activity.defn(name="find_reply")
    @abstractmethod
    async def find_reply(self, request: ReplyRequest) -> Reply | None:
        """The reply of a turn that has ended, rebuilt from its entries."""

    @activity.defn(name="record_approval")
    @abstractmethod
    async def record_approval(self, approval: Approval) -> None:
        """Record what was decided about a call. Idempotent on the call's id: the first decision counts."""

    @activity.defn(name="close_step")
    @abstractmethod
    async def close_step(self, request: CloseRequest) -> Decision:
        """Record that a step's model call was given up, with what was new in it; from then on nothing else can be.

        If its answer was recorded before, that is what comes back. Idempotent on (workflow id, turn, step).
        """

    @activity.defn(name="record_rewind")
    @abstractmethod
    async def record_rewind(self, record: RewindRecord) -> Rewound:
        """Record a rewind or fork, with what it leaves behind; from then on the agent goes on behind that entry.

        Idempotent on the request's id, until the agent has taken another turn without having taken it in.
        """


class BudgetActivities(ABC):
    """What people allow agents beyond their limits; served by the agent worker."""

    @activity.defn(name="record_lift")
    @abstractmethod
    async def record_lift(self, record: LiftRecord) -> Lifted:
        """Allow more than a limit until its window ends, for all whom the limit is about.

        Idempotent on the request's id.
        """


class ClockActivities(ABC):
    """Waking agents; served by the agent worker."""

    @activity.defn(name="set_alarm")
    @abstractmethod
    async def set_alarm(self, alarm: Alarm) -> None:
        """Have the agent woken at this time, also if it hibernates; an alarm that was set before is changed."""

    @activity.defn(name="deliver")
    @abstractmethod
    async def deliver(self, mail: Mail) -> None:
        """Put events into an agent's mailbox, waking or starting it; durable when it returns."""

    @activity.defn(name="look_at_clock")
    @abstractmethod
    async def look_at_clock(self, request: LookRequest) -> Hush:
        """Whether it is quiet at a time, by the rules of the time zone as they are known now."""


class SpecActivities(ABC):
    """The agents' definitions; served by the agent worker."""

    @activity.defn(name="load_spec")
    @abstractmethod
    async def load_spec(self, request: SpecRequest) -> ControlSpec | None:
        """The agent's newest spec, or None when the known one is the newest."""


class PublishActivities(ABC):
    """Events out; served by the agent worker."""

    @activity.defn(name="publish")
    @abstractmethod
    async def publish(self, request: PublishRequest) -> None:
        """Put events on their topics, in order; returns when the broker has all of them."""
