"""What may still be spent: limits, and whether the next model call keeps to them. Pure.

    found = refusal([Standing(limit=limit, spent=spent, until=window.end)], Need(tokens=5000, micro_usd=1200, turns=1))

A limit holds for a scope (one key of an agent, an agent, a tenant) and a window of UTC time (a day, a month, or all
time). Money is counted in micro-dollars, as whole numbers: a float would lose some. Where the sums are kept is
`activities.spend`, how an agent waits that may not go on is `workflows.over_budget`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import override

_MICRO = 1_000_000
_DECEMBER = 12


class LimitScope(StrEnum):
    """Whose spending a limit is about."""

    KEY = "key"
    """This agent with this key alone, such as one customer's."""
    AGENT = "agent"
    """This agent, with all its keys together."""
    TENANT = "tenant"
    """All agents of the tenant together."""


class Per(StrEnum):
    """The time a limit is for; afterwards it begins anew. UTC."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"
    """For ever."""


class Measure(StrEnum):
    """What is counted."""

    TOKENS = "tokens"
    USD = "usd"
    """Counted in micro-dollars."""
    TURNS = "turns"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class Limit(_Data):
    """What a scope may spend in a window of time."""

    scope: LimitScope = LimitScope.KEY
    per: Per = Per.DAY
    tokens: int | None = Field(None, ge=1)
    """Into the model and out of it, together."""
    usd: Annotated[Decimal, Field(gt=0, decimal_places=6)] | None = None
    """US dollars. What calls cost is worked out from a table of prices; see `price` in models.yaml."""
    turns: int | None = Field(None, ge=1)
    """Turns that are begun."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.tokens is None and self.usd is None and self.turns is None:
            raise ValueError("a limit needs tokens, usd or turns")
        return self

    def of(self, measure: Measure) -> int | None:
        """How much of this may be spent; money in micro-dollars; None: as much as there is."""
        if measure is Measure.USD:
            return None if self.usd is None else int(self.usd * _MICRO)
        return self.tokens if measure is Measure.TOKENS else self.turns


class Cost(_Data):
    """What model calls have cost."""

    micro_usd: int = 0
    unpriced: int = 0
    """Calls whose price is not known: what they cost is not in the sum."""

    def __add__(self, other: Cost) -> Cost:
        """The sum of both."""
        return Cost(micro_usd=self.micro_usd + other.micro_usd, unpriced=self.unpriced + other.unpriced)


class Spent(_Data):
    """What was spent in a window, or is set aside for calls that are being made, or may be spent beyond the limit."""

    tokens: int = 0
    micro_usd: int = 0
    turns: int = 0
    calls: int = 0
    unpriced: int = 0
    """Calls whose price is not known."""

    def of(self, measure: Measure) -> int:
        """How much of this; money in micro-dollars."""
        return {Measure.TOKENS: self.tokens, Measure.USD: self.micro_usd, Measure.TURNS: self.turns}[measure]


class Need(_Data):
    """What a model call may take, at most."""

    tokens: int
    micro_usd: int | None
    """None: the price is not known."""
    turns: int = 0
    unpriced: str = ""
    """The model whose price is not known."""

    def of(self, measure: Measure) -> int | None:
        """How much of this; money in micro-dollars; None: not known."""
        return {Measure.TOKENS: self.tokens, Measure.USD: self.micro_usd, Measure.TURNS: self.turns}[measure]


class Standing(_Data):
    """A limit, and what counts towards it."""

    limit: Limit
    spent: Spent = Spent()
    reserved: Spent = Spent()
    """For calls that other agents are making now."""
    lifted: Spent = Spent()
    """What people have allowed beyond the limit."""
    until: datetime | None = None
    """When the window ends; None: never."""


