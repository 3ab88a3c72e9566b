"""Recall by what is meant, beside the words: on SQLite and on a real PostgreSQL, with vectors over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from uuid import uuid4

import pytest_asyncio
from sqlalchemy import MetaData, text

from activities.embeddings import Embeddings
from activities.endpoints import EmbeddingsConfig
from activities.ledger import Ledger
from activities.memory import Call, Memory
from activities.vectors import packed
from workers.rehearsal import serving
from workers.rehearsal_rules import Rules
from workflows.spec import MemorySpec, Scope

AGENT = "agent/store/desk/customer-1"
OTHER = "agent/store/desk/customer-2"
UMBRELLA, DOG = "Wants a Sonnenschirm.", "Has a Hund."


class Meanings:
    """An embedder that is told what texts mean; others, and all while it is away, get no vector."""

    similarity = 0.5

    def __init__(self, name: str = "meanings", **meanings: Sequence[float]) -> None:
        self.name = name
        self.is_away = False
        self.asked: list[list[str]] = []
        self._meanings = meanings

    async def embed(self, texts: Sequence[str], *, query: bool = False) -> list[bytes | None]:
        self.asked.append(list(texts))
        known = (None if self.is_away else self._meanings.get(one) for one in texts)
        return [packed(numbers) if numbers else None for numbers in known]


@pytest_asyncio.fixture(loop_scope="session")
async def embeddings() -> AsyncIterator[Embeddings]:
    """From the rehearsal endpoint, over HTTP."""
    async with serving(Rules()) as url:
        config = EmbeddingsConfig(model="openai:rehearsal", base_url=url, similarity=0.2)
        async with Embeddings(config, {}) as embeddings:
            yield embeddings


async def kept(memory: Memory, *texts: str, agent: str = AGENT, scope: Scope = Scope.KEY, pinned: bool = False) -> None:
    for one in texts:
        await memory.remember(Call(agent, 1, f"{agent}/1/1/{uuid4()}"), one, scope, pinned=pinned)


async def found(memory: Memory, query: str, agent: str = AGENT) -> list[str]:
    return [fact.text for fact in (await memory.recall(agent, [Scope.KEY, Scope.AGENT], query)).facts]


async def test_what_the_words_do_not_find_is_found(ledger: Ledger, embeddings: Embeddings) -> None:
    """Over HTTP. By `recall` and at the start of a turn, and not by who has no vectors."""
    memory = Memory(ledger, embeddings)
    await kept(memory, UMBRELLA, DOG)
    assert await found(Memory(ledger), "Schirme") == []
    assert await found(memory, "Schirme") == [UMBRELLA]
    assert [fact.text for fact in await memory.fitting(AGENT, MemorySpec(), "Schirme")] == [UMBRELLA]
    told = await memory.recall(AGENT, [Scope.KEY], "Schirme")
    assert (told.left_out, told.kept) == (0, 2)


async def test_words_and_meaning_count_alike(ledger: Ledger) -> None:
    """What both find comes first; what one of them finds is found; each once."""
    embedder = Meanings(**{"a dog": [1, 0], "a dog barks": [1, 0.5], "a pet": [1, 0.1], "a cat": [0, 1], "dog": [1, 0]})
    memory = Memory(ledger, embedder)
    await kept(memory, "a dog called Rex, unknown to the model", "a cat", "a pet", "a dog barks")
    assert await found(memory, "dog") == ["a dog barks", "a pet", "a dog called Rex, unknown to the model"]
    assert await found(memory, "cat") == ["a cat"], "a query without a vector is answered by words"


async def test_nothing_waits_for_the_server_and_vectors_are_made_later(ledger: Ledger) -> None:
    """While it is away facts are remembered, and found by words; whoever remembers or recalls next catches up."""
    embedder = Meanings(**{one: [1, 0] for one in ("a dog", "a pet", "an animal")})
    embedder.is_away = True
    memory = Memory(ledger, embedder)
    await kept(memory, "a dog", "a pet")
    assert await found(memory, "dog") == ["a dog"]
    embedder.is_away = False
    embedder.asked.clear()
    assert set(await found(memory, "an animal")) == {"a dog", "a pet"}
    assert embedder.asked == [["a pet", "a dog"], ["an animal"]]
    embedder.asked.clear()
    await found(memory, "an animal")
    assert embedder.asked == [["an animal"]], "each fact once"


async def test_another_model_makes_vectors_of_its_own(ledger: Ledger) -> None:
    """Vectors of two models are not compared, even of the same length; the old ones stay for who still uses it."""
    old = Memory(ledger, Meanings("old", **{"a dog": [1, 0], "a pet": [1, 0], "animal": [1, 0]}))
    await kept(old, "a dog", "a pet")
    newer = Meanings("new", **{"a dog": [0, 1], "a pet": [1, 0, 0], "animal": [0, 1]})
    new = Memory(ledger, newer)
    assert await found(new, "animal") == ["a dog"]
    assert newer.asked == [["a pet", "a dog"], ["animal"]]
    assert set(await found(old, "animal")) == {"a dog", "a pet"}


async def test_meaning_finds_nothing_that_is_not_theirs(ledger: Ledger) -> None:
    """Nor what is forgotten; nor is either sent to the model, nor anything when there is nothing to be found."""
    embedder = Meanings(**{one: [1, 0] for one in ("a dog", "a pet", "animal")})
    memory = Memory(ledger, embedder)
    assert await found(memory, "animal") == []
    assert embedder.asked == []
    await kept(Memory(ledger), "a dog", agent=OTHER)
    fact = await Memory(ledger).remember(Call(AGENT, 1, "k"), "a pet", Scope.KEY)
    await memory.forget(Call(AGENT, 1, "f"), fact.id, [Scope.KEY], "why not")
    assert await found(memory, "animal") == []
    assert embedder.asked == []
    assert await found(memory, "animal", OTHER) == ["a dog"]
    assert await found(memory, "", OTHER) == ["a dog"]
    assert embedder.asked == [["a dog"], ["animal"]], "without a word the newest are meant"


async def test_what_is_pinned_is_told_once(ledger: Ledger) -> None:
    """At the start of a turn it comes first, and not once more for its meaning."""
    memory = Memory(ledger, Meanings(**{one: [1, 0] for one in ("a dog", "a pet", "animal")}))
    await kept(memory, "a dog", pinned=True)
    await kept(memory, "a pet", scope=Scope.AGENT)
    spec = MemorySpec(read=[Scope.KEY, Scope.AGENT])
    assert [fact.text for fact in await memory.fitting(AGENT, spec, "animal")] == ["a dog", "a pet"]


async def test_many_facts_get_their_vectors_some_at_a_time(ledger: Ledger) -> None:
    """No request is longer than servers take; a call that is made again makes one vector."""
    texts = [f"a pet {number}" for number in range(70)]
    embedder = Meanings(**{one: [1, 0] for one in [*texts, "animal"]})
    await kept(Memory(ledger), *texts)
    memory = Memory(ledger, embedder)
    for _ in range(3):
        assert len(await found(memory, "animal")) == 20
    assert [len(asked) for asked in embedder.asked] == [32, 1, 32, 1, 6, 1]


async def test_the_database_of_an_earlier_release_gets_its_vectors(url: str) -> None:
    """It has facts, and no table for vectors."""
    async with Ledger(url) as ledger:
        await kept(Memory(ledger), "a dog")
        gone = text("DROP TABLE fact_vectors")
        await ledger.transact(lambda connection: connection.execute(gone), writes=True, tables=MetaData())
    async with Ledger(url) as ledger:
        memory = Memory(ledger, Meanings(**{"a dog": [1, 0], "animal": [1, 0]}))
        assert await found(memory, "animal") == ["a dog"]
