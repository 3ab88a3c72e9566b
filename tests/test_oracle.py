"""The fault tests' oracle: each promise, broken in a run that is otherwise in order."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from oracle import undurable, wrong
from traffic import Place, Sent

from activities.entries import Entry, UserMessage
from activities.ledger import Totals
from workers.flow import Partition
from workers.records import Routes
from workers.tally import Answer, Pair, count, expect
from workflows import names
from workflows.events import EventReference
from workflows.messages import Reply
from workflows.names import Address
from workflows.spec import AgentSpec, Subscription

TOPIC = "shop.events"
RECORDED = datetime(2026, 11, 1, 8, 0, 0, tzinfo=UTC)
DESK = AgentSpec(
    name="desk", tenant="shop", instructions="Answer.", subscriptions=[Subscription(topic=TOPIC, types=["letter"])]
)


def record(offset: int, event_id: str, key: str = "k", kind: str = "letter", partition: int = 0) -> Sent:
    event = {"specversion": "1.0", "id": event_id, "source": "/s", "type": kind, "subject": key}
    return Sent(TOPIC, json.dumps(event).encode(), offset * 1000, Place(TOPIC, partition, offset))


def agent(key: str = "k") -> str:
    return names.workflow_id(Address("shop", "desk", key))


class Run:
    """Three letters to one agent and one to another, one of them twice, something unread, and something unreadable."""

    def __init__(self) -> None:
        self.sent = [
            record(0, "a"),
            record(1, "b"),
            record(2, "a"),
            record(3, "x", kind="newsletter"),
            Sent(TOPIC, b"{ no event", 4000, Place(TOPIC, 0, 4)),
            record(5, "c"),
            record(0, "d", key="other", partition=1),
        ]
        self.expected = expect([(sent.topic, sent.value) for sent in self.sent], Routes([DESK]))
        self.taken: dict[str, list[str]] = {agent(): ["a", "b", "c"], agent("other"): ["d"]}
        """What each agent has answered, a turn for each."""
        self.replied = {agent(): ["a", "b", "c"], agent("other"): ["d"]}
        self.duplicates = ["duplicate of a"]
        self.dead_letters = {Place(TOPIC, 0, 4)}
        self.committed = {Partition(TOPIC, 0): 6, Partition(TOPIC, 1): 1}
        self.ends = dict(self.committed)
        self.asked: dict[str, float] = {}

    def wrong(self) -> list[str]:
        recorded = {of: [entry(of, turn, one) for turn, one in enumerate(ids, 1)] for of, ids in self.taken.items()}
        tally = count(
            self.expected,
            sent={index: sent.at for index, sent in enumerate(self.sent)},
            answers=[reply(of, turn, one) for of, ids in self.replied.items() for turn, one in enumerate(ids, 1)],
            recorded=[one for entries in recorded.values() for one in entries],
            duplicates=self.duplicates,
            dead_letters=self.dead_letters,
            totals=Totals(
                agents=2,
                entries=4,
                snapshots=0,
                calls_begun=4,
                calls_repeated=0,
            ),
            asked=self.asked,
        )
        return wrong(
            self.expected,
            tally,
            sent=self.sent,
            recorded=recorded,
            dead_letters=self.dead_letters,
            committed=self.committed,
            ends=self.ends,
        )

    def undurable(self, *accepted: tuple[str, str]) -> list[str]:
        return undurable(
            self.expected,
            sent=self.sent,
            committed=self.committed,
            accepted={Pair(of, EventReference(source="/s", id=one).digest) for of, one in accepted},
            dead_letters=self.dead_letters,
        )


def entry(of: str, turn: int, event_id: str) -> Entry:
    return Entry(
        workflow_id=of,
        turn=turn,
        step=1,
        parent=None,
        messages=[UserMessage(text="")],
        answers=[EventReference(source="/s", id=event_id)],
        recorded_at=RECORDED.isoformat(),
    )


def reply(of: str, turn: int, event_id: str) -> Answer:
    answers = [EventReference(source="/s", id=event_id)]
    return Answer(Reply(id=names.reply_id(of, turn, 0), workflow_id=of, turn=turn, text="yes", answers=answers), 60_000)


@pytest.fixture
def run() -> Run:
    return Run()


def test_a_run_that_is_in_order(run: Run) -> None:
    """Nothing is wrong, also when more is dropped than was sent twice: it was delivered again."""
    assert run.wrong() == []
    run.duplicates.append("duplicate of b, after a crash")
    assert run.wrong() == []


def test_an_event_without_an_answer(run: Run) -> None:
    """P1."""
    run.replied[agent()].remove("b")
    assert run.wrong() == ["lost: 1"]


def test_an_event_that_is_nowhere(run: Run) -> None:
    """P1."""
    run.replied[agent()].remove("b")
    run.taken[agent()].remove("b")
    assert run.wrong() == ["lost: 1"]


def test_an_event_taken_again(run: Run) -> None:
    """P1."""
    run.taken[agent()].append("b")
    assert run.wrong() == ["answered_twice: 1"]


def test_a_second_reply(run: Run) -> None:
    """P1."""
    run.replied[agent()].append("b")
    assert run.wrong() == ["answered_twice: 1"]


def test_a_call_paid_twice(run: Run) -> None:
    """P6."""
    run.asked[names.call_key(agent(), 1, 1)] = RECORDED.timestamp() - 1
    assert run.wrong() == []
    run.asked[names.call_key(agent(), 1, 1)] = RECORDED.timestamp() + 1
    assert run.wrong() == ["paid_twice: 1"]


def test_a_duplicate_that_nobody_tells_of(run: Run) -> None:
    """Dropped or lost, nobody could say."""
    run.duplicates.clear()
    assert run.wrong() == ["0 duplicates are reported, 1 were sent"]


def test_an_agent_that_answers_what_it_was_not_sent(run: Run) -> None:
    """A ghost: an event of another agent, say, or of a closed one's past."""
    run.taken[agent("other")].append("a")
    assert run.wrong() == [
        f"never sent, and yet answered: {Pair(agent('other'), EventReference(source='/s', id='a').digest)}"
    ]


