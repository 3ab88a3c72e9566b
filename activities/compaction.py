"""What of a conversation a model is shown, and what is summed up when that grows too long. Reads only; no calls.

    shown = await Conversations(ledger).load(workflow_id, head, spec)
    if shown.crowded(new_messages):
        older = shown.older             # to be summed up
    pools.call(..., context=shown.entries)

A summary stands for all that was before it in the conversation, the summary before it included; the entries stay in
the ledger, and are read by `perennial show` and by whoever rewinds. Pinned entries are never summed up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from activities.conversation import SUM_UP
from activities.entries import AssistantMessage, Entry, MemoryMessage, Message, SummaryMessage, ToolMessage, UserMessage
from activities.ledger import Ledger, texts
from workflows.spec import ContextSpec

BYTES_PER_TOKEN = 4
PINNED = 0.25
"""Of the context: how much pinned entries may take."""
_CROWDED = 0.8
"""Of the context: beyond this share something is summed up. The rest is room for what is told and answered, and for
the estimate, which is one: four bytes of UTF-8 to a token."""
_KEPT = 0.25
"""Of the context: about so much of the newest is kept word for word when the rest is summed up."""


@dataclass(frozen=True)
class Shown:
    """What of a conversation a model is shown."""

    spec: ContextSpec
    summary: Entry | None
    """Stands for all that is not shown, the pinned entries apart."""
    pinned: Sequence[Entry]
    """Older than what the summary stands for."""
    recent: Sequence[Entry]
    """Word for word; oldest first."""
    last: Entry | None
    """The newest entry of all, which may be the summary's."""

    @property
    def entries(self) -> list[Entry]:
        """What to send, in its order."""
        return [*([self.summary] if self.summary else []), *map(without_calls, self.pinned), *self.recent]

    def crowded(self, new: Iterable[Message]) -> bool:
        """Whether so little room is left, with these new messages, that something is to be summed up first."""
        enough = sum(map(size, self.older)) >= self._kept_bytes / 2  # else little would be won
        coming = sum(map(_bytes, new))
        estimated = (sum(map(size, self.entries)) + coming) / BYTES_PER_TOKEN
        counted = 0.0
        if self.last and self.last.summary is None:
            counted = self.last.usage.input_tokens + self.last.usage.output_tokens + coming / BYTES_PER_TOKEN
        return enough and max(estimated, counted) > self.spec.tokens * _CROWDED

    @cached_property
    def older(self) -> list[Entry]:
        """What of the recent entries would be summed up: all but the newest, of which at least one is kept."""
        kept = 0
        for number in range(len(self.recent) - 1, 0, -1):
            kept += size(self.recent[number])
            if kept + size(self.recent[number - 1]) > self._kept_bytes:
                return list(self.recent[:number])
        return []

    def to_sum_up(self, share: int = 1) -> tuple[list[Entry], list[Message]]:
        """What to send to have it summed up: the older entries, and what to ask of the model.

        Args:
            share: only this part of the older entries (2: the older half), at least one.
        """
        older = self.older[: max(1, len(self.older) // share)]
        assert older, "who is not crowded has nothing to sum up"
        behind = self.recent[len(older)]
        results = [message for message in behind.messages if isinstance(message, ToolMessage)]
        words = max(100, self.spec.tokens // 10)
        question = UserMessage(text=SUM_UP.format(words=words))
        return [*([self.summary] if self.summary else []), *older], [*results, question]

    @property
    def _kept_bytes(self) -> float:
        return self.spec.tokens * BYTES_PER_TOKEN * _KEPT


class Conversations:
    """The conversations of all agents."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._pinned_before: dict[tuple[str, frozenset[str]], list[Entry]] = {}
        """By what a summary stands for, and what is pinned: entries never change, and neither does what is before."""

    async def load(self, workflow_id: str, head: str | None, spec: ContextSpec, *, share: int = 1) -> Shown:
        """What a model is shown of the conversation that ends with `head`.

        Args:
            workflow_id: the agent, whose pinned entries are shown.
            head: the agent's newest entry; None at the beginning of its life.
            spec: how much is shown, and whether what is older is summed up.
            share: only this part of what would fit (2: half) is shown word for word.

        Raises:
            ApplicationError: RetryLater: the ledger is away, or has no such entry.
        """
        if head is None:
            return Shown(spec, None, [], [], None)
        fitting = await self._ledger.context(head, max_characters=spec.tokens * BYTES_PER_TOKEN // share)
        summary = await self._ledger.summary(head) if spec.compact else None
        if summary is None or summary.summary is None:
            return Shown(spec, None, [], _spoken(fitting), fitting[-1])
        through = summary.summary.through
        ids = [entry.id for entry in fitting]
        recent = fitting[ids.index(through) + 1 :] if through in ids else fitting
        pinned = await self._pinned(workflow_id, through)
        return Shown(spec, summary, pinned, _spoken(recent), fitting[-1])

    async def _pinned(self, workflow_id: str, through: str) -> list[Entry]:
        """The agent's pinned entries that are in the conversation that ends with `through`."""
        ids = [pin.entry for pin in await self._ledger.pins(workflow_id)]
        if not ids:
            return []
        key = (through, frozenset(ids))
        if key not in self._pinned_before:
            there = await self._ledger.on_line(through, ids)
            if len(self._pinned_before) > _REMEMBERED:
                self._pinned_before.clear()
            self._pinned_before[key] = await self._ledger.entries([one for one in ids if one in there])
        return self._pinned_before[key]


_REMEMBERED = 1000


def _spoken(entries: Iterable[Entry]) -> list[Entry]:
    """The entries in which something was said: not those that summed up what was before."""
    return [entry for entry in entries if entry.summary is None]


def without_calls(entry: Entry) -> Entry:
    """The entry with its tool calls left out and the results in it told as text: their counterparts are not shown."""
    told: list[Message] = []
    for message in entry.messages:
        match message:
            case ToolMessage():
                told.append(UserMessage(text=f"(Result of {message.name}: {message.content})"))
            case AssistantMessage():
                told.append(AssistantMessage(text=message.text))
            case _:
                told.append(message)
    return entry.model_copy(update={"messages": told})


def summary_of(text: str, through: str, spec: ContextSpec) -> SummaryMessage:
    """The summary that the model has written; cut, if it did not keep to what it was told."""
    limit = int(spec.tokens * BYTES_PER_TOKEN * _KEPT)
    return SummaryMessage(text=text.strip().encode()[:limit].decode(errors="ignore"), through=through)


def size(entry: Entry) -> int:
    """How many bytes of text a model is shown of an entry."""
    return sum(map(_bytes, entry.messages))


def _bytes(message: Message) -> int:
    if isinstance(message, MemoryMessage):
        return 0
    return sum(len(text.encode()) for text in texts(message))
