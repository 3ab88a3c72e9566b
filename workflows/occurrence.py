"""`OccurrenceWorkflow`: one time that a schedule comes round.

Temporal starts it, and makes its id of the schedule's and the time; that id is the event's too, so that an agent takes
it once. It stays open until the agent has answered: what the schedule does meanwhile, its `overlap` says.
"""

from __future__ import annotations

import contextlib
from datetime import UTC

from temporalio import workflow
from temporalio.common import SearchAttributeKey

with workflow.unsafe.imports_passed_through():
    from workflows import interface, names
    from workflows.events import Event
    from workflows.messages import Mail, Occurrence

_SCHEDULED = SearchAttributeKey.for_datetime("TemporalScheduledStartTime")


@workflow.defn(name=names.OCCURRENCE_TYPE)
class OccurrenceWorkflow:
    """Brings an agent its event, and waits for the end of the turn that takes it."""

    def __init__(self) -> None:
        self._answered = False

    @workflow.signal(name=names.ANSWERED)
    def answered(self) -> None:
        """The agent has answered the event."""
        self._answered = True

    @workflow.run
    async def run(self, occurrence: Occurrence) -> None:
        """Hand over the event; wait for as long as the schedule says."""
        info = workflow.info()
        at = (info.typed_search_attributes.get(_SCHEDULED) or info.start_time).astimezone(UTC)
        event = Event(
            id=info.workflow_id,
            source=names.SCHEDULE_SOURCE,
            type=occurrence.type,
            subject=names.parse_workflow_id(occurrence.workflow_id).key,
            time=at,
            data={**occurrence.data, "scheduled_at": at.isoformat(timespec="seconds")},
        )
        await workflow.execute_activity_method(
            interface.ClockActivities.deliver,
            Mail(workflow_id=occurrence.workflow_id, events=[event]),
            summary=f"{occurrence.type} of {at:%Y-%m-%d %H:%M:%S}",
            **interface.CLOCK,
        )
        if occurrence.wait:
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self._answered, timeout=occurrence.wait, timeout_summary="it counts as answered then"
                )
