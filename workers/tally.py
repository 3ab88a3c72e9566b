"""What came of events, counted from the outside: from what was sent, the reply topic, the ledger and the dead letters.

    expected = expect(lines, routes)
    tally = count(expected, answers=..., recorded=..., duplicates=..., dead_letters=..., totals=..., asked=...)
    assert tally.kept, tally

Pure. Nothing here asks the workers how they think they did.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel

from activities.entries import Entry
from activities.ledger import Totals
from workers import records
from workers.flow import Limits
from workers.records import Record, Rejected, Routes
from workflows import names
from workflows.messages import Reply, TurnOutcome


class Pair(NamedTuple):
    """An event at one agent that it is for."""

    workflow_id: str
    digest: str


class Answer(NamedTuple):
    """A reply as it was found on its topic."""

    reply: Reply
    at: int
    """Milliseconds since 1970 (UTC), by the record's timestamp."""


@dataclass
class Expected:
    """What ought to come of records, by their content and the agents' subscriptions alone."""

    pairs: dict[Pair, int] = field(default_factory=dict)
    """Each event at each agent it is for, once, with the index of its first record."""
    repeated: int = 0
    """How often such a pair was there again."""
    rejects: list[int] = field(default_factory=list)
    """The indexes of records with something in them that nobody can take."""
    skipped: int = 0
    """Records that are in order and that no agent wants."""

    @property
    def rejected(self) -> int:
        """How many records have something in them that nobody can take."""
        return len(self.rejects)

    def add(self, index: int, topic: str, value: bytes, routes: Routes) -> None:
        """What ought to come of one more record."""
        decoded = records.decode(Record(topic, 0, 0, -1, None, value), max_bytes=Limits().event_bytes)
        if isinstance(decoded, Rejected):
            self.rejects.append(index)
            return
        route = routes.route(decoded.event, topic)
        if route.rejected:
            self.rejects.append(index)
        self.skipped += not (route.rejected or route.addresses)
        for address in route.addresses:
            pair = Pair(names.workflow_id(address), decoded.event.digest)
            self.repeated += pair in self.pairs
            self.pairs.setdefault(pair, index)


class Tally(BaseModel):
    """The figures of a run."""

    events_in: int
    """Records sent."""
    accepted: int
    """Events at agents, by the ledger; not those of their own wake-ups, and of schedules."""
    woken: int = 0
    """Wake-ups that agents had set for themselves, in the ledger."""
    duplicates: int
    """Dropped by agents, which say so on their lifecycle topic."""
    dead_letters: int
    """Records of origin in the dead-letter topic."""
    skipped: int
    replies: int
    """Distinct replies on the reply topic."""
    failed: int
    """Replies that say why there is no answer."""
    lost: int
    """Events at agents with no reply on the topic or no entry in the ledger."""
    answered_twice: int
    """Events at agents with more than one distinct reply, or entries in more than one turn."""
    model_calls: int
    calls_repeated: int
    """Model calls made again since a worker died, or a server did not answer, before there was a result to record."""
    paid_twice: int | None
    """Model calls that the provider was asked for although their result was recorded; None when it did not count."""
    median_seconds: float | None
    """From an event's record to its reply's."""
    p99_seconds: float | None
    rehearsal: bool
    """Whether replies come from the rehearsal endpoint."""
    missing: int
    """Duplicates and dead letters that ought to be there, and are not."""

    @property
    def kept(self) -> bool:
        """Whether nothing was lost, nothing done twice, and all that was dropped or set aside is accounted for."""
        return not (self.lost or self.answered_twice or self.paid_twice or self.missing)


def expect(lines: Sequence[tuple[str, bytes]], routes: Routes) -> Expected:
    """What ought to come of records.

    Args:
        lines: topic and value of each record, in structured mode.
        routes: the agents' subscriptions.
    """
    expected = Expected()
    for index, (topic, value) in enumerate(lines):
        expected.add(index, topic, value, routes)
    return expected


def answered(answers: Iterable[Answer]) -> dict[Pair, dict[str, int]]:
    """By event and agent, the ids of the replies to it, each with when it was first there."""
    found: dict[Pair, dict[str, int]] = defaultdict(dict)
    for answer in answers:
        for reference in answer.reply.answers:
            times = found[Pair(answer.reply.workflow_id, reference.digest)]
            times[answer.reply.id] = min(answer.at, times.get(answer.reply.id, answer.at))
    return found


def count(  # noqa: PLR0913  # one argument for each place that is looked at
    expected: Expected,
    *,
    sent: Mapping[int, int],
    answers: Sequence[Answer],
    recorded: Iterable[Entry],
    duplicates: Collection[str],
    dead_letters: Collection[tuple[str, int, int]],
    totals: Totals,
    asked: Mapping[str, float] | None,
) -> Tally:
    """Count what came of records.

    Args:
        expected: what ought to.
        sent: by the index of each record, when it was sent: milliseconds since 1970 (UTC).
        answers: what stands on the reply topic.
        recorded: the entries of the agents.
        duplicates: ids of the lifecycle events that report a dropped duplicate.
        dead_letters: topic, partition and offset of the records that were dead-lettered.
        totals: of the ledger.
        asked: when the provider was last asked for each call, by its key: seconds since 1970 (UTC). None: nobody knows.
    """
    replies = answered(answers)
    turns: dict[Pair, set[int]] = defaultdict(set)
    own: dict[Pair, bool] = {}
    paid_again = 0
    for entry in recorded:
        last = (asked or {}).get(names.call_key(entry.workflow_id, entry.turn, entry.step), 0.0)
        paid_again += last > datetime.fromisoformat(entry.recorded_at).timestamp()
        for reference in entry.answers:
            pair = Pair(entry.workflow_id, reference.digest)
            turns[pair].add(entry.turn)
            if reference.type == names.WAKE_TYPE or reference.source == names.SCHEDULE_SOURCE:
                own[pair] = reference.type == names.WAKE_TYPE
    seconds = [
        (min(replies[pair].values()) - sent[index]) / 1000 for pair, index in expected.pairs.items() if pair in replies
    ]
    outcomes = {answer.reply.id: answer.reply.outcome for answer in answers}
    return Tally(
        events_in=len(sent),
        accepted=len(turns) - len(own),
        woken=sum(own.values()),
        duplicates=len(set(duplicates)),
        dead_letters=len(set(dead_letters)),
        skipped=expected.skipped,
        replies=len(outcomes),
        failed=sum(outcome is TurnOutcome.FAILED for outcome in outcomes.values()),
        lost=sum(pair not in replies or pair not in turns for pair in expected.pairs),
        answered_twice=sum(len(ids) > 1 for ids in replies.values()) + sum(len(of) > 1 for of in turns.values()),
        model_calls=totals.calls_begun,
        calls_repeated=totals.calls_repeated,
        paid_twice=None if asked is None else paid_again,
        median_seconds=statistics.median(seconds) if seconds else None,
        p99_seconds=_percentile(seconds, 99),
        rehearsal=any(answer.reply.rehearsal for answer in answers),
        missing=max(0, expected.repeated - len(set(duplicates))) + max(0, expected.rejected - len(set(dead_letters))),
    )


def _percentile(values: Sequence[float], percent: int) -> float | None:
    """The value that so many percent of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None
