"""The demo's online store, Kestrel & Cairn (outdoor gear), as tools for its agents; see deploy/agents.

    with call_context(ToolCallContext(key, workspace, workflow_id, turn=1)):
        look_up_order("order-1001").status
    [effect.kind for effect in effects(workspace / DATABASE)]

Each tool is a plain function: its signature and docstring are what the model is told. Three things are worth copying:

- A tool with a side effect writes the effect and the call's idempotency key in one transaction, so that a call that is
  made again, because its worker died before it could answer, returns the first result and changes nothing.
- What the agent asked for in error is a ValueError, in words that help it on. What breaks (the disk is full, the
  database is locked) is any other exception, and is tried again.
- An agent that serves one customer or one order can't reach another's, whatever a message talks it into: the tool
  looks at whose agent calls, and does not trust its arguments.

The database is SQLite, made with the same data on first use. Money is in cents, as integers.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

from activities.tools import current_call
from workflows import names

DATABASE = "store.db"
"""The database's name in the workspace."""

CURRENCY = "EUR"
_BUSY_SECONDS = 20
_LOGINS_SHOWN = 10

Problem = Literal["late", "lost", "damaged", "wrong_item", "wrong_address", "other"]
Text = Annotated[str, Field(min_length=3, max_length=1000)]
Result = TypeVar("Result", bound=BaseModel)


class Item(BaseModel):
    """Something ordered."""

    name: str
    quantity: int
    price_cents: int
    """Of one."""


class OrderSummary(BaseModel):
    """An order in a list."""

    order_id: str
    status: Literal["placed", "packed", "shipped", "delayed", "lost", "delivered"]
    placed_on: date
    paid_cents: int
    currency: str = CURRENCY


class Order(OrderSummary):
    """An order with all that is known of it."""

    customer_id: str
    items: list[Item]
    refunded_cents: int
    carrier: str | None
    tracking: str | None
    expected_on: date
    days_late: int
    """Today, by the store's calendar; 0 if it is not late, or has arrived."""
    problems: list[str]
    """As flagged to the warehouse."""


class Refund(BaseModel):
    """A refund that was made."""

    order_id: str
    refunded_cents: int
    left_cents: int
    """What can still be refunded."""
    currency: str = CURRENCY


class Flag(BaseModel):
    """A problem that the warehouse now knows of."""

    case_id: str
    order_id: str
    problem: Problem


class Login(BaseModel):
    """A try to log in to a customer's account."""

    at: datetime
    device: str
    place: str
    succeeded: bool


class Lock(BaseModel):
    """An account that nobody can log in to until the customer has proved who they are."""

    customer_id: str
    locked_at: datetime
    reason: str


class TextMessage(BaseModel):
    """A text message that was sent."""

    customer_id: str
    text: str


class Effect(BaseModel):
    """A side effect, as it was recorded with the key of its call."""

    key: str
    kind: str
    """The tool."""
    order_id: str | None
    customer_id: str
    amount_cents: int | None
    result: str
    """What the tool returned, as JSON."""
    at: datetime


# Tools -------------------------------------------------------------------------------------------------------------


def look_up_order(order_id: str) -> Order:
    """Look up an order: its items, what was paid and refunded, its status, carrier, and how late it is.

    Args:
        order_id: The order's number, such as order-1042.
    """
    with _database() as database:
        return _order(database, order_id)


def list_orders(customer_id: str) -> list[OrderSummary]:
    """List a customer's orders, newest first.

    Args:
        customer_id: The customer, such as customer-07.
    """
    with _database() as database:
        _customer(database, customer_id)
        rows = database.execute(
            "SELECT * FROM orders WHERE customer_id = ? ORDER BY placed_on DESC, order_id DESC", (customer_id,)
        )
        return [OrderSummary.model_validate(dict(row)) for row in rows]


