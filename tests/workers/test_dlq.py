"""Dead letters as people see them: what is on the topic, what was done about it, who is meant by a filter. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.deadletter import DeadLetter
from workers.dlq import Filter, Letter, Resolution, State, gather, pick
from workers.exits import BAD_INPUT, CommandError
from workers.records import Record
from workflows import names

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def dead(*, offset: int = 0, reason: str = "not_json", topic: str = "store.events", at: datetime = NOON) -> DeadLetter:
    original = Record(topic, 0, offset, 1, b"key", b"{", (("h", b"1"),))
    return DeadLetter(
        original=original, group="g", reason=reason, message="broken", attempts=1, first_failed=at, last_failed=at
    )


def written(letter: DeadLetter, *, partition: int = 0, offset: int = 0) -> Record:
    """The record of a dead letter, as it stands on the dead-letter topic."""
    headers = tuple(letter.headers)
    return Record(names.DEAD_LETTER_TOPIC, partition, offset, 1, letter.original.key, letter.value, headers)


def resolved(letter: str, state: State, *, at: datetime = NOON) -> Record:
    done = Resolution(letter=letter, state=state, by="ada", why="a test", at=at)
    return Record(names.DEAD_LETTER_TOPIC, 1, 99, 1, b"key", b"", tuple(done.headers))


def test_letters_are_named_by_their_place_and_the_oldest_comes_first() -> None:
    """The name is what `show`, `redrive` and `drop` take; it never changes."""
    late, early = dead(offset=7, at=NOON + timedelta(hours=1)), dead(offset=9)
    found = gather([written(late, partition=2, offset=17), written(early, partition=0, offset=4)])
    assert [(letter.id, letter.letter, letter.state) for letter in found] == [
        ("0-4", early, State.OPEN),
        ("2-17", late, State.OPEN),
    ]


def test_the_newest_resolution_counts() -> None:
    """Dropped, and redriven after all: it is redriven, in whatever order partitions are read."""
    records = [
        resolved("0-0", State.REDRIVEN, at=NOON + timedelta(hours=2)),
        written(dead()),
        resolved("0-0", State.DROPPED, at=NOON + timedelta(hours=1)),
    ]
    (letter,) = gather(records)
    assert (letter.state, letter.resolution and letter.resolution.by) == (State.REDRIVEN, "ada")


def test_a_record_that_was_dead_lettered_twice_is_one_letter() -> None:
    """Ingest may die between writing it and committing that; whichever was resolved, the letter is."""
    twice = [written(dead()), written(dead(at=NOON + timedelta(minutes=1)), partition=2, offset=5)]
    for records in (twice, twice[::-1]):
        (letter,) = gather(records)
        assert (letter.id, letter.state) == ("0-0", State.OPEN)
        for name in ("0-0", "2-5"):
            (letter,) = gather([*records, resolved(name, State.DROPPED)])
            assert (letter.id, letter.state) == ("0-0", State.DROPPED)
    other = dead().model_copy(update={"original": replace(dead().original, timestamp=2)})
    assert len(gather([*twice, written(other, offset=9)])) == 2, "of a topic that was made anew"


def test_what_others_put_on_the_topic_is_left_alone() -> None:
    """A record that is neither a letter nor a resolution hides nothing and breaks nothing."""
    noise = Record(names.DEAD_LETTER_TOPIC, 0, 1, 1, b"k", b"hello", (("dlq.letter", b"0-0"),))
    half = Record(names.DEAD_LETTER_TOPIC, 0, 2, 1, b"k", b"", (("dlq.letter", b"0-0"), ("dlq.state", b"mended")))
    (letter,) = gather([noise, written(dead()), half])
    assert letter.state is State.OPEN


@given(
    st.builds(
        Resolution,
        letter=st.from_regex(r"\d{1,3}-\d{1,9}", fullmatch=True),
        state=st.sampled_from(State),
        by=st.text(),
        why=st.text(),
        at=st.datetimes(timezones=st.just(UTC)),
    )
)
def test_a_resolution_is_read_as_it_was_written(done: Resolution) -> None:
    """Whatever people are called and give as their reason."""
    record = Record(names.DEAD_LETTER_TOPIC, 0, 0, 1, None, b"", tuple(done.headers))
    assert Resolution.parse(record) == done


@pytest.mark.parametrize(
    ("wanted", "names_of"),
    [
        (Filter(), ["0-0", "0-1"]),
        (Filter(state=State.DROPPED), ["0-2"]),
        (Filter(state=None), ["0-0", "0-1", "0-2"]),
        (Filter(reason="bad_*"), ["0-1"]),
        (Filter(topic="store.*", state=None), ["0-0", "0-2"]),
        (Filter(since=NOON + timedelta(minutes=30)), ["0-1"]),
    ],
)
def test_filters(wanted: Filter, names_of: list[str]) -> None:
    """By what was done, reason, origin and time; open ones unless it is said otherwise."""
    letters = gather(
        [
            written(dead()),
            written(dead(reason="bad_time", topic="crm", at=NOON + timedelta(hours=1)), offset=1),
            written(dead(offset=5), offset=2),
            resolved("0-2", State.DROPPED),
        ]
    )
    assert sorted(letter.id for letter in letters if wanted.wants(letter)) == names_of


def test_a_name_that_is_none_is_said() -> None:
    """A typing mistake redrives nothing: status 2, before anything is sent."""
    letters = [Letter(id="0-0", letter=dead())]
    assert pick(letters, ["0-0", "0-0"]) == letters
    with pytest.raises(CommandError, match="no dead letter 0-1, 0-2") as refused:
        pick(letters, ["0-0", "0-1", "0-2"])
    assert refused.value.status == BAD_INPUT


def test_a_record_with_neither_key_nor_value_can_be_kept() -> None:
    """Our client can't write such a record; what is written instead gives the original back."""
    empty = Record("store.events", 3, 8, 5, None, None)
    letter = dead().model_copy(update={"original": empty})
    assert letter.value == b""
    assert DeadLetter.parse(written(letter)).original == empty
