"""What the command does with an agent's past: rewind, fork, the tree of its branches, verify.

    async with opened(settings) as ledger:
        entry = await find_entry(ledger, address, "3f2a")
        plan = await plan_of(ledger, address, entry)           # what a rewind would leave
    rewound = await rewind(client, settings, address, RewindRequest(entry=entry.id), seconds=60)

Looking needs the ledger alone. What can't be done is raised as `CommandError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from uuid import uuid4

from pydantic import BaseModel, Field
from temporalio.client import Client, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.exceptions import ApplicationError

from activities import history
from activities.entries import Entry, UserMessage
from activities.ledger import Ledger
from activities.verify import Finding, Verification
from workers import operations
from workers.exits import BAD_INPUT, CommandError
from workers.settings import Settings
from workflows import names
from workflows.messages import MadeCall, RewindRequest, Rewound
from workflows.names import Address

_CALLS_LISTED = 1000
_FINDINGS_KEPT = 1000
_ID_LENGTH = 64
_HEXADECIMAL = frozenset("0123456789abcdef")
_PLACE = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})")
_SAID_CHARACTERS = 200


class GoneOnError(CommandError):
    """The agent has gone on since its head was looked at."""


class Plan(BaseModel):
    """What a rewind would do."""

    agent: str
    """tenant/agent/key"""
    head: str
    """The entry that would be left."""
    entry: str
    """The entry to go on behind."""
    turn: int
    """The turn and step of that entry."""
    step: int
    steps: int
    """Entries that would be left on their branch."""
    calls: list[MadeCall]
    """Tool calls made on it, the oldest first: a rewind does not undo them."""
    calls_total: int


class Node(BaseModel):
    """An entry in the tree."""

    entry: str
    parent: str | None
    agent: str
    """tenant/agent/key of the agent that made it; a fork's first entries are of another."""
    turn: int
    step: int
    recorded_at: str
    heard: list[str]
    """What was new in it: events, shortened."""
    said: str
    """What the agent said, shortened."""
    calls: list[str]
    """The tools it called."""
    rehearsal: bool
    error: str | None
    live: bool
    """Whether it is in the agent's conversation, which ends with the head."""
    head: bool
    forks: list[str]
    """Agents that were forked from here: tenant/agent/key."""
    left: list[Rewound]
    """Rewinds that left it."""


class TreeReport(BaseModel):
    """`perennial show --tree`."""

    agent: str
    workflow_id: str
    head: str | None
    entries: int
    """How many entries the agent has."""
    forked_from: str | None = None
    """tenant/agent/key"""
    nodes: list[Node]
    """The newest entries, each behind its parent."""


class Verdict(BaseModel):
    """`perennial verify`."""

    read: dict[str, int]
    """Rows looked at, by table."""
    wrong: int
    findings: list[Finding] = Field(default_factory=list)
    """What is wrong; the first thousand."""


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Ledger]:
    """The ledger, to look at.

    Raises:
        CommandError: it is away, or its URL is none.
    """
    try:
        async with Ledger(settings.ledger_url) as ledger:
            yield ledger
    except (ApplicationError, ValueError) as error:
        why = error.message if isinstance(error, ApplicationError) else str(error)
        raise CommandError(f"{why}\nCorrect PERENNIAL_LEDGER_URL, or start the database.") from error


async def find_entry(ledger: Ledger, address: Address, text: str) -> Entry:
    """The entry on a branch of an agent that somebody means by an id, the beginning of one, or as `turn.step`.

    Raises:
        CommandError: there is none, or more than one.
    """
    who, workflow_id = operations.shown(address), names.workflow_id(address)
    look = f"`perennial show {who} --tree` lists its entries"
    prefix = text.strip().lower()
    if place := _PLACE.fullmatch(prefix):
        at = await ledger.find(workflow_id, int(place[1]), int(place[2]))
        if at is None:
            raise CommandError(f"{who} has no turn {place[1]}, step {place[2]} of its own; {look}.", BAD_INPUT)
        return at
    if not prefix or len(prefix) > _ID_LENGTH or not _HEXADECIMAL.issuperset(prefix):
        raise CommandError(
            f"{text!r} is no entry's id: that is {_ID_LENGTH} hexadecimal digits, or their beginning; nor a "
            "turn and step such as 2.1.",
            BAD_INPUT,
        )
    origin = await ledger.origin(workflow_id)
    found = await ledger.starting_with(workflow_id, prefix, above=origin.head if origin else None, limit=5)
    if len(found) > 1:
        several = ", ".join(one[:16] for one in found[:4])
        raise CommandError(f"{text!r} is the beginning of several entries: {several}, ... Write more of it.", BAD_INPUT)
    if found:
        return (await ledger.entries(found))[0]
    if not origin and not await ledger.count(workflow_id):
        raise CommandError(f"{who} has no entries: it has never said anything, or never lived.", BAD_INPUT)
    elsewhere = await ledger.entries([prefix])
    if elsewhere:
        of = operations.shown(names.parse_workflow_id(elsewhere[0].workflow_id))
        raise CommandError(f"Entry {prefix} is of {of}, and on no branch of {who}; {look}.", BAD_INPUT)
    raise CommandError(f"{who} has no entry {text!r}; {look}.", BAD_INPUT)


async def plan_of(ledger: Ledger, address: Address, entry: Entry) -> Plan:
    """What it would mean to rewind an agent to an entry."""
    head = await ledger.head(names.workflow_id(address)) or entry.id
    left = await history.left_behind(ledger, head, entry.id, limit=_CALLS_LISTED)
    who = operations.shown(address)
    return Plan(agent=who, head=head, entry=entry.id, turn=entry.turn, step=entry.step, **left.model_dump())


