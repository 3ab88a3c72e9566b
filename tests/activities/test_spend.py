"""Spending, on SQLite and on a real PostgreSQL (see conftest): counted once, and never more than was allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError

from activities.entries import AssistantMessage, Entry
from activities.ledger import Ledger
from activities.spend import Spending
from workflows.budget import (
    Cost,
    LiftRecord,
    LiftRequest,
    Limit,
    LimitScope,
    Measure,
    Need,
    Per,
    Refusal,
    Spent,
)
from workflows.errors import Remedy
from workflows.messages import Usage

AGENT = "agent/store/desk/customer-1"
OTHER_KEY = "agent/store/desk/customer-2"
OTHER_AGENT = "agent/store/logistics/order-1"
OTHER_TENANT = "agent/stores/desk/customer-1"
NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
NEED = Need(tokens=100, micro_usd=1000, turns=1)


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spending(ledger: Ledger, clock: Clock) -> Spending:
    return Spending(ledger, clock)


def step(agent: str = AGENT, turn: int = 1, number: int = 1, *, at: datetime = NOON, tokens: int = 70) -> Entry:
    return Entry(
        workflow_id=agent,
        turn=turn,
        step=number,
        parent=None,
        messages=[AssistantMessage(text=f"{agent} {turn} {number}")],
        usage=Usage(input_tokens=tokens - 10, output_tokens=10),
        recorded_at=at.isoformat(),
    )


def limit(scope: LimitScope = LimitScope.KEY, per: Per = Per.DAY, **of: Any) -> Limit:
    return Limit(scope=scope, per=per, **of)


def lift(record_id: str, agent: str = AGENT, scope: LimitScope = LimitScope.KEY, **extra: int) -> LiftRecord:
    request = LiftRequest(id=record_id, by="ada", reason="a test", **extra)  # type: ignore[arg-type]
    return LiftRecord(workflow_id=agent, turn=1, scope=scope, per=Per.DAY, request=request)


async def spent(spending: Spending, place: str, per: Per = Per.DAY) -> Spent:
    return next(one.spent for one in await spending.accounts(place) if one.per is per)


async def reserved(spending: Spending, place: str) -> Spent:
    return (await spending.accounts(place))[0].reserved


# Counting ------------------------------------------------------------------------------------------------------------


async def test_a_step_is_counted_for_its_key_its_agent_and_its_tenant(spending: Spending) -> None:
    """And for nobody else; money that is not known is said to be unknown."""
    await spending.record(step(), Cost(micro_usd=1200))
    await spending.record(step(number=2), Cost(micro_usd=300))
    await spending.record(step(OTHER_KEY), Cost(unpriced=1))
    await spending.record(step(OTHER_AGENT), Cost(micro_usd=5))
    await spending.record(step(OTHER_TENANT), Cost(micro_usd=7))
    assert await spent(spending, AGENT) == Spent(tokens=140, micro_usd=1500, turns=1, calls=2)
    assert await spent(spending, "agent/store/desk") == Spent(tokens=210, micro_usd=1500, turns=2, calls=3, unpriced=1)
    assert await spent(spending, "agent/store") == Spent(tokens=280, micro_usd=1505, turns=3, calls=4, unpriced=1)
    assert [one.place for one in await spending.below("agent/store", Per.DAY, limit=9)] == [
        "agent/store/desk",
        "agent/store/logistics",
    ]
    assert [one.place for one in await spending.below("agent/store/desk", Per.TOTAL, limit=1)] == [AGENT]


async def test_a_step_that_is_recorded_again_is_counted_once(spending: Spending) -> None:
    """P6: twenty tries at once; all are told what the first has cost."""
    tries = [
        spending.record(step().model_copy(update={"recorded_at": (NOON + timedelta(seconds=n)).isoformat()}), cost)
        for n in range(20)
        for cost in [Cost(micro_usd=100 + n)]
    ]
    recorded = await asyncio.gather(*tries)
    assert len({(entry.id, cost) for entry, cost in recorded}) == 1
    assert await spending.record(*recorded[0]) == recorded[0]
    entry, cost = recorded[0]
    assert await spent(spending, "agent/store") == Spent(tokens=70, micro_usd=cost.micro_usd, turns=1, calls=1)
    assert await spending.cost([entry.id, "none"]) == cost
    assert await spending.cost([]) == Cost()


async def test_a_day_a_month_and_ever_are_their_days(spending: Spending, clock: Clock) -> None:
    """UTC; what was recorded before midnight is of the day before."""
    await spending.record(step(turn=1, at=NOON), Cost(micro_usd=1))
    await spending.record(step(turn=2, at=NOON.replace(day=1)), Cost(micro_usd=10))
    await spending.record(step(turn=3, at=NOON.replace(month=10)), Cost(micro_usd=100))
    by_window = {one.per: one for one in await spending.accounts(AGENT)}
    assert [by_window[per].spent.micro_usd for per in Per] == [1, 11, 111]
    assert [by_window[per].until for per in Per] == [
        datetime(2026, 12, 1, tzinfo=UTC),
        datetime(2026, 12, 1, tzinfo=UTC),
        None,
    ]
    clock.now = NOON + timedelta(hours=12)
    by_window = {one.per: one for one in await spending.accounts(AGENT)}
    assert [by_window[per].spent.micro_usd for per in Per] == [0, 0, 111]


# Limits --------------------------------------------------------------------------------------------------------------


async def test_what_a_call_may_take_is_set_aside_and_the_truth_is_counted(spending: Spending) -> None:
    """Before the call at most, after it what was used."""
    assert await spending.reserve(AGENT, 1, 1, [limit(tokens=100)], NEED) is None
    assert await reserved(spending, "agent/store") == Spent(tokens=100, micro_usd=1000, turns=1, calls=1)
    await spending.record(step(), Cost(micro_usd=1))
    assert await reserved(spending, "agent/store") == Spent()
    assert await spent(spending, AGENT) == Spent(tokens=70, micro_usd=1, turns=1, calls=1)


@pytest.mark.parametrize(
    ("of", "measure"), [({"tokens": 169}, "tokens"), ({"usd": Decimal("0.002199")}, "usd"), ({"turns": 1}, "turns")]
)
@pytest.mark.parametrize("scope", list(LimitScope))
async def test_a_call_that_might_break_a_limit_is_refused(
    spending: Spending, scope: LimitScope, of: dict[str, Any], measure: str
) -> None:
    """P10: of tokens, money and turns; for a key, an agent, a tenant. Nothing is set aside for it."""
    await spending.record(step(), Cost(micro_usd=1200))
    refused = await spending.reserve(AGENT, 2, 1, [limit(scope, **of)], NEED)
    assert refused is not None
    assert (refused.scope, refused.measure, refused.per) == (scope, Measure(measure), Per.DAY)
    assert refused.until == datetime(2026, 12, 1, tzinfo=UTC)
    assert refused.lifts_with == 1
    assert await reserved(spending, AGENT) == Spent()
    assert await spending.reserve(OTHER_TENANT, 2, 1, [limit(scope, **of)], NEED) is None


async def test_after_its_window_a_limit_begins_anew(spending: Spending, clock: Clock) -> None:
    """A day's at midnight; one in total never."""
    await spending.record(step(), Cost())
    limits = [limit(turns=1)]
    assert await spending.reserve(AGENT, 2, 1, limits, NEED) is not None
    clock.now = datetime(2026, 12, 1, tzinfo=UTC)
    assert await spending.reserve(AGENT, 2, 1, limits, NEED) is None
    refused = await spending.reserve(AGENT, 2, 1, [limit(per=Per.TOTAL, turns=1)], NEED)
    assert refused is not None
    assert refused.until is None


