"""`AlarmWorkflow`: wakes an agent that hibernates, when its next wake-up is due.

An agent that closes with wake-ups set leaves an alarm behind, one at a time, whose id is `names.alarm_id`. It waits,
and then hands the agent an empty delivery: which wake-ups are due only the agent knows.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from functools import partial

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names
    from workflows.messages import Alarm, Mail


@workflow.defn(name=names.ALARM_TYPE)
class AlarmWorkflow:
    """The alarm of one agent."""

    @workflow.init
    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._settings = 0

    @workflow.signal(name=names.SET_ALARM)
    def set(self, alarm: Alarm) -> None:
        """Wake the agent at another time: it has been awake, and closes again."""
        self._alarm = alarm
        self._settings += 1

    @workflow.run
    async def run(self, alarm: Alarm) -> None:  # noqa: ARG002  # `__init__` has taken it
        """Wait, and wake the agent; once more, if it is set again meanwhile."""
        while True:
            seen = self._settings
            left = self._alarm.due - workflow.now()
            if left > timedelta(0):
                with contextlib.suppress(TimeoutError):
                    await workflow.wait_condition(
                        partial(self._is_set_since, seen),
                        timeout=left,
                        timeout_summary="the agent's next wake-up",
                    )
                if workflow.info().is_continue_as_new_suggested():
                    workflow.continue_as_new(self._alarm)
                continue
            await workflow.execute_activity_method(
                interface.ClockActivities.deliver,
                Mail(workflow_id=self._alarm.workflow_id),
                summary="wake the agent",
                **interface.CLOCK,
            )
            if seen == self._settings:
                return

    def _is_set_since(self, seen: int) -> bool:
        return self._settings != seen
