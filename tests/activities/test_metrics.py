"""Metrics: names and labels that dashboards and alerts rely on, and what each function counts."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from activities import metrics
from workflows.messages import Usage

GOLDEN = {
    "perennial_events_received_total": ("topic",),
    "perennial_events_accepted_total": ("topic",),
    "perennial_events_skipped_total": ("topic",),
    "perennial_events_duplicate_total": ("agent",),
    "perennial_dead_letters_total": ("reason",),
    "perennial_delivery_seconds": (),
    "perennial_delivery_events": (),
    "perennial_ingest_lag_records": ("topic", "partition"),
    "perennial_ingest_in_flight_deliveries": (),
    "perennial_ingest_assigned_partitions": (),
    "perennial_ingest_oldest_unacknowledged_seconds": ("topic", "partition"),
    "perennial_ingest_paused_seconds_total": ("topic",),
    "perennial_ingest_rebalances_total": (),
    "perennial_ingest_commit_failures_total": ("reason",),
    "perennial_delivery_failures_total": ("status",),
    "perennial_events_repeated_total": ("agent",),
    "perennial_turns_total": ("agent", "outcome"),
    "perennial_turn_seconds": ("agent",),
    "perennial_replies_total": ("agent",),
    "perennial_tool_calls_total": ("tool", "outcome"),
    "perennial_approvals_total": ("agent", "outcome"),
    "perennial_tool_call_seconds": ("tool",),
    "perennial_tool_hung_threads": ("tool",),
    "perennial_model_calls_total": ("pool", "model", "outcome"),
    "perennial_model_call_seconds": ("pool", "model"),
    "perennial_compactions_total": ("outcome",),
    "perennial_reply_repairs_total": ("outcome",),
    "perennial_stream_records_total": ("outcome",),
    "perennial_tokens_total": ("pool", "model", "direction"),
    "perennial_spend_usd_total": ("agent", "pool"),
    "perennial_budget_refusals_total": ("agent", "scope", "measure"),
}
LABELS = {
    "topic",
    "agent",
    "reason",
    "status",
    "partition",
    "outcome",
    "tool",
    "pool",
    "model",
    "direction",
    "scope",
    "measure",
}
"""Closed sets; never an agent's key, an event's id or an error's text."""


def defined() -> dict[str, tuple[str, ...]]:
    """The metrics of the module: name on the wire, labels."""
    ours = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    return {
        metric._name + ("_total" if metric._type == "counter" else ""): tuple(metric._labelnames) for metric in ours
    }


def value(name: str, **labels: str) -> float:
    """What the registry has of a sample."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_names_and_labels_never_change() -> None:
    """Dashboards and alerts name them."""
    assert defined() == GOLDEN


def test_names_follow_the_conventions_and_labels_are_bounded() -> None:
    """Prometheus: our prefix, base units at the end, `_total` for what only grows."""
    for name, labels in defined().items():
        assert re.fullmatch(
            r"perennial(_[a-z]+)+_(total|seconds|events|records|deliveries|partitions|threads)", name
        ), name
        assert set(labels) <= LABELS, name


def test_every_metric_says_what_it_is() -> None:
    """The scrape address carries a sentence of help for each."""
    text = generate_latest(REGISTRY).decode()
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, flags=re.MULTILINE))
    for name in GOLDEN:
        assert helps[name].endswith("."), name


X = uuid.uuid4().hex
"""A label's value that nothing else in this process counts under."""


