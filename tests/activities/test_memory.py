"""Memory's promises, on SQLite and on a real PostgreSQL (see conftest): facts are kept once, found, and kept apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import product
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from temporalio.exceptions import ApplicationError

from activities.entries import AssistantMessage, Entry, Fact
from activities.ledger import Ledger
from activities.memory import MAX_CHARACTERS, MAX_FACTS, MAX_PINNED, Call, Memory
from workflows import names
from workflows.errors import Remedy
from workflows.names import Address
from workflows.spec import MemorySpec, Scope

AGENT = "agent/store/desk/customer-1"
OTHER_KEY = "agent/store/desk/customer-2"
OTHER_AGENT = "agent/store/security/customer-1"
OTHER_TENANT = "agent/bank/desk/customer-1"
ALL = list(Scope)


@pytest.fixture
def memory(ledger: Ledger) -> Memory:
    return Memory(ledger)


def a_call(agent: str = AGENT, key: str = "", turn: int = 1, team: str | None = "parcels") -> Call:
    """A tool call of its own, or one more try of the call with this key."""
    return Call(agent, turn, key or f"{agent}/{turn}/1/{uuid4()}", team=team)


async def texts(memory: Memory, query: str = "", *, agent: str = AGENT, scopes: list[Scope] = ALL) -> list[str]:
    return [fact.text for fact in (await memory.recall(agent, scopes, query)).facts]


# Keeping -------------------------------------------------------------------------------------------------------------


async def test_a_fact_is_kept_with_where_it_comes_from(ledger: Ledger, memory: Memory) -> None:
    """Which entry, which turn, when, by whom: the entry is that of the step that asked for the call."""
    steps: list[Entry] = []
    for step in (1, 2):
        parent = steps[-1].id if steps else None
        said = [AssistantMessage(text=f"step {step}")]
        steps.append(
            await ledger.append(
                Entry(workflow_id=AGENT, turn=3, step=step, parent=parent, messages=said, recorded_at="now")
            )
        )
    fact = await memory.remember(a_call(turn=3), "  Has a dog. ", Scope.KEY, pinned=True)
    assert (fact.text, fact.scope, fact.pinned) == ("Has a dog.", Scope.KEY, True)
    assert (fact.workflow_id, fact.turn, fact.entry) == (AGENT, 3, steps[-1].id)
    assert datetime.fromisoformat(fact.kept_at).utcoffset() == timedelta()
    assert (await memory.recall(AGENT, [Scope.KEY], "dog")).facts == [fact]


async def test_a_call_that_is_made_again_keeps_one_fact(memory: Memory) -> None:
    """P9: the key of the call tells; also twenty tries at once, on an empty database."""
    kept = await asyncio.gather(*(memory.remember(a_call(key="k"), "Has a dog.", Scope.KEY) for _ in range(20)))
    assert len({fact.id for fact in kept}) == 1
    assert await memory.remember(a_call(key="k"), "Has a dog.", Scope.KEY) == kept[0]
    assert await texts(memory) == ["Has a dog."]


async def test_a_retry_after_the_fact_was_forgotten_does_not_bring_it_back(memory: Memory) -> None:
    """P9: its one effect was had."""
    fact = await memory.remember(a_call(key="k"), "Has a dog.", Scope.KEY)
    await memory.forget(a_call(), fact.id, ALL, "it ran away")
    assert await memory.remember(a_call(key="k"), "Has a dog.", Scope.KEY) == fact
    assert await texts(memory) == []


async def test_what_is_known_word_for_word_is_not_kept_twice(memory: Memory) -> None:
    """Models repeat themselves. Pinned is more than not pinned, another scope is another place."""
    fact = await memory.remember(a_call(), "Has a dog.", Scope.KEY)
    assert await memory.remember(a_call(), "Has a dog.", Scope.KEY) == fact
    pinned = await memory.remember(a_call(), "Has a dog.", Scope.KEY, pinned=True)
    assert pinned.id != fact.id
    assert await memory.remember(a_call(), "Has a dog.", Scope.KEY) in {fact, pinned}
    assert (await memory.remember(a_call(), "Has a dog.", Scope.AGENT)).id not in {fact.id, pinned.id}
    assert len(await texts(memory)) == 3


@pytest.mark.parametrize(
    "text", ["a\x00b", "\ud800 alone", "🦊 e\u0301 \u202e", "'\"\\%_:*()&|!<->", "x" * MAX_CHARACTERS]
)
async def test_any_text_can_be_kept_and_found(memory: Memory, text: str) -> None:
    """What a database can't hold is replaced; nothing is refused, and nothing is taken for syntax."""
    fact = await memory.remember(a_call(), text, Scope.KEY)
    assert (await memory.recall(AGENT, ALL, "")).facts == [fact]
    assert len(fact.text) == len(text)
    await memory.recall(AGENT, ALL, text)


