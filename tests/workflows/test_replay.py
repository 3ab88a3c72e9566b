"""Today's workflow code decides what it decided when these histories were made (STYLE.md, practice 13).

When a test here fails, an agent that runs now would get stuck after a deploy: put the change under
`workflow.patched`. `record_histories.py` records new lives.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from temporalio import workflow
from temporalio.client import WorkflowHistory
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner, WorkflowRunner
from typing_extensions import override

from workers.wiring import workflow_runner
from workflows import names
from workflows.agent import AgentWorkflow
from workflows.alarm import AlarmWorkflow
from workflows.messages import Decision
from workflows.occurrence import OccurrenceWorkflow
from workflows.state import AgentInput, CurrentTurn
from workflows.turn import Turns

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))
LIVES = (
    "plain",
    "tools",
    "duplicates",
    "question",
    "steered",
    "continued",
    "failed",
    "cancelled",
    "hibernated",
    "held",
    "rewound",
    "forked",
    "compacted",
    "repaired",
    "over_budget",
    "approved",
    "refused",
    "late",
    "unanswered",
    "woken",
    "alarmed",
    "alarmed_alarm",
    "speechless",
    "looping",
    "joined",
    "interrupted",
    "drained",
    "scheduled",
    "scheduled_occurrence_1",
    "scheduled_occurrence_2",
    "quiet",
)


class SilentTurns(Turns):
    @override
    def _end_turn(self, turn: CurrentTurn, decision: Decision) -> None:
        super()._end_turn(turn, decision)
        self._state.outbox.clear()


@workflow.defn(name=names.WORKFLOW_TYPE)
class Silent(AgentWorkflow):
    """An agent that decides otherwise: it takes its turns and never replies."""

    @workflow.init
    def __init__(self, start: AgentInput | None = None) -> None:
        super().__init__(start)
        self._turns = SilentTurns(self._life)

    @override
    @workflow.run
    async def run(self, start: AgentInput | None = None) -> None:
        await super().run(start)


def history(file: Path) -> WorkflowHistory:
    """A recorded history, under the workflow id it was recorded with."""
    text = file.read_text(encoding="utf-8")
    started = json.loads(text)["events"][0]["workflowExecutionStartedEventAttributes"]
    return WorkflowHistory.from_json(started["workflowId"], text)


async def replay(file: Path, agent: type[AgentWorkflow], runner: WorkflowRunner) -> None:
    workflows = [agent, AlarmWorkflow, OccurrenceWorkflow]
    replayer = Replayer(workflows=workflows, data_converter=pydantic_data_converter, workflow_runner=runner)
    await replayer.replay_workflow(history(file))


def test_every_kind_of_life_is_recorded() -> None:
    """The names of the histories say what is covered; a continued life has several runs."""
    recorded = [file.stem.rpartition("-")[0] for file in HISTORIES]
    assert set(LIVES) <= set(recorded)
    assert recorded.count("continued") >= 3


@pytest.mark.parametrize("file", HISTORIES, ids=lambda file: file.stem)
async def test_a_recorded_history_replays(file: Path) -> None:
    """P6: a worker of today takes over an agent from a worker of then."""
    await replay(file, AgentWorkflow, workflow_runner())


async def test_a_workflow_that_decides_otherwise_does_not_replay() -> None:
    """The tests above can fail: an agent without replies does not fit a history with one."""
    file = next(file for file in HISTORIES if file.stem == "plain-1")
    await replay(file, AgentWorkflow, UnsandboxedWorkflowRunner())
    with pytest.raises(workflow.NondeterminismError):
        await replay(file, Silent, UnsandboxedWorkflowRunner())
