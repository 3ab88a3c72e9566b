"""What an agent may say to be woken, and when it is; without any server."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from fakes import event
from hypothesis import given
from hypothesis import strategies as st

from workflows import names
from workflows.durations import duration
from workflows.messages import ToolCall, WakeUp
from workflows.wake_ups import LONGEST, definitions, described, due, next_due, use

NOW = datetime(2026, 3, 1, 9, tzinfo=UTC)
AGENT = "agent/acme/logistics/order-42"
UNITS = {"seconds": 1, "s": 1, "min": 60, "minutes": 60, "h": 3600, "hours": 3600, "days": 86_400, "weeks": 604_800}


def wake_up(number: int, after: timedelta | None = None, when: str = "") -> WakeUp:
    return WakeUp(id=f"1-1-{number}", note=f"note {number}", set_at=NOW, due=NOW + after if after else None, when=when)


def run(
    name: str, known: list[WakeUp] | None = None, *, key: str = "2-1-0", at_most: int = 20, **arguments: Any
) -> tuple[list[WakeUp], str]:
    call = ToolCall(id="c", name=name, arguments=json.dumps(arguments))
    return use(call, key, known or [], at_most=at_most, now=NOW)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"in": "3 days"}, NOW + timedelta(days=3)),
        ({"in": "1h30m"}, NOW + timedelta(minutes=90)),
        ({"in": "2 weeks, 1 day and 4 hours"}, NOW + timedelta(days=15, hours=4)),
        ({"in": 90}, NOW + timedelta(seconds=90)),
        ({"in": "90"}, NOW + timedelta(seconds=90)),
        ({"at": "2026-03-02T09:00:00+02:00"}, NOW + timedelta(hours=22)),
        ({"at": "2026-03-02T09:00:00Z", "when": "store.parcel.*"}, NOW + timedelta(days=1)),
        ({"when": "store.parcel.*"}, None),
    ],
)
def test_an_agent_says_when_it_is_woken(said: dict[str, Any], expected: datetime | None) -> None:
    """At a time, in some time, when an event comes; the result says how it was understood, and what time it is."""
    (one,), told = run(names.WAKE_ME, note="check the parcel", **said)
    assert (one.id, one.note, one.set_at, one.due) == ("2-1-0", "check the parcel", NOW, expected)
    assert one.when == said.get("when", "")
    assert told == f"Set: you are woken {described(one)}. Its id is 2-1-0. It is 2026-03-01T09:00:00+00:00 now."


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"in": "3 days"}, "note: Field required"),
        ({"note": "", "in": 9}, "note: String should have at least 1 character"),
        ({"note": "x" * 1001, "in": 9}, "note: String should have at most 1000 characters"),
        ({"note": "x"}, "say at what time, in how long, or when which event comes"),
        ({"note": "x", "in": 9, "at": "2026-03-02T09:00:00Z"}, "either at or in, not both"),
        ({"note": "x", "in": "soon"}, "'soon' is no duration"),
        ({"note": "x", "in": "3 daysish"}, "is no duration"),
        ({"note": "x", "in": "-3 days"}, "is no duration"),
        ({"note": "x", "in": 0}, "not in the future"),
        ({"note": "x", "at": "2026-03-01T08:59:00Z"}, "2026-03-01T08:59:00+00:00 is not in the future"),
        ({"note": "x", "at": "2026-03-02T09:00:00"}, "at: Input should have timezone info"),
        ({"note": "x", "in": "300 weeks"}, "is more than 1830 days away"),
        ({"note": "x", "in": "999999999 weeks"}, "too far away"),
        ({"note": "x", "at": "0001-01-01T00:00:00+14:00"}, "too far away"),
        ({"note": "x", "in": 9, "wen": "x"}, "wen: Extra inputs are not permitted"),
    ],
)
def test_what_can_t_be_set_is_refused_with_what_to_do(said: dict[str, Any], complaint: str) -> None:
    """P14: the model wrote it, and is told so that it can write it right."""
    with pytest.raises(ValueError, match=r"Wrong arguments|Not set|duration") as refused:
        run(names.WAKE_ME, **said)
    assert complaint in str(refused.value)


def test_arguments_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Wrong arguments: .*Invalid JSON"):
        use(ToolCall(id="c", name=names.WAKE_ME, arguments="{"), "1-1-0", [], at_most=20, now=NOW)


def test_a_call_that_is_made_again_sets_one_wake_up() -> None:
    """P9: its key says that it is the same."""
    once, _ = run(names.WAKE_ME, note="x", **{"in": 9})
    twice, _ = run(names.WAKE_ME, once, at_most=1, note="x", **{"in": 9})
    assert once == twice


def test_no_more_are_set_than_may_be() -> None:
    known = [wake_up(number, timedelta(days=1)) for number in range(2)]
    with pytest.raises(ValueError, match="2 wake-ups are set already"):
        run(names.WAKE_ME, known, at_most=2, note="x", **{"in": 9})


def test_wake_ups_are_listed_and_cancelled() -> None:
    known = [wake_up(1, timedelta(days=1)), wake_up(2, when="a.*"), wake_up(3, timedelta(hours=1), "b")]
    same, told = run(names.LIST_WAKE_UPS, known)
    assert same == known
    assert told.splitlines() == [
        "It is 2026-03-01T09:00:00+00:00. Wake-ups set: 3.",
        "1-1-1: at 2026-03-02T09:00:00+00:00. Note: note 1",
        "1-1-2: when a.* comes. Note: note 2",
        "1-1-3: when b comes, or at 2026-03-01T10:00:00+00:00 at the latest. Note: note 3",
    ]
    left, told = run(names.CANCEL_WAKE_UP, known, id="1-1-2")
    assert left == [known[0], known[2]]
    assert told.startswith("Cancelled. Wake-ups set: 2.")
    with pytest.raises(ValueError, match=r"No wake-up '1-1-2' is set, .*Set are: 1-1-1, 1-1-3"):
        run(names.CANCEL_WAKE_UP, left, id="1-1-2")


def test_a_wake_up_rings_at_its_time_or_with_its_event() -> None:
    """Whichever is first; the event says why, when it was to be, and how late it is."""
    known = [
        wake_up(1, timedelta(hours=2)),
        wake_up(2, timedelta(hours=1)),
        wake_up(3, timedelta(days=9), "test.*"),
        wake_up(4, when="other.event"),
        wake_up(5, timedelta(days=1)),
    ]
    now = NOW + timedelta(hours=3)
    ringing, left = due(known, now, [event(7)])
    assert [one.wake_up.id for one in ringing] == ["1-1-2", "1-1-1", "1-1-3"]
    assert left == [known[3], known[4]]
    first, _, last = (one.event(AGENT, now) for one in ringing)
    assert (first.id, first.source, first.type) == (f"{AGENT}/wake/1-1-2", AGENT, names.WAKE_TYPE)
    assert first.subject == "order-42"
    assert first.data == {
        "note": "note 2",
        "set_at": "2026-03-01T09:00:00+00:00",
        "due": "2026-03-01T10:00:00+00:00",
        "late_seconds": 7200,
    }
    assert isinstance(last.data, dict)
    assert last.data["event"] == {"source": "test", "id": "event-7", "type": "test.event"}
    assert "late_seconds" not in last.data


@pytest.mark.parametrize("kind", [names.WAKE_TYPE, names.HOLD_TYPE, names.RELEASE_TYPE])
def test_its_own_wake_ups_and_dead_letters_are_no_events_to_wait_for(kind: str) -> None:
    """Else `*` would have one wake-up set off the other."""
    assert due([wake_up(1, when="*")], NOW, [event(1, kind=kind)]) == ([], [wake_up(1, when="*")])


@given(st.lists(st.tuples(st.integers(1, 9999), st.sampled_from(sorted(UNITS))), min_size=1, max_size=4), st.data())
def test_durations_add_up(parts: list[tuple[int, str]], data: st.DataObject) -> None:
    """However they are spaced and joined."""
    joint = data.draw(st.sampled_from(["", " ", ", ", " and "]))
    text = joint.join(f"{number}{data.draw(st.sampled_from(['', ' ']))}{unit}" for number, unit in parts)
    assert duration(text) == timedelta(seconds=sum(number * UNITS[unit] for number, unit in parts))


@given(st.text(max_size=30))
def test_any_text_is_a_duration_or_refused_as_none(text: str) -> None:
    try:
        assert duration(text) >= timedelta(0)
    except (ValueError, OverflowError) as error:
        assert "is no duration" in str(error) or isinstance(error, OverflowError)  # noqa: PT017  # either is right


@given(st.lists(st.integers(-5, 5)), st.integers(0, 5))
def test_each_wake_up_rings_once_and_none_is_lost(hours: list[int], wait: int) -> None:
    """P1: those due ring, in order; the rest is left, in order; the next one is the earliest of these."""
    known = [wake_up(number, timedelta(hours=at)) for number, at in enumerate(hours) if at]
    now = NOW + timedelta(hours=wait)
    ringing, left = due(known, now, [])
    rang = [one.wake_up for one in ringing]
    assert sorted([*rang, *left], key=lambda one: one.id) == sorted(known, key=lambda one: one.id)
    assert all(one.due and one.due <= now for one in rang)
    assert [one.due for one in rang] == sorted(one.due for one in rang if one.due)
    assert next_due(left) == min(left, key=lambda one: one.due or NOW, default=None)
    assert not due(left, now, [])[0]


def test_the_model_is_told_how_to_call_each_tool() -> None:
    """`in` is a word of Python's, and the schema has it; none of them is an activity."""
    tools = {tool.name: tool for tool in definitions()}
    assert set(tools) == {names.WAKE_ME, names.LIST_WAKE_UPS, names.CANCEL_WAKE_UP}
    assert all(tool.built_in and tool.description for tool in tools.values())
    wake_me: Any = tools[names.WAKE_ME].parameters
    assert set(wake_me["properties"]) == {"note", "at", "in", "when"}
    assert wake_me["required"] == ["note"]


def test_the_longest_is_some_years() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=5))) + LONGEST
    (one,), _ = run(names.WAKE_ME, note="x", at=there.isoformat())
    assert one.due == there