async def rewind(
    client: Client, settings: Settings, address: Address, request: RewindRequest, *, seconds: float
) -> Rewound:
    """Rewind an agent, waking it if need be; the turn in progress is finished first.

    Raises:
        GoneOnError: `request.over` is not its head any more.
        CommandError: it refuses, or there was no answer in time.
    """
    return await _moved(client, settings, address, names.REWIND, request, seconds)


async def fork(  # noqa: PLR0913  # which entry of whom becomes whose, and how long to wait
    client: Client, settings: Settings, ledger: Ledger, address: Address, request: RewindRequest, *, seconds: float
) -> Rewound:
    """Begin an agent behind an entry of another.

    Args:
        client: Temporal's.
        settings: for the task queue.
        ledger: tells whether the key was in use.
        address: of the new agent.
        request: the entry, and who and why.
        seconds: how long to wait.

    Raises:
        CommandError: the key was in use, or there was no answer in time.
    """
    workflow_id = names.workflow_id(address)
    lived = (
        await ledger.count(workflow_id) or await ledger.get_snapshot(workflow_id) or await ledger.origin(workflow_id)
    )
    if lived or await operations.find(client, settings, address):
        raise CommandError(
            f"There is an agent {operations.shown(address)} already: a fork needs a key that was never used.", BAD_INPUT
        )
    return await _moved(client, settings, address, names.FORK, request, seconds)


async def _moved(  # noqa: PLR0913, PLR0917  # as above
    client: Client, settings: Settings, address: Address, update: str, request: RewindRequest, seconds: float
) -> Rewound:
    who = operations.shown(address)
    request = request if request.id else request.model_copy(update={"id": str(uuid4())})
    async with operations.plainly(settings, f"{who} can't be told to {update}"):
        try:
            async with asyncio.timeout(seconds):
                return await operations.updated(client, settings, address, update, request, Rewound)
        except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
            why = await operations.absent_workers(client, settings) or (
                "its turn is finished first, and that takes long; it may yet do so"
            )
            raise CommandError(f"{who} has not answered within {seconds:g} s: {why}.") from error
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            if isinstance(cause, ApplicationError) and cause.type == names.GONE_ON:
                raise GoneOnError(cause.message) from error
            if isinstance(cause, ApplicationError) and cause.type == names.REFUSED:
                raise CommandError(cause.message, BAD_INPUT) from error
            raise


async def tree(ledger: Ledger, address: Address, *, limit: int) -> TreeReport:
    """An agent's newest entries as a tree.

    Raises:
        CommandError: there has never been such an agent.
    """
    workflow_id = names.workflow_id(address)
    found = await history.tree(ledger, workflow_id, limit=limit)
    if found.head is None:
        raise CommandError(f"{operations.shown(address)} has no entries: it has never said anything, or never lived.")
    forks: dict[str, list[str]] = {}
    for made in found.forks:
        forks.setdefault(made.head, []).append(_who(made.workflow_id))
    left: dict[str, list[Rewound]] = {}
    for made in found.rewinds:
        left.setdefault(made.old_head or "", []).append(made)
    forked_from = None
    if found.origin:
        origin = await ledger.entries([found.origin.head])
        forked_from = _who(origin[0].workflow_id) if origin else None
    return TreeReport(
        agent=operations.shown(address),
        workflow_id=workflow_id,
        head=found.head,
        entries=await ledger.count(workflow_id),
        forked_from=forked_from,
        nodes=[
            Node(
                entry=entry.id,
                parent=entry.parent,
                agent=_who(entry.workflow_id),
                turn=entry.turn,
                step=entry.step,
                recorded_at=entry.recorded_at,
                heard=[_shortened(message.text) for message in entry.messages if isinstance(message, UserMessage)],
                said=_shortened(entry.answer.text if entry.answer else ""),
                calls=[call.name for call in entry.answer.tool_calls] if entry.answer else [],
                rehearsal=entry.rehearsal,
                error=entry.error,
                live=entry.id in found.line,
                head=entry.id == found.head,
                forks=forks.get(entry.id, []),
                left=left.get(entry.id, []),
            )
            for entry in found.entries
        ],
    )


async def verify(
    ledger: Ledger,
    address: Address | None,
    *,
    on_finding: Callable[[Finding], None],
    on_progress: Callable[[int, int], None],
) -> Verdict:
    """Look at all that the ledger has of an agent, or of all of them; specs are always looked at.

    Raises:
        CommandError: there has never been such an agent.
    """
    kept: list[Finding] = []

    def tell(finding: Finding) -> None:
        if len(kept) < _FINDINGS_KEPT:
            kept.append(finding)
        on_finding(finding)

    total = await ledger.size(names.workflow_id(address) if address else None)
    looking = Verification(ledger, on_finding=tell, on_read=lambda read: on_progress(read, total))
    if address is None:
        await looking.everything()
    else:
        await looking.agent(names.workflow_id(address))
        if not any(looking.read.values()):
            raise CommandError(f"There has never been an agent {operations.shown(address)}.", BAD_INPUT)
        await looking.specs()
    return Verdict(read=looking.read, wrong=looking.wrong, findings=kept)


def _who(workflow_id: str) -> str:
    """An agent as people write it; whatever else stands there as it is."""
    try:
        return operations.shown(names.parse_workflow_id(workflow_id))
    except ValueError:
        return workflow_id


def _shortened(text: str) -> str:
    return text if len(text) <= _SAID_CHARACTERS else f"{text[: _SAID_CHARACTERS - 1]}…"
