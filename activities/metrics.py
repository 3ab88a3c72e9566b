"""Every metric of ours: name, unit, labels, buckets. Call the functions; they are safe from any thread.

Names and units follow Prometheus' conventions (base units, `_total` for counters). Labels are closed sets: topics,
outcomes, reasons, pools, models and agents' names (as many as there are specs); never an agent's key, an event's id or
an error's text. Workflow code does not count anything: replay would count twice.
"""

from __future__ import annotations

import contextlib
import time

from prometheus_client import Counter, Gauge, Histogram

from workflows.messages import Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_EVENTS_RECEIVED = Counter("perennial_events_received_total", "Records read from Kafka.", ["topic"])
_EVENTS_ACCEPTED = Counter("perennial_events_accepted_total", "Events durably handed to an agent.", ["topic"])
_EVENTS_SKIPPED = Counter("perennial_events_skipped_total", "Events of a shared topic that no agent wants.", ["topic"])
_EVENTS_DUPLICATE = Counter("perennial_events_duplicate_total", "Events an agent had seen before.", ["agent"])
_DEAD_LETTERS = Counter("perennial_dead_letters_total", "Records written to the dead-letter topic.", ["reason"])
_DELIVERY_SECONDS = Histogram(
    "perennial_delivery_seconds", "Time Temporal took to accept a delivery.", buckets=_SECONDS
)
_DELIVERY_EVENTS = Histogram(
    "perennial_delivery_events", "Events in one delivery.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500)
)
_INGEST_LAG = Gauge("perennial_ingest_lag_records", "Records not yet accepted.", ["topic", "partition"])
_ASSIGNED = Gauge("perennial_ingest_assigned_partitions", "Partitions that this ingest worker reads.")
_IN_FLIGHT = Gauge("perennial_ingest_in_flight_deliveries", "Deliveries waiting for Temporal.")
_OLDEST = Gauge(
    "perennial_ingest_oldest_unacknowledged_seconds",
    "Age of the oldest record that is read and not yet durable.",
    ["topic", "partition"],
)
_PAUSED = Counter("perennial_ingest_paused_seconds_total", "Time in which a partition's window was full.", ["topic"])
_REBALANCES = Counter("perennial_ingest_rebalances_total", "Times the group has given us partitions anew.")
_COMMIT_FAILURES = Counter(
    "perennial_ingest_commit_failures_total", "Commits that did not succeed; their records may come again.", ["reason"]
)
_DELIVERY_FAILURES = Counter(
    "perennial_delivery_failures_total", "Deliveries that Temporal did not take at once, by gRPC status.", ["status"]
)
_EVENTS_REPEATED = Counter(
    "perennial_events_repeated_total",
    "Events taken again: sent again when the agent had forgotten them (mailbox.remember_ids).",
    ["agent"],
)

_TURNS = Counter("perennial_turns_total", "Turns that ended.", ["agent", "outcome"])
_TURN_SECONDS = Histogram(
    "perennial_turn_seconds", "From taking a turn's events to deciding its answer.", ["agent"], buckets=_SECONDS
)
_REPLIES = Counter("perennial_replies_total", "Replies published.", ["agent"])
_TOOL_CALLS = Counter("perennial_tool_calls_total", "Tool calls that ended.", ["tool", "outcome"])
_APPROVALS = Counter(
    "perennial_approvals_total",
    "Tool calls that wait for a human's decision, or have waited; outcome: requested, approved or refused.",
    ["agent", "outcome"],
)
_TOOL_SECONDS = Histogram("perennial_tool_call_seconds", "Duration of a tool call.", ["tool"], buckets=_SECONDS)
_HUNG = Gauge(
    "perennial_tool_hung_threads", "Calls of sync tools that were given up and have not returned since.", ["tool"]
)

_MODEL_CALLS = Counter("perennial_model_calls_total", "Model calls that ended.", ["pool", "model", "outcome"])
_MODEL_SECONDS = Histogram(
    "perennial_model_call_seconds", "Duration of a model call.", ["pool", "model"], buckets=_SECONDS
)
_COMPACTIONS = Counter(
    "perennial_compactions_total", "Conversations that were summed up, or could not be.", ["outcome"]
)
_TOKENS = Counter("perennial_tokens_total", "Tokens used by model calls.", ["pool", "model", "direction"])
_REPAIRS = Counter(
    "perennial_reply_repairs_total",
    "Answers that were sent back, being empty or unfit; outcome: fits, unfit, or other (tools were called).",
    ["outcome"],
)
_SPEND = Counter(
    "perennial_spend_usd_total", "What model calls have cost, in US dollars, where it is known.", ["agent", "pool"]
)
_BUDGET_REFUSALS = Counter(
    "perennial_budget_refusals_total",
    "Model calls that were not made: a limit of the budget was in the way.",
    ["agent", "scope", "measure"],
)


def compaction(outcome: str) -> None:
    """A conversation was summed up (`completed`), or could not be (`failed`)."""
    _COMPACTIONS.labels(outcome).inc()