class Refusal(_Data):
    """Why a model call may not be made: it might break this limit."""

    scope: LimitScope
    per: Per
    measure: Measure
    limit: int
    """With what people have allowed beyond it. Money in micro-dollars, as below."""
    spent: int
    reserved: int = 0
    """For calls that other agents were making."""
    needed: int | None
    """What the call may take, at most; None: the model's price is not known."""
    unpriced: str = ""
    """The model whose price is not known."""
    until: datetime | None = None
    """When the window ends; None: never."""

    @property
    def passes(self) -> bool:
        """Whether the call may be made once others' calls have come to less than was set aside for them."""
        return self.needed is not None and self.spent + self.needed <= self.limit

    @property
    def lifts_with(self) -> int | None:
        """How much more would have to be allowed; None: no amount helps, the price has to be made known."""
        return None if self.needed is None else self.spent + self.reserved + self.needed - self.limit

    def is_of_the_same_limit(self, other: Refusal | None) -> bool:
        """Whether the operator knows of it already."""
        return other is not None and (self.scope, self.per, self.measure, self.until) == (
            other.scope,
            other.per,
            other.measure,
            other.until,
        )

    @override
    def __str__(self) -> str:
        """In words, for the operator."""
        window = {Per.DAY: " a day", Per.MONTH: " a month", Per.TOTAL: " in total"}[self.per]
        budget = f"the {self.scope.value}'s budget of {amount(self.limit, self.measure)}{window}"
        if self.needed is None:
            return (
                f"{budget}: the price of {self.unpriced or 'the model'} is not known; set `price` of its pool in "
                "models.yaml"
            )
        others = f", {amount(self.reserved, self.measure)} set aside for other calls" if self.reserved else ""
        until = f"; until {self.until:%Y-%m-%d %H:%M} UTC" if self.until else ""
        return (
            f"{budget}: {amount(self.spent, self.measure)} spent{others}, {amount(self.needed, self.measure)} "
            f"needed{until}"
        )


class LiftRequest(_Data):
    """Asks to allow an agent more than its limits: the argument of the `lift_budget` update."""

    id: str = ""
    """Names the request: made again with the same id, it has no further effect. Empty: a new one."""
    scope: LimitScope | None = None
    """Of the limit that is lifted; None: of the one that the agent waits for."""
    per: Per | None = None
    """As above."""
    tokens: int = Field(0, ge=0)
    micro_usd: int = Field(0, ge=0)
    turns: int = Field(0, ge=0)
    by: str = ""
    reason: str = ""

    @property
    def allows(self) -> Spent:
        """What may be spent beyond the limit."""
        return Spent(tokens=self.tokens, micro_usd=self.micro_usd, turns=self.turns)


class LiftRecord(_Data):
    """A lift to be recorded, before it takes effect."""

    workflow_id: str
    turn: int
    scope: LimitScope
    per: Per
    request: LiftRequest


class Lifted(_Data):
    """More that may be spent until a window ends: what the update returns, and the data of the lifecycle event."""

    id: str
    workflow_id: str
    scope: LimitScope
    per: Per
    tokens: int = 0
    micro_usd: int = 0
    turns: int = 0
    until: datetime | None = None
    """When the window ends that it holds for; None: never."""
    by: str = ""
    reason: str = ""
    lifted_at: str = ""
    """UTC, ISO 8601."""


class Window(NamedTuple):
    """A window of time, UTC."""

    start: date | None
    """Its first day; None: the beginning of time."""
    end: datetime | None
    """The instant at which it is over; None: never."""


def window(per: Per, at: datetime) -> Window:
    """The window that this instant is in."""
    today = at.astimezone(UTC).date()
    if per is Per.TOTAL:
        return Window(None, None)
    if per is Per.DAY:
        start, after = today, today + timedelta(days=1)
    else:
        start = today.replace(day=1)
        after = date(start.year + start.month // _DECEMBER, start.month % _DECEMBER + 1, 1)
    return Window(start, datetime.combine(after, time(), UTC))


def refusal(standings: Iterable[Standing], need: Need) -> Refusal | None:
    """The limit that a call might break, if there is one; of several the one that holds for longest."""
    found = [
        one for standing in standings for measure in Measure if (one := _refusal(standing, need, measure)) is not None
    ]
    return max(found, key=_holds_for, default=None)


def _refusal(standing: Standing, need: Need, measure: Measure) -> Refusal | None:
    limit, needed = standing.limit.of(measure), need.of(measure)
    if limit is None or needed == 0:
        return None
    spent, reserved = standing.spent.of(measure), standing.reserved.of(measure)
    allowed = limit + standing.lifted.of(measure)
    if needed is not None and spent + reserved + needed <= allowed:
        return None
    return Refusal(
        scope=standing.limit.scope,
        per=standing.limit.per,
        measure=measure,
        limit=allowed,
        spent=spent,
        reserved=reserved,
        needed=needed,
        unpriced=need.unpriced if needed is None else "",
        until=standing.until,
    )


def _holds_for(refused: Refusal) -> tuple[bool, bool, datetime]:
    return not refused.passes, refused.until is None, refused.until or datetime.max.replace(tzinfo=UTC)


def amount(number: int, measure: Measure) -> str:
    """A number of tokens, turns or micro-dollars, in words."""
    if measure is Measure.USD:
        return usd(number)
    return f"{number:,} {measure.value.removesuffix('s') if number == 1 else measure.value}"


def usd(micro: int) -> str:
    """Micro-dollars as dollars: two decimals, or as many as there are."""
    whole, part = divmod(micro, _MICRO)
    decimals = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"${whole:,}.{decimals}"