@pytest.mark.parametrize(
    ("count", "name", "labels", "by"),
    [
        (lambda: metrics.events_received(X, 3), "perennial_events_received_total", {"topic": X}, 3),
        (lambda: metrics.events_accepted(X), "perennial_events_accepted_total", {"topic": X}, 1),
        (lambda: metrics.skipped(X), "perennial_events_skipped_total", {"topic": X}, 1),
        (lambda: metrics.duplicate(X), "perennial_events_duplicate_total", {"agent": X}, 1),
        (lambda: metrics.dead_letter(X), "perennial_dead_letters_total", {"reason": X}, 1),
        (lambda: metrics.delivery(4, 0.5), "perennial_delivery_events_sum", {}, 4),
        (lambda: metrics.delivery(4, 0.5), "perennial_delivery_seconds_sum", {}, 0.5),
        (lambda: metrics.repeated(X, 3), "perennial_events_repeated_total", {"agent": X}, 3),
        (lambda: metrics.paused(X, 1.5), "perennial_ingest_paused_seconds_total", {"topic": X}, 1.5),
        (lambda: metrics.rebalanced(3), "perennial_ingest_rebalances_total", {}, 1),
        (lambda: metrics.commit_failed(X), "perennial_ingest_commit_failures_total", {"reason": X}, 1),
        (lambda: metrics.delivery_failed(X), "perennial_delivery_failures_total", {"status": X}, 1),
        (lambda: metrics.turn(X, "completed", 2), "perennial_turns_total", {"agent": X, "outcome": "completed"}, 1),
        (lambda: metrics.turn(X, "failed", 2), "perennial_turn_seconds_sum", {"agent": X}, 2),
        (lambda: metrics.reply(X), "perennial_replies_total", {"agent": X}, 1),
        (lambda: metrics.tool_call(X, "ok", 2), "perennial_tool_calls_total", {"tool": X, "outcome": "ok"}, 1),
        (lambda: metrics.tool_call(X, "ok", 2), "perennial_tool_call_seconds_sum", {"tool": X}, 2),
        (lambda: metrics.hung_threads(X, 2), "perennial_tool_hung_threads", {"tool": X}, 2),
        (lambda: metrics.approval(X, "approved"), "perennial_approvals_total", {"agent": X, "outcome": "approved"}, 1),
        (lambda: metrics.delta(X), "perennial_stream_records_total", {"outcome": X}, 1),
        (lambda: metrics.reply_repair(X), "perennial_reply_repairs_total", {"outcome": X}, 1),
        (
            lambda: metrics.model_call(X, "m", "ok", 2),
            "perennial_model_calls_total",
            {"pool": X, "model": "m", "outcome": "ok"},
            1,
        ),
        (
            lambda: metrics.model_call(X, "m", "ok", 2),
            "perennial_model_call_seconds_sum",
            {"pool": X, "model": "m"},
            2,
        ),
        (lambda: metrics.compaction(X), "perennial_compactions_total", {"outcome": X}, 1),
        (
            lambda: metrics.tokens(X, "m", Usage(input_tokens=7, output_tokens=2)),
            "perennial_tokens_total",
            {"pool": X, "model": "m", "direction": "input"},
            7,
        ),
        (
            lambda: metrics.tokens(X, "m", Usage(input_tokens=7, output_tokens=2)),
            "perennial_tokens_total",
            {"pool": X, "model": "m", "direction": "output"},
            2,
        ),
    ],
)
def test_what_happens_is_counted(count: Callable[[], None], name: str, labels: dict[str, str], by: float) -> None:
    """Each function adds to the metric it is named after."""
    before = value(name, **labels)
    count()
    assert value(name, **labels) - before == by


def test_gauges_say_how_it_is_now() -> None:
    """Set, not added."""
    for records in (5, 2):
        metrics.ingest_lag(X, 3, records)
        assert value("perennial_ingest_lag_records", topic=X, partition="3") == records
    for deliveries in (4, 0):
        metrics.in_flight(deliveries)
        assert value("perennial_ingest_in_flight_deliveries") == deliveries
    oldest = {"topic": X, "partition": "3"}
    for ago in (500, 0):
        metrics.oldest_unacknowledged(X, 3, int((time.time() - ago) * 1000))
        assert ago <= value("perennial_ingest_oldest_unacknowledged_seconds", **oldest) < ago + 100
    for nothing in (None, -1):
        metrics.oldest_unacknowledged(X, 3, nothing)
        assert value("perennial_ingest_oldest_unacknowledged_seconds", **oldest) == 0
    metrics.not_ours(X, 3)
    assert REGISTRY.get_sample_value("perennial_ingest_lag_records", oldest) is None, "another member tells of it"
    metrics.not_ours(X, 3)
    for partitions in (4, 2):
        metrics.rebalanced(partitions)
        assert value("perennial_ingest_assigned_partitions") == partitions
