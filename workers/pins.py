"""What `perennial pins` does, over the ledger alone: which entries an agent is shown for ever, add one, remove one.

What can't be done is raised as `CommandError`, whose message is for the person at the terminal.
"""

from __future__ import annotations

from pydantic import BaseModel

from activities.compaction import BYTES_PER_TOKEN, PINNED, size
from activities.entries import Entry
from activities.ledger import Ledger, Pin
from workers import operations
from workers.exits import BAD_INPUT, CommandError
from workflows import names
from workflows.names import Address

_MOST = 20


class Pinned(BaseModel):
    """An entry that an agent is shown for ever."""

    pin: Pin
    entry: Entry


async def pinned(ledger: Ledger, address: Address) -> list[Pinned]:
    """The entries that are pinned, the oldest first."""
    pins = await ledger.pins(names.workflow_id(address))
    entries = await ledger.entries([pin.entry for pin in pins])
    return [Pinned(pin=pin, entry=entry) for pin, entry in zip(pins, entries, strict=True)]


async def add(ledger: Ledger, address: Address, entry: Entry, *, by: str, why: str) -> list[Pinned]:
    """Pin an entry of an agent; all that are pinned then.

    Raises:
        CommandError: they would be more, or longer, than the agent can be shown for ever.
    """
    already = await pinned(ledger, address)
    if entry.id not in [one.entry.id for one in already]:
        await _refuse_if_too_much(ledger, address, [*(one.entry for one in already), entry])
    await ledger.pin(names.workflow_id(address), entry.id, by=by, why=why)
    return await pinned(ledger, address)


async def remove(ledger: Ledger, address: Address, entry: Entry) -> list[Pinned]:
    """Let an entry be summed up again; those that are still pinned.

    Raises:
        CommandError: it is not pinned.
    """
    if not await ledger.unpin(names.workflow_id(address), entry.id):
        raise CommandError(f"Entry {entry.id[:12]} of {operations.shown(address)} is not pinned.", BAD_INPUT)
    return await pinned(ledger, address)


async def _refuse_if_too_much(ledger: Ledger, address: Address, entries: list[Entry]) -> None:
    who = operations.shown(address)
    if len(entries) > _MOST:
        raise CommandError(f"{who} has {_MOST} pinned entries, which is the most; remove one first.", BAD_INPUT)
    newest = (await ledger.transcript(names.workflow_id(address), limit=1) or entries)[-1]
    spec = await ledger.get_spec(newest.spec_digest)
    most = int(spec.context.tokens * PINNED)
    wanted = sum(map(size, entries)) // BYTES_PER_TOKEN
    if wanted > most:
        raise CommandError(
            f"{who} would have about {wanted} tokens of pinned entries; of its context of {spec.context.tokens} "
            f"tokens they may take {most}. Remove one first, or have the agent remember the fact alone (memory).",
            BAD_INPUT,
        )