async def test_agents_that_ask_at_once_never_get_more_together_than_there_is(spending: Spending) -> None:
    """Ten places for fifty agents: ten calls are made, the others are told to try again, and nobody is refused."""
    limits = [limit(LimitScope.TENANT, tokens=1000), limit(LimitScope.AGENT, tokens=10_000)]
    agents = [f"agent/store/desk-{number % 3}/customer-{number}" for number in range(50)]
    answers = await asyncio.gather(
        *(spending.reserve(agent, 1, 1, limits, NEED) for agent in agents), return_exceptions=True
    )
    made = [agent for agent, answer in zip(agents, answers, strict=True) if answer is None]
    assert len(made) == 10
    waiting = [answer for answer in answers if isinstance(answer, ApplicationError)]
    assert len(waiting) == 40
    assert {(error.type, error.non_retryable) for error in waiting} == {(Remedy.RETRY_LATER, False)}
    assert all(error.next_retry_delay for error in waiting)
    for agent in made:
        await spending.record(step(agent, tokens=100), Cost())
    assert isinstance(await spending.reserve(agents[-1], 1, 1, limits, NEED), Refusal)
    assert (await spent(spending, "agent/store")).tokens == 1000


async def test_the_retry_of_a_killed_worker_takes_over_what_was_set_aside(spending: Spending) -> None:
    """And what another has set aside for another step meanwhile is not touched by the late one."""
    limits = [limit(tokens=100)]
    assert await spending.reserve(AGENT, 1, 1, limits, NEED) is None
    assert await spending.reserve(AGENT, 1, 1, limits, NEED) is None
    assert (await reserved(spending, AGENT)).calls == 1
    await spending.record(step(), Cost())
    later = [limit(tokens=1000)]
    assert await spending.reserve(AGENT, 1, 2, later, NEED.model_copy(update={"tokens": 200})) is None
    assert await spending.reserve(AGENT, 1, 1, later, NEED) is None
    await spending.release(AGENT, 1, 1)
    assert (await reserved(spending, AGENT)).tokens == 200
    await spending.release(AGENT, 1, 2)
    assert await reserved(spending, AGENT) == Spent()