def refund(order_id: str, amount_cents: Annotated[int, Field(gt=0)], reason: Text) -> Refund:
    """Pay money back for an order, to the card it was paid with. It can't be taken back.

    Args:
        order_id: The order's number, such as order-1042.
        amount_cents: How much, in cents: 1250 for 12.50 EUR. No more than was paid and is not refunded yet.
        reason: Why, in a sentence for the accounts.
    """
    with _database(writing=True) as database:
        if done := _done(database, Refund):
            return done
        order = _order(database, order_id)
        left = order.paid_cents - order.refunded_cents
        if amount_cents > left:
            raise ValueError(
                f"{amount_cents} cents can't be refunded for {order_id}: {order.paid_cents} were paid and "
                f"{order.refunded_cents} are refunded already, so {left} are left."
            )
        result = Refund(order_id=order_id, refunded_cents=amount_cents, left_cents=left - amount_cents)
        _record(database, "refund", result, order.customer_id, order_id, amount_cents, reason)
        return result


def flag_shipment(order_id: str, problem: Problem, note: Annotated[str, Field(max_length=1000)] = "") -> Flag:
    """Tell the warehouse that something is wrong with a shipment; people there take it up with the carrier.

    Args:
        order_id: The order's number, such as order-1042.
        problem: What is wrong.
        note: What the warehouse should know besides, in English.
    """
    with _database(writing=True) as database:
        if done := _done(database, Flag):
            return done
        order = _order(database, order_id)
        result = Flag(case_id=f"{order_id}/{len(order.problems) + 1}", order_id=order_id, problem=problem)
        _record(database, "flag_shipment", result, order.customer_id, order_id, None, f"{problem}: {note or '-'}")
        return result


def recent_logins(customer_id: str) -> list[Login]:
    """List the latest tries to log in to a customer's account, newest first: when, from where, with what.

    Args:
        customer_id: The customer, such as customer-07.
    """
    with _database() as database:
        _customer(database, customer_id)
        rows = database.execute(
            "SELECT * FROM logins WHERE customer_id = ? ORDER BY at DESC LIMIT ?", (customer_id, _LOGINS_SHOWN)
        )
        return [Login.model_validate(dict(row)) for row in rows]


def lock_account(customer_id: str, reason: Text) -> Lock:
    """Lock a customer's account: all sessions end, and nobody can log in until the customer has proved who they are.

    Args:
        customer_id: The customer, such as customer-07.
        reason: What was seen, in a sentence for the people who will unlock the account.
    """
    with _database(writing=True) as database:
        if done := _done(database, Lock):
            return done
        lock = _customer(database, customer_id)["lock"]
        if lock:  # by an earlier call: it stays locked, for the first reason
            return Lock.model_validate_json(lock)
        result = Lock(customer_id=customer_id, locked_at=datetime.now(UTC), reason=reason)
        database.execute(
            'UPDATE customers SET "lock" = ? WHERE customer_id = ?', (result.model_dump_json(), customer_id)
        )
        _record(database, "lock_account", result, customer_id, None, None, reason)
        return result


def send_text_message(customer_id: str, text: Annotated[str, Field(min_length=1, max_length=320)]) -> TextMessage:
    """Send a text message to the phone number that the customer gave when they signed up.

    Args:
        customer_id: The customer, such as customer-07.
        text: At most 320 characters, in the customer's language.
    """
    # The gateway (here: a line in the database) takes no idempotency key, so nobody could tell a second message from
    # a first one. That is why the spec says `repeatable: false`: it is sent once or, if that is not known, not again.
    with _database(writing=True) as database:
        _customer(database, customer_id)
        result = TextMessage(customer_id=customer_id, text=text)
        _record(database, "send_text_message", result, customer_id, None, None, text)
        return result


def effects(path: Path) -> list[Effect]:
    """All side effects in the database at `path`, in the order they were made; none if there is no database yet."""
    if not path.exists():
        return []
    with closing(_connect(path)) as database:
        rows = database.execute("SELECT * FROM effects ORDER BY rowid").fetchall()
    return [Effect.model_validate(dict(row)) for row in rows]


# The database ------------------------------------------------------------------------------------------------------

