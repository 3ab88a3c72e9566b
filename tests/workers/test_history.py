"""Which entry somebody means, and how the command goes about a rewind of an agent that goes on meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from activities.entries import AssistantMessage, Entry
from activities.ledger import Ledger
from workers import cli, history, operations
from workers.exits import BAD_INPUT, CommandError
from workers.settings import Settings
from workflows import names
from workflows.messages import RewindRequest, Rewound, ToolCall
from workflows.names import Address

WHO = Address("store", "logistics", "order-42")


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        yield ledger


async def turns(ledger: Ledger, *, first: int = 1, last: int, parent: Entry | None = None) -> list[Entry]:
    """Turns of one step, each with a tool call."""
    entries: list[Entry] = []
    for turn in range(first, last + 1):
        parent = await ledger.append(
            Entry(
                workflow_id=names.workflow_id(WHO),
                turn=turn,
                step=1,
                parent=parent.id if parent else None,
                messages=[AssistantMessage(text=str(turn), tool_calls=[ToolCall(id="c", name="look")])],
                recorded_at="now",
            )
        )
        entries.append(parent)
    return entries


async def test_the_beginning_of_an_id_is_enough_when_it_is_of_one_entry(ledger: Ledger) -> None:
    """In either case, with spaces around it; of several entries, it is asked for more."""
    entries = await turns(ledger, last=20)
    ids = sorted(entry.id for entry in entries)
    for entry in entries:
        assert await history.find_entry(ledger, WHO, f" {entry.id[:16].upper()} ") == entry
    digit = next(one[0] for one, other in pairwise(ids) if one[0] == other[0])
    with pytest.raises(CommandError, match=f"'{digit}' is the beginning of several entries: {digit}") as refused:
        await history.find_entry(ledger, WHO, digit)
    assert refused.value.status == BAD_INPUT


async def test_an_entry_can_be_named_by_its_turn_and_step(ledger: Ledger) -> None:
    """As `show` prints them; one that is not there is said to be none."""
    for entry in await turns(ledger, last=3):
        assert await history.find_entry(ledger, WHO, f" {entry.turn}.{entry.step} ") == entry
    for place in ("99.1", "1.99", "999999999.0"):
        with pytest.raises(CommandError, match="has no turn") as refused:
            await history.find_entry(ledger, WHO, place)
        assert refused.value.status == BAD_INPUT


@pytest.mark.parametrize("text", ["", "  ", "xyz", "1.", "1.2.3", "a" * 65, "ab_", "é"])
async def test_what_can_be_no_id_is_said_to_be_none(ledger: Ledger, text: str) -> None:
    """P14: and what an id looks like."""
    await turns(ledger, last=1)
    with pytest.raises(CommandError, match="is no entry's id: that is 64 hexadecimal digits") as refused:
        await history.find_entry(ledger, WHO, text)
    assert refused.value.status == BAD_INPUT


async def test_who_agreed_to_a_list_of_calls_is_asked_again_when_it_has_grown(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was listed is what is rewound over: an agent that has gone on is looked at again."""
    entries = await turns(ledger, last=3)
    asked: list[str | None] = []

    async def rewind(_: object, __: object, ___: object, request: RewindRequest, *, seconds: float) -> Rewound:
        asked.append(request.over)
        if len(asked) == 1:
            entries.extend(await turns(ledger, first=4, last=4, parent=entries[-1]))
            raise history.GoneOnError("gone on")
        return Rewound(id="r", workflow_id="w", turn=4, head=request.entry, head_turn=1, head_step=1, old_head="b")

    async def connect(_: object) -> None:
        return None

    questions: list[str] = []
    monkeypatch.setattr(history, "rewind", rewind)
    monkeypatch.setattr(operations, "connect", connect)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text, **_: questions.append(text))
    settings = Settings(ledger_url=f"sqlite:///{tmp_path}/ledger.db", specs=tmp_path / "none", _env_file=None)
    parts = ("store/logistics/order-42", entries[0].id, "", 60.0)
    await cli._rewind(settings, *parts, yes=False, dry_run=False, output=cli._output())
    assert asked == [entries[2].id, entries[3].id]
    assert len(questions) == 2
    assert capsys.readouterr().err.count("turn 4, step 1  look") == 1