# Finding -------------------------------------------------------------------------------------------------------------


async def test_the_best_fit_is_recalled_first(memory: Memory) -> None:
    """By words in any form and language; of what fits equally, the newest; the newest of all when nothing is asked."""
    for text in ["Parcels go to the neighbour.", "Has a dog.", "Préfère le thé.", "Hat einen Hund.", "Has a dog, too."]:
        await memory.remember(a_call(), text, Scope.KEY)
    assert await texts(memory, "neighbour's parcel?") == ["Parcels go to the neighbour."]
    assert await texts(memory, "DOGS") == ["Has a dog.", "Has a dog, too."]
    assert await texts(memory, "the") == ["Préfère le thé.", "Parcels go to the neighbour."]
    assert await texts(memory, "elephant") == []
    assert (
        await texts(memory, "?!")
        == await texts(memory, "")
        == [
            "Has a dog, too.",
            "Hat einen Hund.",
            "Préfère le thé.",
            "Has a dog.",
            "Parcels go to the neighbour.",
        ]
    )


async def test_what_is_recalled_is_bounded_and_says_what_it_leaves_out(memory: Memory) -> None:
    """In number and in characters; what is too long makes room for what is not."""
    for number in range(30):
        await memory.remember(a_call(), f"fact {number}", Scope.KEY)
    told = await memory.recall(AGENT, ALL, "fact")
    assert (len(told.facts), told.left_out, told.kept) == (20, 10, 30)
    await memory.remember(a_call(), "fact " + "x" * 500, Scope.KEY)
    told = await memory.recall(AGENT, ALL, "", count=2, characters=100)
    assert [fact.text for fact in told.facts] == ["fact 29", "fact 28"]
    assert (told.left_out, told.kept) == (29, 31)
    assert (await memory.recall(AGENT, ALL, "elephant")).kept == 31


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    query=st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                '"',
                "'",
                "*",
                "NOT",
                "AND",
                "(",
                ")",
                ":",
                "^",
                "\\",
                "\x00",
                "dog",
                "🚚",
                "'dog':*",
                "place:",
                "%",
                "猫",
                "\ud800",
            ]
        )
    ).map(" ".join)
)
async def test_no_query_raises(memory: Memory, query: str) -> None:
    """Quotes, operators, emoji, nothing at all: what finds nothing finds nothing."""
    await memory.remember(a_call(key="dog"), 'A dog, a 🚚 and a "place": 猫.', Scope.KEY)
    found = await texts(memory, query)
    assert len(found) <= 1
    if "dog" in query.split():
        assert found


async def test_a_query_of_a_megabyte_is_answered(memory: Memory) -> None:
    """The beginning of it counts."""
    await memory.remember(a_call(), "Has a dog.", Scope.KEY)
    assert await texts(memory, "dog " + "and more " * 100_000) == ["Has a dog."]


# Being reminded ------------------------------------------------------------------------------------------------------


async def test_a_turn_begins_with_what_is_pinned_and_what_fits(memory: Memory) -> None:
    """Its own before what others share; what neither is pinned nor fits, or what it may not read, stays away."""
    for text, scope, pinned in [
        ("Write in French.", Scope.KEY, True),
        ("The warehouse moves.", Scope.TENANT, True),
        ("Has a dog.", Scope.KEY, False),
        ("Dogs bark.", Scope.TENANT, False),
        ("Secret dogs.", Scope.AGENT, True),
        ("Likes tents.", Scope.KEY, False),
    ]:
        await memory.remember(a_call(), text, scope, pinned=pinned)
    spec = MemorySpec(read=[Scope.KEY, Scope.TENANT])
    reminded = [fact.text for fact in await memory.fitting(AGENT, spec, "my dog ate the parcel")]
    assert reminded[:2] == ["Write in French.", "The warehouse moves."]
    assert sorted(reminded[2:]) == ["Dogs bark.", "Has a dog."]
    assert [fact.text for fact in await memory.fitting(AGENT, spec, "")] == reminded[:2]


