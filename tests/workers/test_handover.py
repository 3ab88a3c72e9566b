"""What Temporal's refusals mean; the rest of ingest is tested on real servers, in tests/integration."""

from __future__ import annotations

import pytest
from temporalio.service import RPCError, RPCStatusCode

from workers.handover import Verdict, judge


@pytest.mark.parametrize(
    ("status", "message", "verdict"),
    [
        (RPCStatusCode.UNAVAILABLE, "connection refused", Verdict.RETRY),
        (RPCStatusCode.DEADLINE_EXCEEDED, "context deadline exceeded", Verdict.RETRY),
        (RPCStatusCode.RESOURCE_EXHAUSTED, "workflow is busy", Verdict.RETRY),
        (RPCStatusCode.INTERNAL, "", Verdict.RETRY),
        (RPCStatusCode.UNKNOWN, "", Verdict.RETRY),
        (RPCStatusCode.CANCELLED, "Timeout expired", Verdict.RETRY),
        (RPCStatusCode.ABORTED, "", Verdict.RETRY),
        (RPCStatusCode.FAILED_PRECONDITION, "", Verdict.RETRY),
        (RPCStatusCode.INVALID_ARGUMENT, "exceeded workflow execution limit for signal events", Verdict.RETRY),
        (RPCStatusCode.INVALID_ARGUMENT, "Workflow history size exceeds limit.", Verdict.RETRY),
        (RPCStatusCode.INVALID_ARGUMENT, "Blob data size exceeds limit.", Verdict.REFUSED),
        (RPCStatusCode.RESOURCE_EXHAUSTED, "grpc: received message larger than max (5 vs. 4)", Verdict.REFUSED),
        (
            RPCStatusCode.INVALID_ARGUMENT,
            "Namespace x has no mapping defined for search attribute PerennialTenant",
            Verdict.STOP,
        ),
        (RPCStatusCode.NOT_FOUND, "Namespace x is not found.", Verdict.STOP),
        (RPCStatusCode.PERMISSION_DENIED, "Request unauthorized.", Verdict.STOP),
        (RPCStatusCode.UNAUTHENTICATED, "", Verdict.STOP),
    ],
)
def test_only_what_lies_in_the_delivery_is_refused(status: RPCStatusCode, message: str, verdict: Verdict) -> None:
    """P4: a server that is down, slow or over its limits costs no event; a wrong setup stops the process."""
    assert judge(RPCError(message, status, b"")) is verdict