async def test_what_a_dead_agent_has_set_aside_is_given_back(spending: Spending, clock: Clock) -> None:
    """A workflow that was terminated in mid-call must not keep its tenant from working for ever."""
    limits = [limit(LimitScope.TENANT, tokens=150)]
    assert await spending.reserve(AGENT, 1, 1, limits, NEED) is None
    with pytest.raises(ApplicationError, match="set aside for other calls"):
        await spending.reserve(OTHER_KEY, 1, 1, limits, NEED)
    clock.now += timedelta(hours=7)
    assert await spending.reserve(OTHER_KEY, 1, 1, limits, NEED) is None


async def test_a_lift_allows_so_much_more_until_the_window_ends(spending: Spending, clock: Clock) -> None:
    """For all whom the limit is about, and once, however often it is asked for."""
    limits = [limit(LimitScope.TENANT, tokens=99)]
    assert await spending.reserve(AGENT, 1, 1, limits, NEED) is not None
    lifted = await spending.lift(lift("l-1", scope=LimitScope.TENANT, tokens=1))
    assert (lifted.tokens, lifted.by, lifted.reason, lifted.until) == (
        1,
        "ada",
        "a test",
        datetime(2026, 12, 1, tzinfo=UTC),
    )
    clock.now += timedelta(hours=1)
    assert await spending.lift(lift("l-1", scope=LimitScope.TENANT, tokens=1)) == lifted
    assert (await spending.accounts("agent/store", limits))[0].lifted == Spent(tokens=1)
    assert await spending.reserve(OTHER_AGENT, 1, 1, limits, NEED) is None
    await spending.release(OTHER_AGENT, 1, 1)
    clock.now += timedelta(days=1)
    assert await spending.reserve(AGENT, 1, 1, limits, NEED) is not None


async def test_without_limits_nothing_is_set_aside(spending: Spending) -> None:
    """And no database is asked."""
    assert await spending.reserve(AGENT, 1, 1, [], NEED) is None
    assert await reserved(spending, AGENT) == Spent()


async def test_a_database_that_was_there_before_gets_the_tables(url: str, clock: Callable[[], datetime]) -> None:
    """A ledger of an older release goes on, and its steps have cost what nobody knows."""
    async with Ledger(url) as ledger:
        old = await ledger.append(step())
    async with Ledger(url) as ledger:
        spending = Spending(ledger, clock)
        assert await spending.cost([old.id]) == Cost()
        await spending.record(step(number=2), Cost(micro_usd=3))
        assert await spent(spending, AGENT) == Spent(tokens=70, micro_usd=3, calls=1)