async def test_a_reminder_is_as_long_as_the_spec_says(memory: Memory) -> None:
    """In number and in characters; none is none."""
    for number in range(10):
        await memory.remember(a_call(), f"dog {number} " + "x" * 300, Scope.KEY)
    for recalled, characters, expected in [(2, 2000, 2), (8, 1000, 3), (0, 2000, 0)]:
        spec = MemorySpec(recalled=recalled, characters=characters)
        assert len(await memory.fitting(AGENT, spec, "dog")) == expected
    assert await memory.fitting(AGENT, MemorySpec(read=[]), "dog") == []


# Forgetting ----------------------------------------------------------------------------------------------------------


async def test_what_is_forgotten_is_not_recalled_and_stays_on_record(memory: Memory) -> None:
    """By whom, when and why; a retry is no second forgetting."""
    fact = await memory.remember(a_call(), "Has a dog.", Scope.KEY, pinned=True)
    for _ in range(2):
        assert await memory.forget(a_call(key="f"), fact.id, ALL, "it ran away") == fact
    assert await texts(memory) == await texts(memory, "dog") == []
    assert await memory.fitting(AGENT, MemorySpec(), "dog") == []
    assert await memory.kept(AGENT, ALL, limit=10) == []
    (kept,) = await memory.kept(AGENT, ALL, forgotten=True, limit=10)
    assert kept.fact == fact
    assert kept.forgotten is not None
    assert (kept.forgotten.by, kept.forgotten.why) == (AGENT, "it ran away")
    assert datetime.fromisoformat(kept.forgotten.at) >= datetime.fromisoformat(fact.kept_at)


async def test_what_was_forgotten_may_be_remembered_anew(memory: Memory) -> None:
    """As another fact, with a record of its own."""
    first = await memory.remember(a_call(), "Has a dog.", Scope.KEY)
    await memory.forget(a_call(), first.id, ALL, "it ran away")
    second = await memory.remember(a_call(), "Has a dog.", Scope.KEY)
    assert second.id != first.id
    assert (await memory.recall(AGENT, ALL, "dog")).facts == [second]


# Bad input -----------------------------------------------------------------------------------------------------------


async def complaint(what: Any) -> str:
    """What the model is told: a plain ValueError, and not too long."""
    with pytest.raises(ValueError, match=r"\w") as refused:
        await what
    assert type(refused.value) is ValueError, "a subclass would be taken for a tool that broke"
    assert len(str(refused.value)) < 400
    return str(refused.value)


async def test_a_fact_has_to_be_one(memory: Memory) -> None:
    """P14: a megabyte, or nothing; the answer says how much there may be."""
    assert "1,000 characters, and this has 1,000,000" in await complaint(
        memory.remember(a_call(), "x" * 1_000_000, Scope.KEY)
    )
    assert "empty" in await complaint(memory.remember(a_call(), " \n ", Scope.KEY))
    assert await texts(memory) == []


async def test_a_place_that_is_full_says_so(memory: Memory) -> None:
    """P14: a thousand facts; recall and reminders stay bounded; room is made by forgetting; other places have room."""
    facts = [await memory.remember(a_call(key=f"{number}"), f"dog {number}", Scope.KEY) for number in range(MAX_FACTS)]
    assert "1,000 facts" in await complaint(memory.remember(a_call(), "one dog more", Scope.KEY))
    assert await memory.remember(a_call(), "dog 7", Scope.KEY) == facts[7], "it is there already"
    told = await memory.recall(AGENT, ALL, "dog")
    assert (len(told.facts), told.left_out) == (20, MAX_FACTS - 20)
    assert len(await memory.fitting(AGENT, MemorySpec(), "dog")) == 8
    await memory.remember(a_call(OTHER_KEY), "one dog more", Scope.KEY)
    await memory.remember(a_call(), "one dog more", Scope.AGENT)
    await memory.forget(a_call(), facts[0].id, ALL, "enough dogs")
    await memory.remember(a_call(), "one dog more", Scope.KEY)
    assert await memory.remember(a_call(key="0"), "dog 0", Scope.KEY) == facts[0], "a retry needs no room"


