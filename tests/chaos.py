"""What happens in a soak (see soak.py): which faults, when and for how long, and which mail. Drawn from a seed. Pure.

    for fault in plan(seed, seconds): ...       # the same seed, the same faults
    for mail in post(seed): ...                 # the same mail, for ever

Faults overlap, as they do in life; only those that hold something in common come one after the other:

- A process or a link has one fault at a time: a frozen process hears no SIGTERM, and a link can't be both cut and slow.
- A redrive and a replay are what a person does, who waits until the servers are there: both refuse to begin without
  them. So they hold the servers that they speak to.
- A replay is of what is committed, which its agents have had. One that overtakes ingest would bring an agent its events
  in another order; "behind all that it has by now" is all that is promised then.

The embedded broker forgets when it is killed, and answers nobody's question about a promise then: it is left alone.
Everything else is within the promises, all at once too: servers and workers away together, for as long as that lasts.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

from traffic import letter

from workers.embedded import AGENT, BROKER, INGEST, MODEL, REHEARSAL, TEMPORAL
from workflows import names

INGESTS = (f"{INGEST}-1", f"{INGEST}-2")
"""Those that are there from the beginning."""
ONE_MORE = f"{INGEST}-3"
LINKS = ("ingest to temporal", "ingest to broker", "agent to broker")
LETTERS = "dead letters"
REPLAYED = "topics"
STORE_TOPIC = "store.events"

AT_ONCE = 2
"""So many faults are there at the same time, at most: a turn needs all, and some ought to be made meanwhile."""
LONGEST_PAUSE = 4.5
"""Seconds between the beginnings of two faults, unless `AT_ONCE` are there."""
_SHORTEST_PAUSE = 1.0
_REST_SECONDS = 10.0
"""From the end of a fault to the next of the same process or link: so that it also works, now and then."""


class Kind(StrEnum):
    """What is done."""

    KILL = "kill -9"
    FREEZE = "freeze"
    STOP = "stop"
    """SIGTERM, and started again later."""
    CUT = "cut"
    HALF_OPEN = "half-open"
    DEAF = "no answers"
    SLOW = "slow"
    JOIN = "one more"
    """An ingest worker comes, and goes."""
    REDRIVE = "redrive"
    """Of a dead letter, that nothing was mended about."""
    REPLAY = "replay"


@dataclass(frozen=True)
class Fault:
    """One fault."""

    at: float
    """When it begins: seconds from the beginning."""
    kind: Kind
    target: str
    """A process, a link, or what is redriven or replayed."""
    seconds: float
    """How long it lasts; a redrive and a replay take as long as they take."""
    chance: float
    """From 0 to 1: which dead letter, which partition, how slow."""

    @property
    def holds(self) -> frozenset[str]:
        """What it has for itself while it lasts."""
        return _holds(self.kind, self.target)

    @property
    def end(self) -> float:
        """When it is over, in seconds from the beginning."""
        return self.at + self.seconds

    def __str__(self) -> str:
        lasts = "" if self.kind in _NEEDS else f" for {self.seconds:.1f} s"
        return f"{self.kind} {self.target}{lasts}"


def _holds(kind: Kind, target: str) -> frozenset[str]:
    return frozenset({target, *_NEEDS.get(kind, ())})


_NEEDS = {Kind.REDRIVE: (BROKER,), Kind.REPLAY: (BROKER, TEMPORAL)}


@dataclass(frozen=True)
class _Sort:
    """Faults of one sort: so often, compared with others, and for some time between these."""

    kind: Kind
    targets: tuple[str, ...]
    weight: float
    least: float
    most: float


_SORTS = (
    _Sort(Kind.KILL, INGESTS, 4, 0, 6),
    _Sort(Kind.KILL, (AGENT, MODEL), 3, 0, 4),
    _Sort(Kind.KILL, (REHEARSAL,), 1, 0, 4),
    _Sort(Kind.KILL, (TEMPORAL,), 2, 0, 6),
    _Sort(Kind.KILL, (BROKER,), 2, 0, 5),
    _Sort(Kind.STOP, (*INGESTS, AGENT, MODEL), 3, 0, 3),
    _Sort(Kind.FREEZE, (*INGESTS, AGENT, MODEL, TEMPORAL, BROKER), 3, 0.5, 3),
    _Sort(Kind.FREEZE, (*INGESTS, AGENT, MODEL), 3, 7.5, 12),  # longer than the session, and than a heartbeat's time
    _Sort(Kind.JOIN, (ONE_MORE,), 2, 5, 15),
    _Sort(Kind.CUT, LINKS, 3, 0.2, 8),
    _Sort(Kind.HALF_OPEN, LINKS, 3, 1, 12),
    _Sort(Kind.DEAF, LINKS, 3, 0.5, 8),
    _Sort(Kind.SLOW, LINKS, 2, 2, 10),
    _Sort(Kind.REDRIVE, (LETTERS,), 2, 3, 3),
    _Sort(Kind.REPLAY, (REPLAYED,), 2, 3, 3),
)


def plan(seed: int, seconds: float, *, broker_remembers: bool) -> list[Fault]:
    """The faults of a soak, in the order in which they begin, which all do within so many seconds."""
    draw = random.Random(f"faults {seed}")
    spared = () if broker_remembers else (BROKER,)
    faults: list[Fault] = []
    at = draw.uniform(_SHORTEST_PAUSE, LONGEST_PAUSE)
    while at < seconds:
        present = [fault for fault in faults if fault.end > at]
        if len(present) < AT_ONCE:
            held = frozenset().union(*(fault.holds for fault in present))
            tired = {*spared, *(fault.target for fault in faults if fault.end + _REST_SECONDS > at)}
            faults.append(_draw(draw, at, held, tired))
            at += draw.uniform(_SHORTEST_PAUSE, LONGEST_PAUSE)
        else:
            at = min(fault.end for fault in present)
    return faults


def _draw(draw: random.Random, at: float, held: Collection[str], tired: Collection[str]) -> Fault:
    """A fault that may begin now; there are more targets than can be held or tired at once."""
    may = [
        (sort, target)
        for sort in _SORTS
        for target in sort.targets
        if target not in tired and _holds(sort.kind, target).isdisjoint(held)
    ]
    ((sort, target),) = draw.choices(may, [sort.weight / len(sort.targets) for sort, _ in may])
    return Fault(at, sort.kind, target, draw.uniform(sort.least, sort.most), draw.random())


# Mail ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mail:
    """Records to be sent, one after the other."""

    values: tuple[bytes | None, ...]
    topic: str = names.EVENTS_TOPIC
    key: bytes | None = None
    """Of the records; None: what the event says."""


NAPPER = "napper"
NAPPER_SPEC = """
name: napper
tenant: store
instructions: Answer, and go back to sleep.
hibernate_after_seconds: 0.5
"""
"""An agent that hibernates as soon as it is idle."""

_CUSTOMERS = 40
_HOT = 0.3
"""Of all mail goes to two customers."""
_NAPPERS = 6
_REPEATED_LATER = 0.05
"""Of all mail comes again, much later."""
_REMEMBERED = 5000


def post(seed: int) -> Iterator[Mail]:
    """Mail without an end: to many agents and a few hot ones, much of it twice, some of it for nobody."""
    draw = random.Random(f"mail {seed}")
    writers, weights = list(_WRITERS), list(_WRITERS.values())
    before: deque[Mail] = deque(maxlen=_REMEMBERED)
    for number in itertools.count():
        mail = draw.choices(writers, weights)[0](draw, f"soak/{seed}/{number}")
        yield mail
        if mail.key is None and before and draw.random() < _REPEATED_LATER:
            yield draw.choice(before)
        before.append(mail)


def _customer(draw: random.Random) -> int:
    return draw.randint(1, 2) if draw.random() < _HOT else draw.randint(3, _CUSTOMERS)


def _plain(draw: random.Random, event_id: str) -> Mail:
    return Mail((letter(_name(_customer(draw)), f"This is {event_id}.", event_id),))


def _twice(draw: random.Random, event_id: str) -> Mail:
    """What a producer sends again at once, since it has not heard that it was taken."""
    return Mail(_plain(draw, event_id).values * draw.randint(2, 3))


def _burst(draw: random.Random, event_id: str) -> Mail:
    key = _name(draw.randint(1, 2))
    return Mail(tuple(letter(key, f"Part {part}", f"{event_id}/{part}") for part in range(draw.randint(5, 15))))


def _slow(draw: random.Random, event_id: str) -> Mail:
    text = f"[[latency {draw.uniform(0.2, 2.5):.1f}]] [[say That took a while.]]"
    return Mail((letter(_name(_customer(draw)), text, event_id),))


def _broken(draw: random.Random, event_id: str) -> Mail:
    """The model does not answer at the first time."""
    text = draw.choice(
        ["[[error 503 times=1]] Hello.", "[[error 429 retry-after=1 times=2]] Hello.", "[[cut times=1]] Hi."]
    )
    return Mail((letter(_name(_customer(draw)), text, event_id),))


def _order(draw: random.Random, event_id: str) -> Mail:
    number = _customer(draw)
    return Mail((letter(_name(number), f'[[call look_up_order {{"order_id": "order-{1000 + number}"}}]]', event_id),))


def _refund(draw: random.Random, event_id: str) -> Mail:
    number = _customer(draw)
    wanted = {"order_id": f"order-{1000 + number}", "amount_cents": 1, "reason": event_id}
    return Mail((letter(_name(number), f"[[call {REFUND} {json.dumps(wanted)}]]", event_id),))


def _text(draw: random.Random, event_id: str) -> Mail:
    name = _name(_customer(draw))
    wanted = {"customer_id": name, "text": event_id}
    return Mail((letter(name, f"[[call {TEXT} {json.dumps(wanted)}]]", event_id, agent="security"),))


def _nap(draw: random.Random, event_id: str) -> Mail:
    return Mail((letter(f"napper-{draw.randint(1, _NAPPERS)}", "Are you awake?", event_id, agent=NAPPER),))


def _shop(draw: random.Random, event_id: str) -> Mail:
    """On the store's own topic: for one agent, or for none."""
    number = _customer(draw)
    event = {
        "specversion": "1.0",
        "id": event_id,
        "source": "/store",
        "type": draw.choice(["store.customer.message", "store.order.packed", "store.unheard.of"]),
        "subject": _name(number),
        "data": {"customer_id": _name(number), "order_id": f"order-{1000 + number}", "text": "Where is it?"},
    }
    return Mail((json.dumps(event).encode(),), STORE_TOPIC)


