"""P10: what may still be spent is decided before the call, without Temporal and without a database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from workflows.budget import (
    Limit,
    LimitScope,
    Measure,
    Need,
    Per,
    Refusal,
    Spent,
    Standing,
    amount,
    refusal,
    usd,
    window,
)

INSTANTS = st.datetimes(
    min_value=datetime(1971, 1, 1, tzinfo=UTC).replace(tzinfo=None),
    max_value=datetime(2200, 1, 1, tzinfo=UTC).replace(tzinfo=None),
    timezones=st.just(UTC),
)
NUMBERS = st.integers(0, 10**9)
SPENT = st.builds(Spent, tokens=NUMBERS, micro_usd=NUMBERS, turns=NUMBERS)
LIMITS = st.builds(
    Limit,
    scope=st.sampled_from(LimitScope),
    per=st.sampled_from(Per),
    tokens=st.integers(1, 10**9),
    usd=st.none() | st.integers(1, 10**9).map(lambda micro: Decimal(micro) / 1_000_000),
    turns=st.none() | st.integers(1, 10**9),
)
STANDINGS = st.builds(Standing, limit=LIMITS, spent=SPENT, reserved=SPENT, lifted=SPENT, until=st.none() | INSTANTS)
NEEDS = st.builds(Need, tokens=NUMBERS, micro_usd=st.none() | NUMBERS, turns=st.integers(0, 1))


@given(standings=st.lists(STANDINGS, max_size=5), need=NEEDS)
def test_a_call_is_made_exactly_if_it_keeps_to_every_limit(standings: list[Standing], need: Need) -> None:
    """With what is spent, set aside for others and needed at most; what people have allowed counts."""
    broken = any(
        needed != 0
        and (
            needed is None or one.spent.of(measure) + one.reserved.of(measure) + needed > limit + one.lifted.of(measure)
        )
        for one in standings
        for measure in Measure
        if (limit := one.limit.of(measure)) is not None
        for needed in [need.of(measure)]
    )
    assert (refusal(standings, need) is not None) == broken


@given(standings=st.lists(STANDINGS, min_size=1, max_size=5), need=NEEDS)
def test_as_much_more_as_it_says_lets_the_call_be_made(standings: list[Standing], need: Need) -> None:
    """An operator who allows what is missing, limit after limit, has the agent go on."""
    for _ in range(len(standings) * len(Measure)):
        refused = refusal(standings, need)
        if refused is None or refused.needed is None:
            break
        missing = refused.lifts_with
        assert missing is not None
        assert missing > 0
        field = "micro_usd" if refused.measure is Measure.USD else refused.measure.value
        standings = [
            one.model_copy(
                update={"lifted": one.lifted.model_copy(update={field: one.lifted.of(refused.measure) + missing})}
            )
            if (one.limit.scope, one.limit.per) == (refused.scope, refused.per)
            else one
            for one in standings
        ]
    refused = refusal(standings, need)
    assert refused is None or refused.needed is None


def test_of_several_limits_the_one_is_named_that_holds_for_longest() -> None:
    """The agent waits once, and not again a minute later; one that only others' calls are in the way of comes last."""
    midnight = datetime(2026, 11, 28, tzinfo=UTC)
    used_up = Spent(tokens=10)
    day = Standing(limit=Limit(tokens=10), spent=used_up, until=midnight)
    month = Standing(limit=Limit(per=Per.MONTH, tokens=10), spent=used_up, until=midnight + timedelta(days=3))
    ever = Standing(limit=Limit(per=Per.TOTAL, tokens=10), reserved=used_up)
    need = Need(tokens=1, micro_usd=0)
    for standings, per in (([day, month], Per.MONTH), ([ever, day], Per.DAY), ([ever], Per.TOTAL)):
        refused = refusal(standings, need)
        assert refused is not None
        assert refused.per is per
        assert refused.passes == (per is Per.TOTAL)


def test_a_price_that_is_not_known_is_never_nothing() -> None:
    """A limit in dollars refuses the call and says what to do; one in tokens does not mind."""
    need = Need(tokens=10, micro_usd=None, unpriced="openai-chat:house (pool house)")
    assert refusal([Standing(limit=Limit(tokens=10))], need) is None
    refused = refusal([Standing(limit=Limit(usd=Decimal(5), tokens=10))], need)
    assert refused is not None
    assert refused.lifts_with is None
    assert not refused.passes
    assert "openai-chat:house (pool house) is not known; set `price` of its pool" in str(refused)


@given(per=st.sampled_from(Per), at=INSTANTS, offset=st.integers(-14, 14))
def test_a_window_holds_its_instant_wherever_it_is_said(per: Per, at: datetime, offset: int) -> None:
    """It is UTC's; its end begins the next one, and is the same for all that is in it."""
    found = window(per, at.astimezone(timezone(timedelta(hours=offset))))
    assert found == window(per, at)
    if per is Per.TOTAL:
        assert found == (None, None)
        return
    assert found.start is not None
    assert found.end is not None
    assert found.start <= at.date()
    assert at < found.end
    after = window(per, found.end)
    assert after.start == found.end.date()
    assert window(per, found.end - timedelta(microseconds=1)) == found


@pytest.mark.parametrize(
    ("micro", "text"), [(0, "$0.00"), (1, "$0.000001"), (1_500_000, "$1.50"), (1_234_567_891_000, "$1,234,567.891")]
)
def test_dollars_are_shown_as_they_are(micro: int, text: str) -> None:
    """Nothing is rounded away."""
    assert usd(micro) == text
    assert amount(micro, Measure.USD) == text


def test_a_refusal_in_words() -> None:
    """P13: which limit, how much, and until when."""
    refused = Refusal(
        scope=LimitScope.TENANT,
        per=Per.DAY,
        measure=Measure.USD,
        limit=5_000_000,
        spent=4_990_000,
        reserved=2_000,
        needed=20_000,
        until=datetime(2026, 11, 28, tzinfo=UTC),
    )
    assert str(refused) == (
        "the tenant's budget of $5.00 a day: $4.99 spent, $0.002 set aside for other calls, $0.02 needed; "
        "until 2026-11-28 00:00 UTC"
    )


@pytest.mark.parametrize(
    ("limit", "complaint"),
    [
        ({"scope": "key", "per": "day"}, "needs tokens, usd or turns"),
        ({"tokens": 0}, "greater than or equal to 1"),
        ({"usd": "0.0000001"}, "no more than 6 decimal places"),
        ({"usd": -1}, "greater than 0"),
        ({"per": "week", "tokens": 1}, "'day', 'month' or 'total'"),
    ],
)
def test_a_limit_that_is_none_is_refused(limit: dict[str, object], complaint: str) -> None:
    """P14."""
    with pytest.raises(ValidationError, match=complaint):
        Limit.model_validate(limit)
