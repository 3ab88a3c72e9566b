"""Spending: what each agent, agent's name and tenant has spent, in the ledger's database, and what it may yet.

    spending = Spending(ledger)
    refused = await spending.reserve(AGENT, turn, step, limits, need)        # before the call
    entry, cost = await spending.record(entry, Cost(micro_usd=1200))         # after it, with the entry

What a call may take is set aside before it is made, and the true figures are written in the transaction that records
its entry, so that neither is without the other. An agent makes one call at a time and has one reservation: the retry of
a step takes over what a killed worker has set aside, and a later step what an earlier one has left.

Sums are kept by place and UTC day. A place is a workflow id, or one that is cut off behind the agent or the tenant
(`names.memory_place`); a month, or all time, is the sum of its days.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    and_,
    delete,
    func,
    literal,
    or_,
    select,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from temporalio import activity
from typing_extensions import override

from activities.entries import Entry
from activities.ledger import Ledger
from workflows import names
from workflows.budget import (
    Cost,
    Lifted,
    LiftRecord,
    Limit,
    LimitScope,
    Need,
    Per,
    Refusal,
    Spent,
    Standing,
    refusal,
    window,
)
from workflows.errors import Remedy, activity_error
from workflows.interface import BudgetActivities

_FORGOTTEN_AFTER = timedelta(hours=6)
"""When a reservation counts no more: no try at a model call lasts longer (`interface.THINK`)."""
_TRIED_AGAIN_AFTER = timedelta(seconds=5)

_tables = MetaData()
_spent = Table(
    "spent",
    _tables,
    Column("place", String, primary_key=True),
    Column("day", String(10), primary_key=True),  # UTC, ISO 8601
    *(Column(name, BigInteger, nullable=False) for name in Spent.model_fields),
)
_reservations = Table(
    "reservations",
    _tables,
    Column("workflow_id", String, primary_key=True),
    Column("turn", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("agent", String, nullable=False, index=True),  # the places above
    Column("tenant", String, nullable=False, index=True),
    *(Column(name, BigInteger, nullable=False) for name in Spent.model_fields),
    Column("reserved_at", String, nullable=False),
)
# What each recorded step has cost: the entry says which tokens it used, and its format never changes.
_costs = Table(
    "costs",
    _tables,
    Column("entry", String(64), primary_key=True),
    Column("micro_usd", BigInteger, nullable=False),
    Column("unpriced", Integer, nullable=False),
)
_lifts = Table(
    "lifts",
    _tables,
    Column("place", String, primary_key=True),
    Column("request", String, primary_key=True),
    Column("per", String, nullable=False),
    Column("start", String(10), nullable=False),  # the first day of the window it holds for; empty: of all time
    *(Column(name, BigInteger, nullable=False) for name in Spent.model_fields),
    Column("body", String, nullable=False),  # the Lifted, as JSON
)
_PLACES = {
    LimitScope.KEY: _reservations.c.workflow_id,
    LimitScope.AGENT: _reservations.c.agent,
    LimitScope.TENANT: _reservations.c.tenant,
}


class Account(BaseModel):
    """What a place has spent in a window, and what it may spend there."""

    model_config = ConfigDict(frozen=True)

    place: str
    """As in `names.memory_place`: a workflow id, or one that is cut off behind the agent or the tenant."""
    per: Per
    spent: Spent
    reserved: Spent = Spent()
    """For calls that are being made."""
    limit: Limit | None = None
    lifted: Spent = Spent()
    """What people have allowed beyond the limit."""
    until: datetime | None = None
    """When the window ends; None: never."""


class Spending:
    """Who has spent what. Safe from many tasks and processes at once, as the ledger is.

    Args:
        ledger: whose database it is kept in.
        clock: the time, UTC.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._ledger = ledger
        self._clock = clock

    async def reserve(  # which call it is for, and what it is to keep to
        self, workflow_id: str, turn: int, step: int, limits: Sequence[Limit], need: Need
    ) -> Refusal | None:
        """Set aside what a call may take, if that breaks no limit; else why not, and nothing is set aside.

        Made again for the same step it takes the place of what was set aside before.

        Raises:
            ApplicationError: RetryLater: the call has to wait until others have been made, or the database is away.
        """
        if not limits:
            return None
        address = names.parse_workflow_id(workflow_id)
        now = self._clock()
        kept = Spent(tokens=need.tokens, micro_usd=need.micro_usd or 0, turns=need.turns, calls=1)

        def write(connection: Connection) -> Refusal | None:
            places = {limit.scope: names.memory_place(address, limit.scope.value) for limit in limits}
            _lock(connection, places.values())
            others = _reservations.c.workflow_id != workflow_id
            found = refusal([_standing(connection, limit, places[limit.scope], now, others) for limit in limits], need)
            if found:
                return found
            values = {
                "turn": turn,
                "step": step,
                "agent": names.memory_place(address, "agent"),
                "tenant": names.memory_place(address, "tenant"),
                **kept.model_dump(),
                "reserved_at": now.isoformat(),
            }
            upsert = _insert(connection, _reservations).values(workflow_id=workflow_id, **values)
            own = tuple_(_reservations.c.turn, _reservations.c.step)
            connection.execute(
                upsert.on_conflict_do_update(
                    index_elements=["workflow_id"],
                    set_=values,
                    where=own <= tuple_(literal(turn), literal(step)),  # a try that was given up comes late
                )
            )
            return None

        refused = await self._ledger.transact(write, writes=True, tables=_tables)
        if refused is not None and refused.passes:
            raise activity_error(
                Remedy.RETRY_LATER,
                f"Other calls that are being made may use up {refused}. This one is made when they have ended.",
                retry_after=_TRIED_AGAIN_AFTER,
            )
        return refused

    async def release(self, workflow_id: str, turn: int, step: int) -> None:
        """Set nothing aside any more for a call that has failed."""

        def write(connection: Connection) -> None:
            connection.execute(_ended(workflow_id, turn, step))

        await self._ledger.transact(write, writes=True, tables=_tables)

    async def record(self, entry: Entry, cost: Cost) -> tuple[Entry, Cost]:
        """Append an entry to the ledger, and with it what its call has cost; what is recorded: the first that came."""
        address = names.parse_workflow_id(entry.workflow_id)
        spent = Spent(
            tokens=entry.usage.input_tokens + entry.usage.output_tokens,
            micro_usd=cost.micro_usd,
            turns=int(entry.step == 1),
            calls=int(entry.error is None),
            unpriced=cost.unpriced,
        )
        day = datetime.fromisoformat(entry.recorded_at).astimezone(UTC).date().isoformat()

        def settle(connection: Connection) -> None:
            connection.execute(
                _insert(connection, _costs).values(entry=entry.id, **cost.model_dump()).on_conflict_do_nothing()
            )
            connection.execute(_ended(entry.workflow_id, entry.turn, entry.step))
            for scope in LimitScope:  # in one order, so that no two wait for each other
                place = names.memory_place(address, scope.value)
                insertion = _insert(connection, _spent).values(place=place, day=day, **spent.model_dump())
                connection.execute(
                    insertion.on_conflict_do_update(
                        index_elements=["place", "day"],
                        set_={name: _spent.c[name] + insertion.excluded[name] for name in Spent.model_fields},
                    )
                )

        recorded = await self._ledger.append(entry, along=settle, tables=_tables)
        return recorded, cost if recorded.id == entry.id else await self.cost([recorded.id])

    async def cost(self, entries: Collection[str]) -> Cost:
        """What the calls of these entries have cost together."""
        query = select(_costs).where(_costs.c.entry.in_(entries))

        def read(connection: Connection) -> Cost:
            return sum(
                (Cost(micro_usd=row.micro_usd, unpriced=row.unpriced) for row in connection.execute(query)), Cost()
            )

        return await self._ledger.transact(read, writes=False, tables=_tables) if entries else Cost()

    async def lift(self, record: LiftRecord) -> Lifted:
        """Allow more than a limit until its window ends. Idempotent on the request's id."""
        request, now = record.request, self._clock()
        place = names.memory_place(names.parse_workflow_id(record.workflow_id), record.scope.value)
        when = window(record.per, now)
        lifted = Lifted(
            id=request.id,
            workflow_id=record.workflow_id,
            scope=record.scope,
            per=record.per,
            **request.model_dump(include={"tokens", "micro_usd", "turns", "by", "reason"}),
            until=when.end,
            lifted_at=now.isoformat(),
        )

        def write(connection: Connection) -> Lifted:
            insertion = _insert(connection, _lifts).values(
                place=place,
                request=request.id,
                per=record.per.value,
                start=when.start.isoformat() if when.start else "",
                **request.allows.model_dump(),
                body=lifted.model_dump_json(),
            )
            connection.execute(insertion.on_conflict_do_nothing())
            made = select(_lifts.c.body).where(_lifts.c.place == place, _lifts.c.request == request.id)
            return Lifted.model_validate_json(connection.execute(made).scalar_one())

        return await self._ledger.transact(write, writes=True, tables=_tables)

    async def accounts(self, place: str, limits: Collection[Limit] = ()) -> list[Account]:
        """What a place has spent today, this month and ever, each with its limit among these, if it has one."""
        now = self._clock()
        by_window = {limit.per: limit for limit in limits}
        of = next(column for scope, column in _PLACES.items() if place.count("/") == _depth(scope))

        def read(connection: Connection) -> list[Account]:
            return [
                Account(
                    place=place,
                    per=per,
                    spent=_sum(connection, _days(place, per, now)),
                    reserved=_sum(connection, _set_aside(of, place, now)),
                    limit=by_window.get(per),
                    lifted=_sum(connection, _allowed(place, per, now)),
                    until=window(per, now).end,
                )
                for per in Per
            ]

        return await self._ledger.transact(read, writes=False, tables=_tables)

    async def below(self, place: str, per: Per, *, limit: int) -> list[Account]:
        """What each agent of a tenant, or each key of an agent, has spent in the window, most first."""
        now = self._clock()
        total = func.sum(_spent.c.micro_usd), func.sum(_spent.c.tokens)
        prefix = f"{place}/"
        query = _sums(_spent).add_columns(_spent.c.place).where(*_within(per, now))
        slashes = func.length(_spent.c.place) - func.length(func.replace(_spent.c.place, "/", ""))
        query = query.where(func.substr(_spent.c.place, 1, len(prefix)) == prefix, slashes == prefix.count("/"))
        query = query.group_by(_spent.c.place).order_by(*(one.desc() for one in total), _spent.c.place).limit(limit)

        def read(connection: Connection) -> list[Account]:
            return [
                Account(place=row["place"], per=per, spent=_as_spent(row), until=window(per, now).end)
                for row in connection.execute(query).mappings()
            ]

        return await self._ledger.transact(read, writes=False, tables=_tables)