def _poison(draw: random.Random, event_id: str) -> Mail:
    """Nobody can take this, not even later; on its way to where good mail goes, too."""
    event = json.loads(letter(_name(_customer(draw)), "Poison.", event_id))
    kinds: list[bytes | None] = [
        None,
        b"",
        b"{ no event",
        b"\xff\xfe\xfd",
        b"[1, 2, 3]",
        json.dumps({name: value for name, value in event.items() if name != "id"}).encode(),
        json.dumps(event | {"specversion": "9.9"}).encode(),
        json.dumps(event | {"time": "yesterday"}).encode(),
        json.dumps(event | {"agent": "nobody"}).encode(),
        json.dumps(event | {"subject": ""}).encode(),
        json.dumps(event | {"data": {"text": "x" * 300_000}}).encode(),
    ]
    topic = draw.choices([names.EVENTS_TOPIC, STORE_TOPIC], [4, 1])[0]
    return Mail((draw.choice(kinds[: 5 if topic == STORE_TOPIC else None]),), topic, event["subject"].encode())


def _name(customer: int) -> str:
    return f"customer-{customer:02}"


REFUND = "refund"
"""A tool that may be called again, and takes effect once."""
TEXT = "send_text_message"
"""A tool that must not be called again."""

_WRITERS: dict[Callable[[random.Random, str], Mail], float] = {
    _plain: 60,
    _twice: 6,
    _burst: 1.5,
    _slow: 4,
    _broken: 2,
    _order: 4,
    _refund: 4,
    _text: 3,
    _nap: 8,
    _shop: 5,
    _poison: 4,
}
"""How often each writes, compared with the others."""
