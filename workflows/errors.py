"""What to do about an error, decided once, as data.

    Remedy.RETRY_LATER      the same call may succeed later: Temporal retries it, after the server's Retry-After if any
    Remedy.RETRY_ELSEWHERE  another pool of the route may take the call; when none does, it is retried later
    Remedy.FINAL            no repetition helps: the turn fails, and the agent or its owner is told

Activities pick a remedy here and raise `activity_error`; the workflow reads the message with `failure_message`. What
an operator can mend (a wrong key, an empty account, a missing database) is never final: mail must not be lost to it.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum

from temporalio.exceptions import ActivityError, ApplicationError

NOT_RUN = "NotRun"
"""Type of the error of a tool call that certainly had no effect: it did not begin."""

_METHOD_NOT_FOUND = -32601  # of JSON-RPC
_INVALID_PARAMS = -32602
_TOO_MANY_REQUESTS = 429
_SERVER_ERRORS = 500
_TRANSIENT_CLIENT_ERRORS = frozenset({408, 409, 425})
_OPERATOR_MENDS = frozenset({401, 402, 403, 404})


class Remedy(StrEnum):
    """What helps against an error. The value is the `type` of the ApplicationError that carries it."""

    RETRY_LATER = "RetryLater"
    RETRY_ELSEWHERE = "RetryElsewhere"
    FINAL = "Final"


def remedy_for_status(status: int) -> Remedy:
    """The remedy for an HTTP status of a model server.

    429, 5xx and what an operator has to mend (401, 402, 403, 404) may work at another pool; 408, 409 and 425 pass by
    themselves; every other 4xx says that the request itself is wrong, which no repetition changes.
    """
    if status == _TOO_MANY_REQUESTS or status >= _SERVER_ERRORS or status in _OPERATOR_MENDS:
        return Remedy.RETRY_ELSEWHERE
    if status in _TRANSIENT_CLIENT_ERRORS:
        return Remedy.RETRY_LATER
    return Remedy.FINAL


def remedy_for_jsonrpc(code: int) -> Remedy:
    """The remedy for a JSON-RPC error of an MCP server.

    An unknown tool and wrong arguments are refused before anything was done, and would be again: the model is told.
    Every other error may pass; whether the call took effect is not known.
    """
    return Remedy.FINAL if code in {_METHOD_NOT_FOUND, _INVALID_PARAMS} else Remedy.RETRY_LATER


def activity_error(remedy: Remedy, message: str, *, retry_after: timedelta | None = None) -> ApplicationError:
    """The error to raise from an activity: retryable unless the remedy is final.

    Args:
        remedy: what helps.
        message: what was wrong, where, and what to do; an operator reads it in the Web UI.
        retry_after: how long the server asked to wait; used instead of the retry policy's next interval.
    """
    return ApplicationError(
        message, type=remedy.value, non_retryable=remedy is Remedy.FINAL, next_retry_delay=retry_after
    )


def failure_message(error: ActivityError) -> str:
    """What to tell the agent's owner about an activity that has failed for good."""
    cause = error.cause or error
    if isinstance(cause, ApplicationError) and cause.type in set(Remedy):
        return cause.message  # for people; the type is for Temporal
    return str(cause)
