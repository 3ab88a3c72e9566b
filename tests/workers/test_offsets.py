"""The frontier of a partition, and the watchdog over its reader."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.offsets import Frontier, Watchdog


@given(st.sets(st.integers(0, 50), min_size=1).map(sorted), st.data())
def test_the_position_is_the_first_unfinished_record(offsets: list[int], data: st.DataObject) -> None:
    """P3: never past a record that is not finished, never short of what could be committed; gaps do not count."""
    frontier = Frontier()
    assert frontier.position is None
    begun: list[int] = []
    unfinished: list[int] = []
    while offsets or unfinished:
        if offsets and (not unfinished or data.draw(st.booleans())):
            begun.append(offsets.pop(0))
            unfinished.append(begun[-1])
            frontier.begin(begun[-1])
        else:
            offset = data.draw(st.sampled_from(unfinished))
            unfinished.remove(offset)
            frontier.finish(offset)
        assert frontier.next == begun[-1] + 1
        assert frontier.position == min(unfinished, default=begun[-1] + 1)
        assert len(frontier) == sum(offset >= min(unfinished, default=99) for offset in begun)


@pytest.mark.parametrize("offset", [4, 5])
def test_an_offset_that_was_read_before_is_refused(offset: int) -> None:
    """Two logs must not be mixed up in one frontier."""
    frontier = Frontier()
    frontier.begin(5)
    with pytest.raises(ValueError, match="after offset 5 was read"):
        frontier.begin(offset)


def test_the_watchdog_barks_when_records_wait_and_the_position_stands_still() -> None:
    """P5: a reader that is stuck without an error is noticed after the patience, counted from its last move."""
    watchdog = Watchdog(patience=60)

    def seen(now: float, position: int | None, *, end: int = 10, held: bool = False) -> bool:
        return watchdog.stuck("p", position=position, end=end, held=held, now=now)

    assert not seen(0, 5)
    assert not seen(59, 5)
    assert seen(60, 5)
    assert not seen(61, 6), "it moved"
    assert not seen(120, 6)
    assert seen(121, 6)
    assert not seen(122, 6, held=True), "it is paused"
    assert not seen(181, 6)
    assert not seen(182, 10), "it has read all"
    assert not seen(300, 10)
    assert not seen(301, 10, end=11), "a new record waits only now"
    assert not seen(302, None), "a position that nobody knows is no position"
    assert seen(362, None)
    assert not seen(400, 20), "it is beyond the end"
    assert seen(460, 20)
    watchdog.reset()
    assert not seen(363, None)
    assert not watchdog.stuck("q", position=5, end=10, held=False, now=500)
