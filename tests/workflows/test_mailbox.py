"""P1, P2: what a mailbox accepts is taken exactly once, in order; what it has seen before is dropped and counted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from workflows import names
from workflows.events import Event
from workflows.mailbox import Mailbox

FAR = 1000
"""A horizon that these tests never reach."""


def event(number: int, source: str = "store") -> Event:
    return Event(id=str(number), source=source, type="store.order")


def question(number: int) -> Event:
    return Event(id=str(number), source="ask", type=names.ASK_TYPE)


EVENTS = st.one_of(
    st.builds(event, st.integers(0, 12), st.sampled_from(["store", "shop"])), st.builds(question, st.integers(0, 4))
)


def test_mail_is_taken_in_the_order_it_came() -> None:
    """P2: at most `limit` at a time; the rest waits."""
    mailbox = Mailbox()
    mailbox.accept([event(1), event(2)], horizon=FAR)
    mailbox.accept([event(3)], horizon=FAR)
    assert mailbox.take(1, 2) == [event(1), event(2)]
    assert mailbox.take(2, 2) == [event(3)]
    assert mailbox.take(3, 2) == []


def test_an_event_seen_before_is_dropped_and_counted() -> None:
    """P1: while it waits, after it was taken, and twice in one delivery."""
    mailbox = Mailbox()
    assert mailbox.accept([event(1), event(1)], horizon=FAR) == [event(1)]
    assert mailbox.accept([event(1)], horizon=FAR) == [event(1)]
    assert mailbox.take(1, 10) == [event(1)]
    assert mailbox.accept([event(1), event(2)], horizon=FAR) == [event(1)]
    assert mailbox.waiting == [event(2)]
    assert (mailbox.accepted, mailbox.duplicates) == (2, 3)


def test_the_same_id_from_another_source_is_another_event() -> None:
    """CloudEvents 1.0: an event is identified by source and id."""
    mailbox = Mailbox()
    assert mailbox.accept([event(1, "store"), event(1, "shop")], horizon=FAR) == []
    assert len(mailbox.take(1, 10)) == 2


def test_a_question_is_alone_in_its_turn() -> None:
    """A person waits for the answer to the question, and to nothing else; the order stays."""
    mailbox = Mailbox()
    mailbox.accept([event(1), question(2), event(3), event(4), question(5), question(6)], horizon=FAR)
    turns = [mailbox.take(turn, 10) for turn in range(1, 6)]
    assert turns == [[event(1)], [question(2)], [event(3), event(4)], [question(5)], [question(6)]]


def test_the_turn_that_took_an_event_is_known() -> None:
    """A question asked again finds the reply of then."""
    mailbox = Mailbox()
    mailbox.accept([event(1), event(2)], horizon=FAR)
    mailbox.take(7, 1)
    assert mailbox.turn_of(event(1).digest) == 7
    assert mailbox.turn_of(event(2).digest) == 0
    assert mailbox.turn_of(event(3).digest) is None


def test_the_oldest_is_forgotten_beyond_the_horizon() -> None:
    """The state stays small: as many ids as the horizon says, the newest."""
    mailbox = Mailbox()
    for number in range(50):
        mailbox.accept([event(number)], horizon=10)
        mailbox.take(number + 1, 10)
    assert len(mailbox.seen) == 10
    assert mailbox.accept([event(number) for number in range(40, 50)], horizon=10) == [event(n) for n in range(40, 50)]
    assert mailbox.accept([event(0)], horizon=10) == []


def test_what_waits_is_never_forgotten() -> None:
    """A paused agent may have more mail than its horizon, and knows all of it."""
    mailbox = Mailbox()
    everything = [event(number) for number in range(50)]
    mailbox.accept(everything, horizon=10)
    assert mailbox.accept(everything, horizon=10) == everything
    assert mailbox.take(1, 100) == everything


@given(events=st.lists(EVENTS, max_size=40), cuts=st.lists(st.integers(1, 8), max_size=40))
def test_however_mail_is_delivered_and_taken_each_event_is_taken_once_and_in_order(
    events: list[Event], cuts: list[int]
) -> None:
    """P1, P2: deliveries and turns of any size give the same sequence."""
    mailbox = Mailbox()
    rest = list(events)
    for cut in cuts:
        mailbox.accept(rest[:cut], horizon=FAR)
        rest = rest[cut:]
    mailbox.accept(rest, horizon=FAR)
    taken: list[Event] = []
    while part := mailbox.take(1, 3):
        taken += part
    assert [event.digest for event in taken] == list(dict.fromkeys(event.digest for event in events))


class MailboxLife(RuleBasedStateMachine):
    """A mailbox through deliveries, turns and continue-as-new, beside a plain list of what has to come out."""

    @initialize(horizon=st.integers(1, 6))
    def begin(self, horizon: int) -> None:
        self.mailbox = Mailbox()
        self.horizon = horizon
        self.turn = 0
        self.accepted: list[str] = []
        """Digests in the order in which they were accepted; one that was forgotten may stand here again."""
        self.waiting: list[Event] = []
        self.duplicates = 0

    @rule(delivery=st.lists(EVENTS, max_size=6))
    def deliver(self, delivery: list[Event]) -> None:
        delivery = [event.model_copy() for event in delivery]  # so that repetitions can be told apart
        dropped = self.mailbox.accept(delivery, horizon=self.horizon)
        for event in delivery:
            known = event.digest in self.accepted[-self.horizon :] or event in self.waiting
            if any(event is one for one in dropped):
                assert event.digest in self.accepted, "dropped, but never seen"
                self.duplicates += 1
            else:
                assert not known, "accepted again within the horizon"
                self.accepted.append(event.digest)
                self.waiting.append(event)

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        self.turn += 1
        taken = self.mailbox.take(self.turn, limit)
        assert taken == self.waiting[: len(taken)], "out of order"
        assert bool(taken) == bool(self.waiting), "mail waits and none is taken"
        assert len(taken) <= limit
        assert len(taken) == 1 or all(event.type != names.ASK_TYPE for event in taken)
        self.waiting = self.waiting[len(taken) :]
        if len(taken) < limit and self.waiting and taken[0].type != names.ASK_TYPE:
            assert self.waiting[0].type == names.ASK_TYPE, "a turn takes what it may"

    @rule()
    def continue_as_new(self) -> None:
        self.mailbox = Mailbox.model_validate_json(self.mailbox.model_dump_json())

    @invariant()
    def nothing_is_lost_and_little_is_remembered(self) -> None:
        assert self.mailbox.waiting == self.waiting
        assert self.mailbox.accepted == len(self.accepted)
        assert self.mailbox.duplicates == self.duplicates
        assert all(self.mailbox.turn_of(event.digest) == 0 for event in self.waiting)
        assert set(self.accepted[-self.horizon :]) <= set(self.mailbox.seen)

    def teardown(self) -> None:
        while taken := self.mailbox.take(99, 4):
            self.waiting = self.waiting[len(taken) :]
        assert not self.waiting


TestMailboxLife = MailboxLife.TestCase
TestMailboxLife.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