_SCHEMA = """
CREATE TABLE customers (
    customer_id TEXT PRIMARY KEY, name TEXT NOT NULL, lang TEXT NOT NULL, city TEXT NOT NULL, "lock" TEXT
);
CREATE TABLE orders (
    order_id TEXT PRIMARY KEY, customer_id TEXT NOT NULL REFERENCES customers, status TEXT NOT NULL,
    placed_on TEXT NOT NULL, carrier TEXT, tracking TEXT, expected_on TEXT NOT NULL, paid_cents INTEGER NOT NULL
);
CREATE TABLE items (
    order_id TEXT NOT NULL REFERENCES orders, name TEXT NOT NULL, quantity INTEGER NOT NULL,
    price_cents INTEGER NOT NULL
);
CREATE TABLE logins (
    customer_id TEXT NOT NULL REFERENCES customers, at TEXT NOT NULL, device TEXT NOT NULL, place TEXT NOT NULL,
    succeeded INTEGER NOT NULL
);
CREATE TABLE effects (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, order_id TEXT, customer_id TEXT NOT NULL, amount_cents INTEGER,
    detail TEXT NOT NULL, result TEXT NOT NULL, at TEXT NOT NULL
);
CREATE INDEX effects_of_order ON effects (order_id, kind);
"""


@contextmanager
def _database(*, writing: bool = False) -> Iterator[sqlite3.Connection]:
    """A transaction on this deployment's store.

    Whoever writes waits for its turn at the beginning, and so never decides by what is old.
    """
    path = current_call().workspace / DATABASE
    if not path.exists():
        _create(path)
    with closing(_connect(path)) as database:
        database.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
        with database:  # commits, or rolls back what raised
            yield database


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    database.row_factory = sqlite3.Row
    return database


def _create(path: Path) -> None:
    """Make the database, whole or not at all: it is filled beside its place, and then given its name.

    Of several processes that do this at once the first wins, and the others use what it made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="store-", dir=path.parent) as folder:
        draft = Path(folder) / DATABASE
        with closing(_connect(draft)) as database:
            database.execute("PRAGMA journal_mode = WAL")  # kept in the file; readers and a writer don't wait
            database.executescript(_SCHEMA)
            database.execute("BEGIN")
            with database:
                _fill(database)
        with suppress(FileExistsError):
            os.link(draft, path)  # unlike a rename, it never replaces what another process has made and used


def _order(database: sqlite3.Connection, order_id: str) -> Order:
    row = database.execute("SELECT * FROM orders WHERE order_id = ?", (order_id,)).fetchone()
    caller = _caller()
    own = row and (caller in {row["order_id"], row["customer_id"]} or not caller.startswith(("customer-", "order-")))
    if not own:  # of an order that is another customer's not even that it exists is said
        raise ValueError(
            f"{caller} has no order {order_id!r}. Numbers look like order-1042; check it, or ask for the right one."
        )
    items = database.execute("SELECT * FROM items WHERE order_id = ? ORDER BY rowid", (order_id,)).fetchall()
    done = database.execute("SELECT * FROM effects WHERE order_id = ? ORDER BY rowid", (order_id,)).fetchall()
    arrived = row["status"] == "delivered"
    return Order(
        **dict(row),
        days_late=0 if arrived else max(0, (_TODAY - date.fromisoformat(row["expected_on"])).days),
        items=[Item.model_validate(dict(item)) for item in items],
        refunded_cents=sum(effect["amount_cents"] for effect in done if effect["kind"] == "refund"),
        problems=[effect["detail"] for effect in done if effect["kind"] == "flag_shipment"],
    )


def _customer(database: sqlite3.Connection, customer_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = database.execute(
        "SELECT * FROM customers WHERE customer_id = ?", (customer_id,)
    ).fetchone()
    caller = _caller()
    if caller.startswith("customer-") and caller != customer_id:
        raise ValueError(f"You serve {caller}; {customer_id!r} is somebody else, whose account you can't use.")
    if row is None:
        raise ValueError(f"There is no customer {customer_id!r}. Customers look like customer-07.")
    return row


def _caller() -> str:
    """The key of the agent that calls: in this store the customer or the order it serves."""
    return names.parse_workflow_id(current_call().workflow_id).key


def _done(database: sqlite3.Connection, kind: type[Result]) -> Result | None:
    """What this very call has come to, if it was made before."""
    key = current_call().idempotency_key
    row = database.execute("SELECT result FROM effects WHERE key = ?", (key,)).fetchone()
    return kind.model_validate_json(row["result"]) if row else None


def _record(  # noqa: PLR0913, PLR0917  # the columns
    database: sqlite3.Connection,
    kind: str,
    result: BaseModel,
    customer_id: str,
    order_id: str | None,
    amount_cents: int | None,
    detail: str,
) -> None:
    """Write an effect down under the call's key, in the transaction that makes it."""
    row = (current_call().idempotency_key, kind, order_id, customer_id, amount_cents, detail)
    database.execute(
        "INSERT INTO effects (key, kind, order_id, customer_id, amount_cents, detail, result, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, result.model_dump_json(), datetime.now(UTC).isoformat()),
    )


