"""Vectors: packed, compared and ranked; and two searches made one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from activities.vectors import fused, nearest, packed

_numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)
_orders = st.lists(st.lists(st.integers(0, 20), unique=True), max_size=3)


def cosine(one: list[float], other: list[float]) -> float:
    """By the book."""
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


@given(st.lists(st.lists(_numbers, min_size=4, max_size=4), min_size=2, max_size=8), st.floats(-1, 1))
def test_the_nearest_are_those_of_the_least_angle(rows: list[list[float]], least: float) -> None:
    """All that are near enough, the nearest first, whatever the lengths of the vectors."""
    assume(all(math.hypot(*row) > 1e-3 for row in rows))
    wanted, *others = rows
    nearness = {number: cosine(wanted, other) for number, other in enumerate(others)}
    assume(all(abs(found - least) > 1e-4 for found in nearness.values()))
    found = nearest(
        packed(wanted), [(number, packed(other)) for number, other in enumerate(others)], least=least, count=9
    )
    assert set(found) == {number for number, near in nearness.items() if near > least}
    assert all(nearness[a] >= nearness[b] - 1e-4 for a, b in pairwise(found))


def test_vectors_of_other_models_are_near_to_nothing() -> None:
    """Of another number of dimensions: they can't be compared."""
    assert nearest(packed([1, 0]), [("a", packed([1, 0, 0])), ("b", packed([1, 0.1]))], least=0, count=5) == ["b"]
    assert nearest(packed([1, 0]), [("a", packed([1, 0])), ("b", packed([1, 0.1]))], least=0, count=1) == ["a"]


@pytest.mark.parametrize("numbers", [[], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_what_points_nowhere_is_no_vector(numbers: list[float]) -> None:
    """A server that answers so is taken for broken."""
    with pytest.raises(ValueError, match="points nowhere"):
        packed(numbers)


def test_a_packed_vector_never_changes() -> None:
    """It is in the database: float32, little-endian, of length 1."""
    assert packed([3.0, -4.0]).hex() == "9a99193fcdcc4cbf"


@given(_orders)
def test_fused_is_all_that_was_found_once(orders: list[list[int]]) -> None:
    """And what every search has before another stays before it."""
    found = fused(orders)
    assert len(found) == len(set(found))
    assert set(found) == {name for order in orders for name in order}
    for one in found:
        for other in found:
            ahead = all(
                one in order and (other not in order or order.index(one) < order.index(other)) for order in orders
            )
            if one != other and ahead:
                assert found.index(one) < found.index(other)


def test_what_both_searches_find_comes_first() -> None:
    """Though neither has it first; of equals, what the first search has."""
    assert fused([["a", "b"], ["c", "b"]]) == ["b", "a", "c"]
    assert fused([["a"], []]) == ["a"]
    assert fused([]) == []
