"""P11: an error is classified once, in one place."""

from __future__ import annotations

from datetime import timedelta

import pytest
from temporalio.exceptions import ActivityError, ApplicationError, RetryState

from workflows.errors import Remedy, activity_error, failure_message, remedy_for_status


@pytest.mark.parametrize("status", [401, 402, 403, 404, 429, 500, 502, 503, 504, 529])
def test_another_pool_may_take_what_this_one_refuses(status: int) -> None:
    """Over its limit, broken, or in need of an operator: elsewhere it may work."""
    assert remedy_for_status(status) is Remedy.RETRY_ELSEWHERE


@pytest.mark.parametrize("status", [408, 409, 425])
def test_what_passes_by_itself_is_tried_again_later(status: int) -> None:
    """A timeout or a conflict says nothing about the request."""
    assert remedy_for_status(status) is Remedy.RETRY_LATER


@pytest.mark.parametrize("status", [400, 405, 413, 415, 422, 451])
def test_a_wrong_request_is_final(status: int) -> None:
    """The same request would be refused again, and paid for each time."""
    assert remedy_for_status(status) is Remedy.FINAL


def test_what_an_operator_can_mend_is_never_final() -> None:
    """Mail is not lost to a wrong key or an empty account."""
    assert Remedy.FINAL not in {remedy_for_status(status) for status in (401, 402, 403, 404)}


@pytest.mark.parametrize(
    ("remedy", "text", "retryable"),
    [
        (Remedy.RETRY_LATER, "RetryLater", True),
        (Remedy.RETRY_ELSEWHERE, "RetryElsewhere", True),
        (Remedy.FINAL, "Final", False),
    ],
)
def test_temporal_acts_on_the_remedy(remedy: Remedy, text: str, *, retryable: bool) -> None:
    """The type is recorded in histories, so its text never changes; only what is final is not retried."""
    error = activity_error(remedy, "what was wrong", retry_after=timedelta(seconds=7))
    assert error.type == text
    assert error.non_retryable is not retryable
    assert error.next_retry_delay == timedelta(seconds=7)
    assert str(error) == f"{text}: what was wrong"


def _failed(cause: BaseException | None) -> ActivityError:
    error = ActivityError(
        "Activity task failed",
        scheduled_event_id=1,
        started_event_id=2,
        identity="worker",
        activity_type="think",
        activity_id="1",
        retry_state=RetryState.NON_RETRYABLE_FAILURE,
    )
    error.__cause__ = cause
    return error


def test_the_owner_is_told_the_cause() -> None:
    """Not "Activity task failed", but what the activity said; that only when it said nothing."""
    assert "400: no such model" in failure_message(_failed(ApplicationError("400: no such model", type="Final")))
    assert failure_message(_failed(None)) == "Activity task failed"