# Its data ----------------------------------------------------------------------------------------------------------

_CUSTOMERS = """
Alice Hartley, en, Leeds | Camille Roussel, fr, Grenoble | Javier Ortega, es, Granada | Tom Okafor, en, London
Élodie Marchand, fr, Annecy | Lucía Fernández, es, Oviedo | Priya Nair, en, Bristol | Hugo Lefèvre, fr, Lyon
Mateo Ibáñez, es, Zaragoza | Siobhán Byrne, en, Galway | Noémie Garnier, fr, Chambéry | Carmen Vidal, es, Lleida
Gareth Pugh, en, Bangor | Mathis Delorme, fr, Pau | Irene Castaño, es, León | Fiona MacRae, en, Inverness
Baptiste Noël, fr, Briançon | Andrés Molina, es, Jaca | Wei Zhang, en, Manchester | Océane Perrot, fr, Nantes
Daniel Novak, en, Dublin | Inès Benali, fr, Marseille | Sofía Herrero, es, Santander | Ruth Adeyemi, en, Sheffield
Jules Caron, fr, Lille | Pablo Serrano, es, Madrid | Hannah Weiss, en, Edinburgh | Manon Girard, fr, Toulouse
Núria Soler, es, Girona | Oliver Stone, en, Keswick | Théo Blanchard, fr, Strasbourg | Elena Ríos, es, Bilbao
Grace Kimani, en, Oxford | Margaux Petit, fr, Rennes | Diego Navarro, es, Málaga | Ben Lindqvist, en, Cardiff
Yanis Haddad, fr, Paris | Marta Quintana, es, Burgos | Chloe Barnes, en, York | Amir Rahimi, en, Glasgow
"""
"""customer-01 and so on: name, language, city."""

_PRODUCTS = {
    "tent": ("Skarn 2 tent", 24900),
    "tarp": ("Merlin tarp 3x3", 7900),
    "bag": ("Fulmar down sleeping bag -5 °C", 18900),
    "mat": ("Peat insulated mat", 8900),
    "pack": ("Traverse 45 rucksack", 14900),
    "daypack": ("Gill 20 daypack", 6400),
    "jacket": ("Squall rain jacket", 17900),
    "down": ("Ember down jacket", 15900),
    "fleece": ("Heath fleece", 6900),
    "trousers": ("Ghyll trekking trousers", 8400),
    "boots": ("Cairn boots", 16900),
    "socks": ("Merino socks, 2 pairs", 2400),
    "gloves": ("Rime gloves", 3900),
    "hat": ("Wool hat", 1950),
    "poles": ("Tarn trekking poles", 7450),
    "stove": ("Cinder gas stove", 4990),
    "pot": ("Titanium pot 900 ml", 4450),
    "bottle": ("Steel bottle 1 l", 2250),
    "filter": ("Beck water filter", 3950),
    "lamp": ("Vesper headlamp", 4590),
    "map": ("Walking map", 1295),
    "rope": ("Arête rope 60 m", 13900),
    "helmet": ("Scree helmet", 5990),
    "crampons": ("Névé crampons", 11900),
}
"""Name and price in cents."""

_DAY_ONE = date(2026, 11, 1)
_TODAY = date(2026, 11, 24)  # always: the day of the demo's events, so that the data never grows old
_CARRIERS = {"D": "DHL", "G": "GLS", "U": "UPS", "C": "Colissimo", "S": "SEUR", "R": "Royal Mail", "-": None}