async def test_not_everything_can_be_pinned(memory: Memory) -> None:
    """P14: what is before the model in every turn is little."""
    for number in range(MAX_PINNED):
        await memory.remember(a_call(), f"dog {number}", Scope.KEY, pinned=True)
    assert "20 pinned" in await complaint(memory.remember(a_call(), "one more", Scope.KEY, pinned=True))
    await memory.remember(a_call(), "one more", Scope.KEY)


async def test_what_cannot_be_forgotten_is_said(memory: Memory) -> None:
    """P14: unknown, forgotten already, of a scope that is only read, without a reason."""
    fact = await memory.remember(a_call(), "Has a dog.", Scope.TENANT)
    for unknown in ["0" * 16, "", "x" * 1_000_000, "'; DROP TABLE facts; --", "\x00", "\ud800", fact.id.upper() + "x"]:
        assert "no fact" in await complaint(memory.forget(a_call(), unknown, ALL, "why not"))
    assert "of scope tenant" in await complaint(memory.forget(a_call(), fact.id, [Scope.KEY], "why not"))
    assert "`why` is empty" in await complaint(memory.forget(a_call(), fact.id, ALL, " "))
    await memory.forget(a_call(), f" {fact.id}\n", ALL, "it ran away " + "x" * 1_000_000)
    assert "forgotten already" in await complaint(memory.forget(a_call(), fact.id, ALL, "again"))


async def test_a_foreign_fact_is_as_unknown_as_one_that_is_not_there(memory: Memory) -> None:
    """Not even that it is there is told."""
    for stranger, scope in [
        (OTHER_KEY, Scope.KEY),
        (OTHER_AGENT, Scope.AGENT),
        (OTHER_TENANT, Scope.KEY),
        (OTHER_TENANT, Scope.TENANT),
    ]:
        fact = await memory.remember(a_call(stranger), "Has a dog.", scope)
        told = await complaint(memory.forget(a_call(), fact.id, ALL, "why not"))
        assert told.replace(fact.id, "") == (
            await complaint(memory.forget(a_call(), "0" * 16, ALL, "why not"))
        ).replace("0" * 16, "")
        assert (await memory.recall(stranger, ALL, "dog")).facts[0].text == "Has a dog."


# Isolation -----------------------------------------------------------------------------------------------------------

_PARTS = ["a", "b", "a/b", "%2F", "a b", "é"]
_agents = st.builds(
    Address, tenant=st.sampled_from(_PARTS), agent=st.sampled_from(_PARTS), key=st.sampled_from(_PARTS)
).map(names.workflow_id)


def team_of(agent: str) -> str:
    """By its name; some are in none. Teams are called as tenants and agents are."""
    return {"a": "a", "b": "a", "a/b": "a/b", "%2F": "b"}.get(names.parse_workflow_id(agent).agent, "")


