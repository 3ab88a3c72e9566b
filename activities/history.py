"""The conversation as a tree: what a rewind leaves behind, which entries are an agent's, its branches and forks.

An agent's entries hang on their parents; a rewind adds a branch, and a fork begins below an entry of another agent,
which both then share. Nothing is copied, and nothing is ever taken away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator

from pydantic import BaseModel, Field

from activities.entries import Entry, ToolMessage
from activities.ledger import Ledger
from workflows.messages import MadeCall, Rewound, ToolCall, ToolOutcome

_PAGE = 100


class LeftBehind(BaseModel):
    """What a rewind leaves on its branch."""

    steps: int = 0
    calls: list[MadeCall] = Field(default_factory=list)
    """Tool calls made there, oldest first: a rewind does not undo them."""
    calls_total: int = 0


class Tree(BaseModel):
    """The newest entries of an agent, and how they hang together."""

    head: str | None
    """The entry that the agent goes on behind."""
    line: set[str] = Field(default_factory=set)
    """Those of the entries that are in its conversation: up to the head."""
    entries: list[Entry] = Field(default_factory=list)
    """Parents before children. A fork's first ones are of the agent it was forked from."""
    forks: list[Rewound] = Field(default_factory=list)
    """Forks that begin at one of the entries."""
    rewinds: list[Rewound] = Field(default_factory=list)
    """The agent's newest rewinds, oldest first."""
    origin: Rewound | None = None
    """Where the agent was forked from, if it was."""


async def is_of(ledger: Ledger, workflow_id: str, entry: Entry) -> bool:
    """Whether an entry is on any branch of an agent: its own ones, and those before the one it was forked from."""
    if entry.workflow_id == workflow_id:
        return True
    origin = await ledger.origin(workflow_id)
    return origin is not None and bool(await ledger.on_line(origin.head, [entry.id]))


async def left_behind(
    ledger: Ledger, old_head: str, head: str, *, limit: int, characters: int | None = None
) -> LeftBehind:
    """What is left behind when an agent goes on behind `head` instead of `old_head`.

    Args:
        ledger: where they are.
        old_head: the entry that is left.
        head: the one to go on behind; it may be of any branch.
        limit: of how many calls to tell; the others are counted.
        characters: how much of a call's arguments to tell.
    """
    shared, ids = await ledger.left_behind(old_head, head)
    left = LeftBehind(steps=len(ids))
    if not ids:
        return left
    repeatable: dict[str, dict[str, bool]] = {}
    async for entry, following in _pairs(ledger, [shared, *ids] if shared else ids):
        for call, outcome in _outcomes(entry, following):
            left.calls_total += 1
            if len(left.calls) == limit:
                continue
            if entry.spec_digest not in repeatable:
                repeatable[entry.spec_digest] = await _repeatable(ledger, entry.spec_digest)
            made = MadeCall(
                turn=entry.turn,
                step=entry.step,
                name=call.name,
                arguments=_shortened(call.arguments, characters),
                outcome=outcome,
                repeatable=repeatable[entry.spec_digest].get(call.name),
            )
            left.calls.append(made)
    return left


async def tree(ledger: Ledger, workflow_id: str, *, limit: int) -> Tree:
    """An agent's newest entries, at most `limit`, of all its branches; the head is always there."""
    head, origin = await ledger.head(workflow_id), await ledger.origin(workflow_id)
    own = await ledger.transcript(workflow_id, limit=limit)
    before: list[str] = []
    if head and head not in {entry.id for entry in own}:
        before = [head]
    if origin and len(own) < limit:  # all its own are there: some that it shares, too
        before = [*before, *reversed(await ledger.line(origin.head, limit=limit - len(own)))]
    entries = _parents_first([*await ledger.entries(list(dict.fromkeys(before))), *own])
    ids = [entry.id for entry in entries]
    return Tree(
        head=head,
        line=await ledger.on_line(head, ids) if head else set(),
        entries=entries,
        forks=await ledger.forks(ids),
        rewinds=[made for made in await ledger.rewinds(workflow_id, limit=limit) if made.old_head],
        origin=origin,
    )


def _parents_first(entries: list[Entry]) -> list[Entry]:
    """The entries in their order, save that each comes behind its parent."""
    waiting: dict[str, list[Entry]] = {}
    ids = {entry.id for entry in entries}
    for entry in entries:
        if entry.parent in ids:
            waiting.setdefault(entry.parent or "", []).append(entry)
    ordered: list[Entry] = []
    below = deque(entry for entry in entries if entry.parent not in ids)
    while below:
        entry = below.popleft()
        ordered.append(entry)
        below.extend(waiting.get(entry.id, ()))
    return ordered


async def _pairs(ledger: Ledger, ids: list[str]) -> AsyncIterator[tuple[Entry, Entry | None]]:
    """Each entry with the one that follows it, the last with None; some are read at a time."""
    previous: Entry | None = None
    for start in range(0, len(ids), _PAGE):
        for entry in await ledger.entries(ids[start : start + _PAGE]):
            if previous:
                yield previous, entry
            previous = entry
    if previous:
        yield previous, None


def _outcomes(entry: Entry, following: Entry | None) -> Iterator[tuple[ToolCall, ToolOutcome]]:
    """The calls that an entry asks for, each with what the entry after it says of its outcome."""
    results = [message for message in following.messages if isinstance(message, ToolMessage)] if following else []
    for call in entry.answer.tool_calls if entry.answer else []:
        result = next((result for result in results if result.call_id == call.id), None)
        if result:
            results.remove(result)  # a careless server gives several calls one id
        yield call, result.outcome if result else ToolOutcome.UNKNOWN


async def _repeatable(ledger: Ledger, spec_digest: str) -> dict[str, bool]:
    """By tool, whether a spec says that it may be repeated; nothing when there is no such spec."""
    if not spec_digest or not await ledger.known("specs", [spec_digest]):
        return {}
    return {tool.name: tool.repeatable for tool in (await ledger.get_spec(spec_digest)).tools}


def _shortened(text: str, characters: int | None) -> str:
    return text if characters is None or len(text) <= characters else f"{text[: characters - 1]}…"