_ORDERS = """
5 shipped R tent,mat*2 | 6 delayed C jacket,hat | 4 delivered S boots,socks | 9 lost U bag | 12 packed - pack,bottle
7 shipped S poles | 3 delivered R down,gloves | 8 delayed G stove,pot | 10 shipped S fleece,trousers | 2 lost D lamp*2
24 placed - tent | 6 delivered G rope | 9 shipped R boots | 5 delayed C filter,bottle*2 | 24 packed - bag,mat
4 delivered R jacket | 8 lost C crampons | 7 delayed S helmet,rope | 12 shipped D daypack | 3 delivered C poles,map*3
10 delayed D pack | 2 delivered C stove,pot | 24 placed - down | 6 lost G tent | 9 shipped C mat
5 delivered S lamp,hat | 11 shipped R fleece*2 | 8 delivered C boots,socks*2 | 7 shipped S tarp | 24 packed - crampons
10 shipped C gloves*2 | 4 delivered S trousers | 9 delayed U jacket | 6 shipped C daypack,bottle | 24 placed - stove
3 delivered R bag | 8 shipped U down,hat | 5 lost S pack | 7 delivered R map*2,filter | 11 shipped G helmet
24 placed - socks*3 | 14 packed - fleece | 12 shipped S lamp | 24 placed - mat,pot | 13 shipped C trousers
10 delayed S tent | 15 packed - rope,helmet | 12 shipped C boots | 9 delivered S hat*2 | 11 delayed R jacket,fleece
14 shipped C filter | 16 placed - daypack,poles | 8 delivered R gloves | 13 shipped D down | 15 placed - tarp
12 delivered R socks,map | 14 shipped C bag | 16 packed - boots | 11 lost U stove,pot | 13 shipped D lamp,gloves
"""
"""order-1001 and so on: day of November, status, carrier, items. The first 40 are of customers 1 to 40 in that order,
the others of customers 1 to 20.
"""

_DEVICES = ("Chrome on Windows", "Safari on iPhone", "Firefox on Linux", "Chrome on Android", "Safari on Mac")

_STRANGERS = """
03 Lagos, Nigeria | 08 Kyiv, Ukraine | 12 Sofia, Bulgaria | 16 Miami, United States | 19 Hanoi, Vietnam
24 São Paulo, Brazil | 27 Warsaw, Poland | 33 Manila, Philippines | 37 Riga, Latvia
"""
"""Customers to whose account somebody from far away has found the password."""

_STRANGERS_TRIES = 5


def _fill(database: sqlite3.Connection) -> None:
    logins: list[tuple[str, str, str, str, bool]] = []
    for number, (name, lang, city) in enumerate((cell.split(", ") for cell in _cells(_CUSTOMERS)), 1):
        customer = f"customer-{number:02}"
        database.execute("INSERT INTO customers VALUES (?, ?, ?, ?, NULL)", (customer, name, lang, city))
        for week in range(3):
            at = datetime(2026, 11, 1 + 7 * week + number % 7, 7 + number % 14, number, tzinfo=UTC)
            logins.append((customer, at.isoformat(), _DEVICES[number % len(_DEVICES)], city, True))
    for cell in _cells(_STRANGERS):
        number_text, place = cell.split(" ", 1)
        for minute in range(_STRANGERS_TRIES):
            at = datetime(2026, 11, 24, 2, int(number_text) + minute, tzinfo=UTC)
            got_in = minute == _STRANGERS_TRIES - 1
            logins.append((f"customer-{number_text}", at.isoformat(), "an unknown browser", place, got_in))
    database.executemany("INSERT INTO logins VALUES (?, ?, ?, ?, ?)", logins)
    for number, order in enumerate(_cells(_ORDERS)):
        _insert_order(database, f"order-{1001 + number}", f"customer-{number % 40 + 1:02}", order)


def _insert_order(database: sqlite3.Connection, order_id: str, customer_id: str, line: str) -> None:
    day, status, carrier, listed = line.split(" ")
    placed = _DAY_ONE + timedelta(days=int(day) - 1)
    items = [
        (*_PRODUCTS[code], int(count or 1)) for code, _, count in (item.partition("*") for item in listed.split(","))
    ]
    paid = sum(price * count for _, price, count in items)
    tracking = f"{carrier}{order_id[-4:]}{placed:%m%d}{paid % 9973:04}" if carrier != "-" else None
    expected = placed + timedelta(days=6)
    database.execute(
        "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (order_id, customer_id, status, f"{placed}", _CARRIERS[carrier], tracking, f"{expected}", paid),
    )
    for name, price, count in items:
        database.execute("INSERT INTO items VALUES (?, ?, ?, ?)", (order_id, name, count, price))


def _cells(table: str) -> list[str]:
    return [cell.strip() for line in table.strip().splitlines() for cell in line.split("|")]
