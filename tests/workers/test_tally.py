"""The demo's oracle: each fault it is there to find, planted in a run that is otherwise in order."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.entries import Entry, UserMessage
from activities.ledger import Totals
from workers.records import Routes
from workers.tally import Answer, Expected, Pair, Tally, answered, count, expect
from workflows import names
from workflows.events import EventReference
from workflows.messages import Reply, TurnOutcome
from workflows.spec import AgentSpec, Subscription

TOPIC = "shop.events"
LETTERS = Subscription(topic=TOPIC, types=["letter"])
DESK = AgentSpec(name="desk", tenant="shop", instructions="Answer.", subscriptions=[LETTERS])
AUDIT = AgentSpec(name="audit", tenant="shop", instructions="Watch.", subscriptions=[LETTERS])


def line(number: int | str, **attributes: Any) -> tuple[str, bytes]:
    """A record of a topic the agents subscribe to."""
    event = {"specversion": "1.0", "id": f"e-{number}", "source": "/test", "type": "letter", "subject": "k"}
    return TOPIC, json.dumps({**event, **attributes}).encode()


NO_EVENT = (TOPIC, b"{ not json")
UNWANTED = line("unwanted", type="newsletter")


class Run:
    """What a run has left, to be counted; as it should be until a test changes it."""

    def __init__(self, lines: list[tuple[str, bytes]], *specs: AgentSpec) -> None:
        self.lines = lines
        self.expected: Expected = expect(lines, Routes(specs or [DESK]))
        self.totals = Totals(agents=1, entries=3, snapshots=0, calls_begun=3, calls_repeated=0)
        self.asked: dict[str, float] | None = {}
        self.dead_letters = [(TOPIC, 0, offset) for offset in range(self.expected.rejected)]
        self.duplicates = [f"duplicate-{number}" for number in range(self.expected.repeated)]
        pairs = list(self.expected.pairs)
        self.answers = [answer(pair, turn) for turn, pair in enumerate(pairs, 1)]
        self.entries = [entry(pair, turn) for turn, pair in enumerate(pairs, 1)]

    def count(self) -> Tally:
        return count(
            self.expected,
            sent={index: 1000 * index for index in range(len(self.lines))},
            answers=self.answers,
            recorded=self.entries,
            duplicates=self.duplicates,
            dead_letters=self.dead_letters,
            totals=self.totals,
            asked=self.asked,
        )


def references(pair: Pair) -> list[EventReference]:
    """The event of a pair, found among those that tests use."""
    known = (EventReference(source="/test", id=f"e-{name}") for name in (*range(50), "unwanted"))
    return [reference for reference in known if reference.digest == pair.digest]


def answer(pair: Pair, turn: int, *, at: int = 60_000, outcome: TurnOutcome = TurnOutcome.COMPLETED) -> Answer:
    reply_id = names.reply_id(pair.workflow_id, turn, 1)
    reply = Reply(
        id=reply_id, workflow_id=pair.workflow_id, turn=turn, text="yes", answers=references(pair), outcome=outcome
    )
    return Answer(reply, at)


def entry(pair: Pair, turn: int) -> Entry:
    return Entry(
        workflow_id=pair.workflow_id,
        turn=turn,
        step=1,
        parent=None,
        messages=[UserMessage(text="?")],
        answers=references(pair),
        recorded_at="2026-01-01T00:00:00+00:00",
    )


def test_a_run_in_which_all_went_well_is_kept() -> None:
    """Three events, one of them sent again, a record nobody can read and an event nobody wants: all accounted for."""
    tally = Run([line(1), line(2), line(1), line(3), NO_EVENT, UNWANTED]).count()
    assert tally.kept
    assert (tally.events_in, tally.accepted, tally.duplicates, tally.dead_letters, tally.skipped) == (6, 3, 1, 1, 1)
    assert (tally.replies, tally.failed, tally.lost, tally.answered_twice, tally.paid_twice) == (3, 0, 0, 0, 0)


def test_a_call_that_the_provider_was_asked_for_when_its_answer_was_recorded_is_paid_twice() -> None:
    """P6, counted at the provider; asked for again before there was an answer is no such call."""
    run = Run([line(1), line(2)])
    recorded = datetime.fromisoformat(run.entries[0].recorded_at).timestamp()
    keys = [names.call_key(entry.workflow_id, entry.turn, entry.step) for entry in run.entries]
    run.asked = {keys[0]: recorded - 0.5, keys[1]: recorded - 3}
    assert (run.count().paid_twice, run.count().kept) == (0, True)
    run.asked[keys[1]] = recorded + 0.5
    assert (run.count().paid_twice, run.count().kept) == (1, False)
    run.asked = None
    assert (run.count().paid_twice, run.count().kept) == (None, True), "a provider that does not count"


def test_what_agents_wake_themselves_with_was_not_sent_to_them() -> None:
    """It is no event that ingest has accepted, and neither is that of a schedule; answered twice, both would count."""
    run = Run([line(1)])
    agent = run.entries[0].workflow_id
    own = EventReference(source=agent, id=names.wake_id(agent, "1-1-0"), type=names.WAKE_TYPE)
    timed = EventReference(source=names.SCHEDULE_SOURCE, id="schedule/store/desk/a-2026", type=names.SCHEDULE_TYPE)
    run.entries += [run.entries[0].model_copy(update={"turn": 2, "answers": [own, timed]})]
    tally = run.count()
    assert (tally.accepted, tally.woken, tally.answered_twice, tally.kept) == (1, 1, 0, True)
    run.entries += [run.entries[1].model_copy(update={"turn": 3, "answers": [own]})]
    assert run.count().answered_twice == 1


def test_an_event_for_two_agents_counts_at_each() -> None:
    """It is answered by both; that is no second answer, and one of them silent is a loss."""
    run = Run([line(1)], DESK, AUDIT)
    assert (run.count().accepted, run.count().lost, run.count().answered_twice) == (2, 0, 0)
    del run.answers[0]
    assert run.count().lost == 1


@pytest.mark.parametrize("missing", ["answers", "entries"])
def test_an_event_without_a_reply_or_without_an_entry_is_lost(missing: str) -> None:
    """Both are looked at: a reply that the ledger knows nothing of is as bad as one that nobody was sent."""
    run = Run([line(1), line(2)])
    getattr(run, missing).pop()
    tally = run.count()
    assert (tally.lost, tally.kept) == (1, False)


def test_two_replies_to_an_event_are_one_too_many() -> None:
    """A second turn for the same event is found on the topic."""
    run = Run([line(1)])
    run.answers.append(answer(next(iter(run.expected.pairs)), turn=2))
    tally = run.count()
    assert (tally.answered_twice, tally.replies, tally.kept) == (1, 2, False)


def test_a_reply_that_stands_on_the_topic_twice_is_one_reply() -> None:
    """Published again after a crash it has the same id: that is what consumers are told to drop (README)."""
    run = Run([line(1)])
    run.answers.append(run.answers[0]._replace(at=99_000))
    tally = run.count()
    assert (tally.answered_twice, tally.replies, tally.kept) == (0, 1, True)
    assert tally.median_seconds == 60.0, "the first one counts"


def test_an_event_in_two_turns_of_the_ledger_is_one_too_many() -> None:
    """Also when only one of the two was published."""
    run = Run([line(1)])
    run.entries.append(entry(next(iter(run.expected.pairs)), turn=2))
    tally = run.count()
    assert (tally.answered_twice, tally.kept) == (1, False)


def test_calls_made_again_break_no_promise() -> None:
    """A call cut off before its result was recorded has to be made again."""
    run = Run([line(1)])
    run.totals = run.totals.model_copy(update={"calls_repeated": 4})
    assert run.count().kept


@pytest.mark.parametrize("missing", ["duplicates", "dead_letters"])
def test_what_was_dropped_or_set_aside_without_a_word_is_missed(missing: str) -> None:
    """A duplicate nobody reported, and a bad record that is not in the dead-letter topic."""
    run = Run([line(1), line(1), NO_EVENT])
    getattr(run, missing).clear()
    tally = run.count()
    assert (tally.missing, tally.kept) == (1, False)


def test_a_reply_that_says_why_there_is_no_answer_is_an_answer() -> None:
    """It is counted by itself; the event is not lost."""
    run = Run([line(1)])
    run.answers = [answer(next(iter(run.expected.pairs)), 1, outcome=TurnOutcome.FAILED)]
    tally = run.count()
    assert (tally.failed, tally.lost, tally.kept) == (1, 0, True)


def test_times_are_from_the_events_first_record_to_its_first_reply() -> None:
    """Median and 99th percentile (nearest rank), in seconds; none when nothing was answered."""
    run = Run([line(number) for number in range(5)])
    run.answers = [
        answer(pair, turn, at=1000 * (turn - 1) + 500 * turn) for turn, pair in enumerate(run.expected.pairs, 1)
    ]
    tally = run.count()
    assert (tally.median_seconds, tally.p99_seconds) == (1.5, 2.5)
    run.answers = []
    assert (run.count().median_seconds, run.count().p99_seconds) == (None, None)


def test_replies_that_answer_several_events_answer_each() -> None:
    """An agent takes what waits into one turn."""
    one, two = Run([line(1), line(2)]).expected.pairs
    reply = answer(one, 1).reply.model_copy(update={"answers": [*references(one), *references(two)]})
    assert answered([Answer(reply, 5)]) == {one: {reply.id: 5}, two: {reply.id: 5}}


@given(st.lists(st.integers(0, 7), max_size=30), st.integers(0, 3), st.integers(0, 3))
def test_every_record_is_accounted_for_once(numbers: list[int], bad: int, unwanted: int) -> None:
    """For one agent, accepted + duplicates + dead letters + skipped = records sent, whatever they are."""
    tally = Run([*map(line, numbers), *[NO_EVENT] * bad, *[UNWANTED] * unwanted]).count()
    assert tally.accepted + tally.duplicates + tally.dead_letters + tally.skipped == tally.events_in
    assert tally.kept


@given(st.lists(st.integers(0, 7), min_size=1, max_size=20), st.data())
def test_losing_any_reply_is_noticed(numbers: list[int], data: st.DataObject) -> None:
    """Whichever it is."""
    run = Run(list(map(line, numbers)))
    del run.answers[data.draw(st.integers(0, len(run.answers) - 1))]
    assert run.count().lost == 1