def test_a_good_record_dead_lettered(run: Run) -> None:
    """P4: also if its event was answered as well."""
    run.dead_letters.add(Place(TOPIC, 0, 5))
    assert run.wrong() == [f"dead-lettered, and nothing is wrong with them: {Place(TOPIC, 0, 5)}"]


def test_a_bad_record_not_dead_lettered(run: Run) -> None:
    """P4."""
    run.dead_letters.clear()
    assert run.wrong() == [f"not dead-lettered: {Place(TOPIC, 0, 4)}"]


def test_events_of_one_agent_in_the_wrong_order(run: Run) -> None:
    """P2; of an event that was sent twice the first place counts."""
    run.taken[agent()] = ["b", "a", "c"]
    (fault,) = run.wrong()
    assert "which stands before it" in fault


def test_the_order_of_two_partitions_is_nobodys(run: Run) -> None:
    """P2 speaks of one partition."""
    run.sent.append(record(1, "late", partition=1))
    run.expected = expect([(sent.topic, sent.value) for sent in run.sent], Routes([DESK]))
    run.committed[Partition(TOPIC, 1)] = run.ends[Partition(TOPIC, 1)] = 2
    for taken in (["a", "b", "c", "late"], ["late", "a", "b", "c"], ["a", "late", "b", "c"]):
        run.taken[agent()] = run.replied[agent()] = taken
        assert run.wrong() == []


@pytest.mark.parametrize("committed", [{}, {Partition(TOPIC, 0): 5}, {Partition(TOPIC, 0): 7}])
def test_lag_or_a_commit_beyond_the_end(run: Run, committed: dict[Partition, int]) -> None:
    """At rest, what is committed is the end."""
    run.committed = {Partition(TOPIC, 1): 1, **committed}
    assert run.wrong() == [f"{TOPIC}/0 ends at 6, and {committed.get(Partition(TOPIC, 0), 0)} is committed"]


def test_a_commit_that_passes_what_is_durable_nowhere(run: Run) -> None:
    """P3: what is read and skipped need not be anywhere; what is not committed yet need not either."""
    run.committed[Partition(TOPIC, 0)] = 5
    assert run.undurable((agent(), "a"), (agent(), "b"), (agent("other"), "d")) == []
    assert run.undurable((agent(), "a"), (agent("other"), "b"), (agent("other"), "d")) == [
        f"record 1, at {Place(TOPIC, 0, 1)}"
    ]
    run.dead_letters.clear()
    assert run.undurable((agent(), "a"), (agent(), "b")) == [
        f"record 4, at {Place(TOPIC, 0, 4)}",
        f"record 6, at {Place(TOPIC, 1, 0)}",
    ]