class Budgets(BudgetActivities):
    """Lets people allow agents more than their limits."""

    def __init__(self, spending: Spending) -> None:
        self._spending = spending

    @override
    @activity.defn(name="record_lift")
    async def record_lift(self, record: LiftRecord) -> Lifted:
        return await self._spending.lift(record)


def _depth(scope: LimitScope) -> int:
    return {LimitScope.TENANT: 1, LimitScope.AGENT: 2, LimitScope.KEY: 3}[scope]


def _insert(connection: Connection, table: Table) -> Any:
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def _lock(connection: Connection, places: Collection[str]) -> None:
    """Let nobody else reserve there until this transaction ends. On SQLite one writes at a time anyway."""
    if connection.dialect.name == "postgresql":
        for place in sorted(places):
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(place, 0))))


def _standing(connection: Connection, limit: Limit, place: str, now: datetime, others: Any) -> Standing:
    # First what is set aside, then what is spent: a call that is recorded in between counts twice, not never.
    reserved = _sum(connection, _set_aside(_PLACES[limit.scope], place, now).where(others))
    return Standing(
        limit=limit,
        reserved=reserved,
        spent=_sum(connection, _days(place, limit.per, now)),
        lifted=_sum(connection, _allowed(place, limit.per, now)),
        until=window(limit.per, now).end,
    )


