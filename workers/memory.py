"""What `perennial memory` does, over the ledger and the specs: look through the facts of an agent, and forget one.

Which team an agent is in, and so whose facts of the scope `team` it shares, the specs say as they are now.

What can't be done is raised as `CommandError`, whose message is for the person at the terminal.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from uuid import uuid4

from temporalio.exceptions import ApplicationError

from activities.entries import Fact
from activities.ledger import Ledger
from activities.memory import Call, KeptFact, Memory
from workers import embeddings, operations
from workers.exits import BAD_INPUT, CommandError
from workers.settings import Settings
from workflows import names
from workflows.names import Address
from workflows.spec import Scope

_CHARACTERS = 10_000_000  # a terminal scrolls


async def facts(  # noqa: PLR0913  # one for each filter
    settings: Settings, address: Address, scopes: Collection[Scope], *, query: str | None, forgotten: bool, limit: int
) -> list[KeptFact]:
    """What is kept for an agent: what fits the query, the best first; without one, the newest first.

    Raises:
        CommandError: the ledger is away, a spec is wrong, or only facts of a team are asked for and there is none.
    """
    who, team = names.workflow_id(address), _team(settings, address)
    if team is None and set(scopes) == {Scope.TEAM}:
        raise CommandError(
            f"{operations.shown(address)} is in no team, by the specs in {settings.specs}: its spec has no `team`.",
            BAD_INPUT,
        )
    async with _memory(settings) as memory:
        if query is None:
            return await memory.kept(who, scopes, team=team, forgotten=forgotten, limit=limit)
        found = await memory.recall(who, scopes, query, team=team, count=limit, characters=_CHARACTERS)
        return [KeptFact(fact=fact) for fact in found.facts]


async def forget(settings: Settings, address: Address, fact_id: str, *, by: str, why: str) -> Fact:
    """Let a fact be recalled no more.

    Raises:
        CommandError: there is no such fact of this agent, or it is forgotten already, or the ledger is away.
    """
    who = names.workflow_id(address)
    call = Call(who, turn=0, key=f"{who}/by-hand/{uuid4()}", by=by or "somebody", team=_team(settings, address))
    async with _memory(settings) as memory:
        return await memory.forget(call, fact_id, list(Scope), why)


def _team(settings: Settings, address: Address) -> str | None:
    """The team of an agent; None too if it has no spec here."""
    specs = operations.known_specs(settings.specs) or []
    return next((spec.team for spec in specs if (spec.tenant, spec.name) == address[:2]), None)


@contextlib.asynccontextmanager
async def _memory(settings: Settings) -> AsyncIterator[Memory]:
    try:
        async with Ledger(settings.ledger_url) as ledger, embeddings.embedder(settings) as embedder:
            yield Memory(ledger, embedder)
    except ApplicationError as error:
        raise CommandError(f"{error.message}\nCorrect PERENNIAL_LEDGER_URL, or start the database.") from error
    except ValueError as error:
        raise CommandError(str(error), BAD_INPUT) from error