def may_see(reader: str, fact_of: str, scope: Scope) -> bool:
    """Whether an agent may be reminded of what another has kept, said once more and in other words."""
    one, other = names.parse_workflow_id(reader), names.parse_workflow_id(fact_of)
    return {
        Scope.TENANT: one.tenant == other.tenant,
        Scope.TEAM: one.tenant == other.tenant and team_of(reader) == team_of(fact_of) != "",
        Scope.AGENT: one[:2] == other[:2],
        Scope.KEY: one == other,
    }[scope]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kept=st.lists(st.tuples(_agents, st.sampled_from(ALL)), min_size=1, max_size=6),
    reader=_agents,
    scopes=st.lists(st.sampled_from(ALL), unique=True),
    query=st.sampled_from(["", "word", "token"]),
)
async def test_nobody_sees_what_is_not_theirs(
    memory: Memory, kept: list[tuple[str, Scope]], reader: str, scopes: list[Scope], query: str
) -> None:
    """An agent is reminded of exactly the facts of its tenant, team, name or key, in the scopes that it reads."""
    run = uuid4().hex  # each example is written into a ledger that holds others already
    tenant = names.parse_workflow_id(reader).tenant

    def own(agent: str) -> str:
        address = names.parse_workflow_id(agent)
        return names.workflow_id(address._replace(tenant=f"{address.tenant}{run}"))

    facts: list[tuple[str, Fact]] = []
    for number, (agent, scope) in enumerate(kept):
        text = f"word token {number}"
        call = a_call(own(agent), team=team_of(agent))
        if scope is Scope.TEAM and not call.team:
            assert "in no team" in await complaint(memory.remember(call, text, scope))
            continue
        facts.append((agent, await memory.remember(call, text, scope, pinned=number % 2 == 0)))
    expected = {fact.id for agent, fact in facts if may_see(reader, agent, fact.scope) and fact.scope in scopes}
    team = team_of(reader)
    told = await memory.recall(own(reader), scopes, query, team=team)
    assert {fact.id for fact in told.facts} == expected
    assert told.kept == len(expected), (tenant, kept)
    spec = MemorySpec(read=scopes, recalled=50)
    assert {fact.id for fact in await memory.fitting(own(reader), spec, "word", team=team)} == expected
    assert {one.fact.id for one in await memory.kept(own(reader), scopes, team=team, limit=50)} == expected
    for agent, fact in facts:
        if not may_see(reader, agent, fact.scope):
            assert "no fact" in await complaint(memory.forget(a_call(own(reader), team=team), fact.id, ALL, "why not"))


def test_places_are_as_many_as_there_are_owners() -> None:
    """No two owners share a place, whatever characters are in their names."""
    addresses = [Address(*parts) for parts in product(_PARTS, repeat=3)]
    for scope, length in [(Scope.TENANT, 1), (Scope.AGENT, 2), (Scope.KEY, 3)]:
        owners: dict[str, tuple[str, ...]] = {}
        for address in addresses:
            assert owners.setdefault(names.memory_place(address, scope), address[:length]) == address[:length]
        assert len(owners) == len(_PARTS) ** length
    places = {names.memory_place(Address(tenant, "a", "a"), "team", team) for tenant, team in product(_PARTS, repeat=2)}
    assert len(places) == len(_PARTS) ** 2
    assert not any(place.startswith("agent/") for place in places), "where all the others are"


# The database --------------------------------------------------------------------------------------------------------


async def test_an_older_ledger_gets_the_tables_it_lacks(url: str) -> None:
    """A ledger from before there was memory; also one that is open already, from two processes at once."""
    async with Ledger(url) as ledger, Ledger(url) as other:
        await asyncio.gather(ledger.totals(), other.totals())
        await asyncio.gather(
            *(Memory(one).remember(a_call(), f"dog {number}", Scope.KEY) for number, one in enumerate([ledger, other]))
        )
        assert len(await texts(Memory(ledger), "dog")) == 2
    async with Ledger(url) as again:
        assert len(await texts(Memory(again), "dog")) == 2


async def test_a_database_that_is_away_is_waited_for(tmp_path: Any) -> None:
    """Not the model's fault, and not told to it: the call is tried again."""
    (tmp_path / "ledger.db").mkdir()
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        with pytest.raises(ApplicationError) as away:
            await Memory(ledger).remember(a_call(), "Has a dog.", Scope.KEY)
    assert (away.value.type, away.value.non_retryable) == (Remedy.RETRY_LATER, False)


async def test_nothing_is_changed_or_deleted(memory: Memory, ledger: Ledger) -> None:
    """P8, in spirit: remembering and forgetting only ever add rows."""
    counts: list[int] = []
    steps: list[Callable[[], Any]] = [
        lambda: memory.remember(a_call(key="one"), "Has a dog.", Scope.KEY),
        lambda: memory.remember(a_call(), "Has a cat.", Scope.KEY),
        lambda: memory.recall(AGENT, ALL, "dog"),
    ]
    for step in steps:
        await step()
        counts.append(len(await memory.kept(AGENT, ALL, forgotten=True, limit=10)))
    (fact,) = (await memory.recall(AGENT, ALL, "dog")).facts
    before = await memory.kept(AGENT, ALL, forgotten=True, limit=10)
    await memory.forget(a_call(), fact.id, ALL, "it ran away")
    after = await memory.kept(AGENT, ALL, forgotten=True, limit=10)
    assert counts == [1, 2, 2]
    assert [one.fact for one in after] == [one.fact for one in before]