_DELTAS = Counter(
    "perennial_stream_records_total",
    "Parts of answers for agents.stream; outcome: sent, or dropped where Kafka was away or too slow.",
    ["outcome"],
)


def events_received(topic: str, count: int = 1) -> None:
    """Records were read from Kafka."""
    _EVENTS_RECEIVED.labels(topic).inc(count)


def events_accepted(topic: str, count: int = 1) -> None:
    """Events are durable in Temporal."""
    _EVENTS_ACCEPTED.labels(topic).inc(count)


def skipped(topic: str, count: int = 1) -> None:
    """An event of a shared topic is for no agent here."""
    _EVENTS_SKIPPED.labels(topic).inc(count)


def duplicate(agent: str) -> None:
    """An agent has dropped an event it had seen before."""
    _EVENTS_DUPLICATE.labels(agent).inc()


def dead_letter(reason: str) -> None:
    """A record is durable in the dead-letter topic."""
    _DEAD_LETTERS.labels(reason).inc()


def delivery(events: int, seconds: float) -> None:
    """Temporal has accepted one delivery."""
    _DELIVERY_SECONDS.observe(seconds)
    _DELIVERY_EVENTS.observe(events)


def ingest_lag(topic: str, partition: int, records: int) -> None:
    """How far behind the end of a partition we are."""
    _INGEST_LAG.labels(topic, str(partition)).set(records)


def oldest_unacknowledged(topic: str, partition: int, written_ms: int | None) -> None:
    """When the oldest record was written that is not durable yet: milliseconds since 1970; None: all are durable."""
    age = time.time() - written_ms / 1000 if written_ms is not None and written_ms >= 0 else 0
    _OLDEST.labels(topic, str(partition)).set(max(0, age))


def paused(topic: str, seconds: float) -> None:
    """A partition of this topic was not read for so long, its window being full."""
    _PAUSED.labels(topic).inc(seconds)


def not_ours(topic: str, partition: int) -> None:
    """Another member tells of this partition from now on."""
    for gauge in (_INGEST_LAG, _OLDEST):
        with contextlib.suppress(KeyError):
            gauge.remove(topic, str(partition))


def rebalanced(partitions: int) -> None:
    """The group has given us so many partitions."""
    _REBALANCES.inc()
    _ASSIGNED.set(partitions)


def commit_failed(reason: str) -> None:
    """A commit did not succeed: the group has `rebalanced`, or Kafka is `unavailable`."""
    _COMMIT_FAILURES.labels(reason).inc()


def delivery_failed(status: str) -> None:
    """Temporal has not taken a delivery, for now or for ever."""
    _DELIVERY_FAILURES.labels(status).inc()


def repeated(agent: str, events: int) -> None:
    """An agent has taken events again that it had taken in an earlier turn."""
    _EVENTS_REPEATED.labels(agent).inc(events)


def in_flight(count: int) -> None:
    """How many deliveries wait for Temporal."""
    _IN_FLIGHT.set(count)


def turn(agent: str, outcome: str, seconds: float) -> None:
    """A turn has ended, and its answer is published."""
    _TURNS.labels(agent, outcome).inc()
    _TURN_SECONDS.labels(agent).observe(seconds)


def reply(agent: str) -> None:
    """A reply is on its topic."""
    _REPLIES.labels(agent).inc()


def tool_call(tool: str, outcome: str, seconds: float) -> None:
    """A tool call has ended."""
    _TOOL_CALLS.labels(tool, outcome).inc()
    _TOOL_SECONDS.labels(tool).observe(seconds)


def hung_threads(tool: str, threads: int) -> None:
    """So many calls of a sync tool were given up and hang on this worker."""
    _HUNG.labels(tool).set(threads)


def approval(agent: str, outcome: str) -> None:
    """A decision about a tool call was `requested`, or it was `approved` or `refused`, by a person or by expiry."""
    _APPROVALS.labels(agent, outcome).inc()


def model_call(pool: str, model: str, outcome: str, seconds: float) -> None:
    """A model call has ended; the outcome is `ok` or the remedy of its error."""
    _MODEL_CALLS.labels(pool, model, outcome).inc()
    _MODEL_SECONDS.labels(pool, model).observe(seconds)


def reply_repair(outcome: str) -> None:
    """An answer was sent back to the model, which has answered: it `fits`, it is `unfit` still, or it is `other`."""
    _REPAIRS.labels(outcome).inc()


def delta(outcome: str) -> None:
    """A part of an answer was `sent` to the stream topic, or `dropped`."""
    _DELTAS.labels(outcome).inc()


def tokens(pool: str, model: str, usage: Usage) -> None:
    """A model call has used tokens."""
    _TOKENS.labels(pool, model, "input").inc(usage.input_tokens)
    _TOKENS.labels(pool, model, "output").inc(usage.output_tokens)


def spent(agent: str, pool: str, micro_usd: int) -> None:
    """A model call has cost so much."""
    _SPEND.labels(agent, pool).inc(micro_usd / 1_000_000)


def budget_refused(agent: str, scope: str, measure: str) -> None:
    """A model call was not made, since it might have broken a limit."""
    _BUDGET_REFUSALS.labels(agent, scope, measure).inc()
