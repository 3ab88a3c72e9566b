"""An answer that is followed as it comes: what counts of what is on the topic."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from activities.stream import Telling
from workers.stream import Follower
from workflows import names
from workflows.events import Event, EventReference, Outgoing
from workflows.messages import Delta, DeltaKind, Reply

AGENT = "agent/hotel/concierge/room-7"
ASKED = EventReference(source="perennial/ask", id="q-1")


def follower() -> Follower:
    return Follower(AGENT, ASKED.digest)


def event(outgoing: Outgoing, **changes: Any) -> Event:
    return Event(id=outgoing.id, source=outgoing.source, type=outgoing.type, data=outgoing.data).model_copy(
        update=changes
    )


def told(*texts: str, step: int = 1, attempt: int = 1, end: bool = True, answers: Any = (ASKED,)) -> list[Event]:
    """A call that says these texts."""
    parts: list[Outgoing] = []
    with Telling(parts.append, AGENT, turn=1, step=step, attempt=attempt, answers=answers) as tells:
        tells.begin()
        for text in texts:
            tells._say(text)
        if end:
            tells.finish("".join(texts))
    return [event(part) for part in parts]


@given(
    dead=st.lists(st.text(min_size=1, max_size=5), max_size=5),
    alive=st.lists(st.text(min_size=1, max_size=5), max_size=5),
    data=st.data(),
)
def test_text_of_two_calls_is_never_mixed(dead: list[str], alive: list[str], data: st.DataObject) -> None:
    """A worker that was taken for dead may go on talking: whenever its words come, the answer is the other's."""
    first, second = told(*dead, end=False), told(*alive, attempt=2)
    merged: list[Event] = []
    while first or second:  # each in its own order, however they come together
        of = first if not second or (first and data.draw(st.booleans())) else second
        merged.append(of.pop(0))
    follow = follower()
    for one in merged:
        follow.take(one)
    assert follow.text == "".join(alive)


def test_a_restart_is_seen_as_one() -> None:
    """Only if something was said before: a call that died silently began nothing."""
    follow = follower()
    restarts = []
    for one in [*told(end=False), *told("It is ", attempt=2, end=False), *told("It is late.", attempt=3)]:
        taken = follow.take(one)
        assert taken is not None
        restarts += [(taken.attempt, taken.kind)] if follow.restarted else []
    assert restarts == [(3, DeltaKind.START)]
    assert follow.text == "It is late."


def test_the_steps_of_a_turn_follow_one_another() -> None:
    """The text is that of the newest; a further step is no restart. It ends with the step that the reply names."""
    follow = follower()
    reply = Reply(id="r", workflow_id=AGENT, turn=1, text="It is late.", steps=2)
    taken = [follow.take(one) for one in told("I look.")]
    assert all(taken)
    assert not follow.ended(reply)
    taken = [follow.take(one) for one in told("It is late.", step=2, answers=())]
    assert all(taken)
    assert not follow.restarted
    assert (follow.text, follow.ended(reply)) == ("It is late.", True)


def test_what_is_of_something_else_is_passed_over() -> None:
    """Other agents, other types, other questions, other turns, what is there twice, and what is not understood."""
    follow = follower()
    (start, text, end) = told("Yes.")
    other = EventReference(source="perennial/ask", id="q-2")
    for one in (
        *told("No.", answers=(other,)),
        text,  # before its start: of a question that is not ours, for all one knows
        event_of_another_agent(start),
        start.model_copy(update={"type": names.REPLY_TYPE}),
        start.model_copy(update={"data": {"kind": "sung"}}),
    ):
        assert follow.take(one) is None
    assert follow.take(start)
    assert follow.take(start) is None
    assert follow.take(text)
    assert follow.take(text) is None
    delta = Delta.model_validate(end.data).model_copy(update={"turn": 2})
    assert follow.take(end.model_copy(update={"data": delta.model_dump(mode="json")})) is None
    assert follow.text == "Yes."


def event_of_another_agent(one: Event) -> Event:
    return one.model_copy(update={"source": AGENT.replace("room-7", "room-8")})


def test_a_start_that_was_lost_mixes_nothing() -> None:
    """The stream is best effort: the first part of another attempt begins anew, as its start would have."""
    follow = follower()
    for one in told("half an ", end=False):
        follow.take(one)
    _, *rest = told("It is ", "late.", attempt=2)
    restarted = []
    for one in rest:
        follow.take(one)
        restarted.append(follow.restarted)
    assert follow.text == "It is late."
    assert restarted == [True, False, False]