def _sums(table: Table) -> Select[Any]:
    return select(*(func.coalesce(func.sum(table.c[name]), 0).label(name) for name in Spent.model_fields))


def _within(per: Per, now: datetime) -> list[Any]:
    """The days of the window: those after today there are only if a clock is wrong, and they count."""
    start = window(per, now).start
    return [_spent.c.day >= start.isoformat()] if start else []


def _days(place: str, per: Per, now: datetime) -> Select[Any]:
    return _sums(_spent).where(_spent.c.place == place, *_within(per, now))


def _set_aside(column: Any, place: str, now: datetime) -> Select[Any]:
    fresh = (now - _FORGOTTEN_AFTER).isoformat()
    return _sums(_reservations).where(column == place, _reservations.c.reserved_at > fresh)


def _allowed(place: str, per: Per, now: datetime) -> Select[Any]:
    start = window(per, now).start
    first = start.isoformat() if start else ""
    return _sums(_lifts).where(_lifts.c.place == place, _lifts.c.per == per.value, _lifts.c.start == first)


def _sum(connection: Connection, query: Select[Any]) -> Spent:
    return _as_spent(connection.execute(query).mappings().one())


def _as_spent(row: Any) -> Spent:
    return Spent(**{name: int(row[name]) for name in Spent.model_fields})  # PostgreSQL's sums are decimals


def _ended(workflow_id: str, turn: int, step: int) -> Any:
    """Deletes what was set aside for a step of an agent, or an earlier one."""
    earlier = or_(_reservations.c.turn < turn, and_(_reservations.c.turn == turn, _reservations.c.step <= step))
    return delete(_reservations).where(_reservations.c.workflow_id == workflow_id, earlier)
