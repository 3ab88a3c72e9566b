"""P1, P2: what a mailbox accepts is taken exactly once, in order; what it has seen before is dropped and counted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from workflows import names
from workflows.events import Event, event_digest, hold, hold_digest, release
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
    mailbox.accept([], horizon=10)
    assert (len(mailbox.seen), mailbox.forgotten) == (10, 40)
    assert mailbox.accept([event(number) for number in range(40, 50)], horizon=10) == [event(n) for n in range(40, 50)]
    assert mailbox.accept([event(0)], horizon=10) == []


def test_what_was_seen_is_carried_in_twenty_bytes_an_event() -> None:
    """P7: thousands of ids travel with every run. The form is for ever, and that of an older release is understood."""
    mailbox = Mailbox()
    for turn in range(9001, 11001):
        mailbox.accept([event(turn)], horizon=5000)
        mailbox.take(turn, 1)
    mailbox.accept([event(1), event(2)], horizon=5000)
    written = mailbox.model_dump_json()
    assert len(written) < 2002 * 20 + 1000
    assert mailbox.carried_bytes < len(written) < mailbox.carried_bytes + 1000
    read = Mailbox.model_validate_json(written)
    assert (read, list(read.seen)) == (mailbox, list(mailbox.seen))
    few = '"seen":"7:GjSQAtOndj9dGtP2,uWiXpOjJ4-sHnkJF -7:wP_u"'
    seen = {"1a349002d3a7763f5d1ad3f6": 7, "b96897a4e8c9e3eb079e4245": 7, "c0ffee": 0}
    assert few in Mailbox(seen=seen).model_dump_json()
    assert Mailbox.model_validate_json(f"{{{few}}}").seen == seen
    older = {"1a349002d3a7763f5d1ad3f6a1c2e017": 7}
    assert Mailbox.model_validate({"seen": older}).turn_of(event_digest("store", "event-1")) == 7


def test_what_waits_is_never_forgotten_and_takes_no_room_from_what_was_taken() -> None:
    """A paused agent may have more mail than its horizon, and knows all of it, and what it took before."""
    mailbox = Mailbox()
    before = [event(number, "shop") for number in range(10)]
    mailbox.accept(before, horizon=10)
    mailbox.take(1, 10)
    everything = [event(number) for number in range(50)]
    mailbox.accept(everything, horizon=10)
    assert mailbox.accept([*everything, *before], horizon=10) == [*everything, *before]
    assert mailbox.take(2, 100) == everything


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


ORIGIN = "store.orders/0/17"


def filling(number: int) -> Event:
    return event(number).model_copy(update={"fills": hold_digest(ORIGIN)})


def held() -> Mailbox:
    """A mailbox in which events 1 and 3 came before and behind a dead letter."""
    mailbox = Mailbox()
    mailbox.accept([event(1), hold(ORIGIN, "not JSON"), event(3)], horizon=FAR)
    return mailbox


def test_nothing_passes_a_hold_save_a_question() -> None:
    """`order: strict`: what came before is taken, what came behind waits; a person is answered meanwhile."""
    mailbox = held()
    assert mailbox.held is None
    assert mailbox.take(1, 10) == [event(1)]
    assert mailbox.held == hold(ORIGIN, "not JSON")
    assert not mailbox.ready
    assert mailbox.take(2, 10) == []
    mailbox.accept([event(4), question(5)], horizon=FAR)
    assert mailbox.ready
    assert mailbox.take(2, 10) == [question(5)]
    assert not mailbox.ready
    assert (mailbox.accepted, mailbox.duplicates) == (4, 0)


@pytest.mark.parametrize("first_taken", [True, False])
def test_a_redriven_event_takes_the_place_of_its_hold(first_taken: bool) -> None:
    """Its neighbours see no difference to a record that was never dead-lettered."""
    mailbox = held()
    taken = mailbox.take(1, 10) if first_taken else []
    mailbox.accept([filling(2)], horizon=FAR)
    assert [one.id for one in [*taken, *mailbox.take(2, 10)]] == ["1", "2", "3"]


def test_a_released_hold_lets_what_waited_pass_and_does_not_come_back() -> None:
    """Dropped by an operator; ingest may deliver the hold again after a crash."""
    mailbox = held()
    mailbox.accept([release(ORIGIN, "ada", "a test")], horizon=FAR)
    assert mailbox.accept([hold(ORIGIN, "not JSON"), release(ORIGIN, "ada", "again")], horizon=FAR) == []
    assert mailbox.take(1, 10) == [event(1), event(3)]
    assert mailbox.waiting_bytes == 0


def test_a_hold_that_comes_after_its_end_holds_nothing() -> None:
    """Somebody was quick: the letter is written beside the hold, and either may be first."""
    mailbox = Mailbox()
    mailbox.accept([release(ORIGIN, "ada", "a test"), hold(ORIGIN, "not JSON"), event(3)], horizon=FAR)
    assert mailbox.take(1, 10) == [event(3)]


def test_a_redriven_event_that_was_seen_before_is_a_duplicate_and_ends_its_hold() -> None:
    """P1: the producer has sent it again meanwhile, in order with what came then."""
    mailbox = held()
    mailbox.accept([event(2)], horizon=FAR)
    assert mailbox.accept([filling(2)], horizon=FAR) == [filling(2)]
    assert mailbox.take(1, 10) == [event(1), event(3), event(2)]


def test_a_redriven_event_without_a_hold_is_like_any_other() -> None:
    """Where order is relaxed, or the hold was released before."""
    mailbox = Mailbox()
    assert mailbox.accept([event(1), filling(2)], horizon=FAR) == []
    assert mailbox.take(1, 10) == [event(1), filling(2)]


@given(st.permutations(range(3)), st.lists(st.sampled_from([0, 1, 2]), max_size=4), st.integers(1, 3))
def test_however_holds_end_the_order_is_that_of_the_partition(ends: list[int], released: list[int], limit: int) -> None:
    """`order: strict`: three of six records were dead-lettered; they are redriven or dropped in any order."""
    origins = [f"t/0/{2 * number}" for number in range(3)]
    mailbox = Mailbox()
    for number in range(3):
        mailbox.accept([hold(origins[number], "x"), event(2 * number + 1)], horizon=FAR)
    taken: list[Event] = []
    for number in ends:
        taken += mailbox.take(1, limit)
        if number in released:
            mailbox.accept([release(origins[number], "", "")], horizon=FAR)
        else:
            redriven = event(2 * number).model_copy(update={"fills": hold_digest(origins[number])})
            mailbox.accept([redriven], horizon=FAR)
    while more := mailbox.take(1, limit):
        taken += more
    expected = [n for n in range(6) if n % 2 or n // 2 not in released]
    assert [int(one.id) for one in taken] == expected
    assert not mailbox.waiting


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
TestMailboxLife.settings = settings(max_examples=200, stateful_step_count=30)
