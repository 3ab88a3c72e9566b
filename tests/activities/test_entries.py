"""P8: an entry's id is the hash of all it holds, its parent included; the format of version 1 never changes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from activities.entries import (
    AssistantMessage,
    Entry,
    Fact,
    MemoryMessage,
    RepairMessage,
    ToolMessage,
    UserMessage,
    canonical,
)
from workflows.events import EventReference
from workflows.messages import ToolCall, ToolOutcome, Usage
from workflows.spec import Scope

AGENT = "agent/store/desk/order-42"
FIRST = Entry(
    workflow_id=AGENT,
    turn=1,
    step=1,
    parent=None,
    messages=[
        UserMessage(text="Où est ma commande ? 📦"),
        AssistantMessage(tool_calls=[ToolCall(id="c1", name="look", arguments='{"n": 1}')]),
    ],
    answers=[EventReference(source="store", id="e1", type="store.order")],
    spec_digest="5" * 64,
    model="small",
    usage=Usage(input_tokens=10, output_tokens=2),
    recorded_at="2026-01-02T03:04:05+00:00",
)
SECOND = Entry(
    workflow_id=AGENT,
    turn=1,
    step=2,
    parent=FIRST.id,
    messages=[
        ToolMessage(call_id="c1", name="look", content="in the post", outcome=ToolOutcome.OK),
        AssistantMessage(text="In the post.", vendor='{"kind":"response"}'),
    ],
    recorded_at="2026-01-02T03:04:06+00:00",
)
REMINDED = Entry(
    workflow_id=AGENT,
    turn=2,
    step=1,
    parent=SECOND.id,
    messages=[
        MemoryMessage(
            facts=[
                Fact(
                    id="0123456789abcdef",
                    text="Préfère le thé.",
                    scope=Scope.KEY,
                    pinned=True,
                    workflow_id=AGENT,
                    turn=1,
                    entry=FIRST.id,
                    kept_at="2026-01-02T03:04:05+00:00",
                )
            ]
        ),
        UserMessage(text="Tea?"),
        AssistantMessage(text="Tea."),
    ],
    recorded_at="2026-01-02T03:04:07+00:00",
)
CHANGES: dict[str, Any] = {
    "workflow_id": "agent/store/desk/order-43",
    "turn": 2,
    "step": 2,
    "parent": "0" * 64,
    "messages": [UserMessage(text="else")],
    "answers": [],
    "spec_digest": "6" * 64,
    "model": "large",
    "rehearsal": True,
    "usage": Usage(input_tokens=11, output_tokens=2),
    "error": "400",
    "recorded_at": "2026-01-02T03:04:07+00:00",
}


def test_the_encoding_of_version_1_never_changes() -> None:
    """Entries of years ago are checked against these hashes; the bytes are RFC 8785's, non-ASCII as UTF-8."""
    assert FIRST.encode().decode() == (
        '{"answers":[{"id":"e1","source":"store","type":"store.order"}],"error":null,'
        '"messages":[{"role":"user","text":"Où est ma commande ? 📦"},{"role":"assistant","text":"",'
        '"tool_calls":[{"arguments":"{\\"n\\": 1}","id":"c1","name":"look"}],"vendor":null}],'
        '"model":"small","parent":null,"recorded_at":"2026-01-02T03:04:05+00:00","rehearsal":false,'
        f'"spec_digest":"{"5" * 64}","step":1,"turn":1,"usage":{{"input_tokens":10,"output_tokens":2}},'
        '"version":1,"workflow_id":"agent/store/desk/order-42"}'
    )
    assert FIRST.id == "0e9dcbf9571d7a63c771aa7d2f886cd5600cecc397f22db1c3a92cabaf64bc16"
    assert SECOND.id == "03f181ccdd4228024ffeb67b8ce2e757a3db505bef980098b9f113e59745f8eb"


def test_the_encoding_of_a_reminder_never_changes() -> None:
    """It came later than the first entries, and they keep their ids; from now on it is as fixed as they are."""
    assert canonical(REMINDED.messages[0]).decode() == (
        f'{{"facts":[{{"entry":"{FIRST.id}","id":"0123456789abcdef","kept_at":"2026-01-02T03:04:05+00:00","pinned":true,'
        '"scope":"key","text":"Préfère le thé.","turn":1,"workflow_id":"agent/store/desk/order-42"}],"role":"memory"}'
    )
    assert REMINDED.id == "218aa38770fb648fc29a6eeef4e91319597bc46aefc7cb6bf559b9d4521ae007"


def test_the_encoding_of_a_repair_never_changes() -> None:
    """It too came later."""
    assert canonical(RepairMessage(text="Not so.")).decode() == '{"role":"repair","text":"Not so."}'


def test_the_id_is_the_hash_of_the_stored_bytes() -> None:
    """Anybody can verify a chain with sha256sum."""
    assert FIRST.id == hashlib.sha256(FIRST.encode()).hexdigest()


@pytest.mark.parametrize("field", [name for name in Entry.model_fields if name != "version"])
def test_no_field_can_be_changed_without_changing_the_id(field: str) -> None:
    """P8: the chain of hashes holds every field, and so every field of every entry before."""
    changed = FIRST.model_copy(update={field: CHANGES[field]})
    assert changed.id != FIRST.id
    assert SECOND.model_copy(update={"parent": changed.id}).id != SECOND.id


@pytest.mark.parametrize("entry", [FIRST, SECOND, REMINDED])
def test_an_entry_comes_back_as_it_was(entry: Entry) -> None:
    """What is stored is read into the same entry, with the same id; messages keep their kinds."""
    again = Entry.model_validate_json(entry.encode())
    assert again == entry
    assert again.id == entry.id
    assert [type(message) for message in again.messages] == [type(message) for message in entry.messages]


def test_the_order_of_fields_does_not_matter() -> None:
    """One encoding for one content, in whatever order it was written."""
    backwards = dict(reversed(json.loads(FIRST.encode()).items()))
    assert Entry.model_validate(backwards).id == FIRST.id


class Anything(BaseModel):
    content: dict[str, str | int | bool | None]


@given(content=st.dictionaries(st.text(), st.text() | st.integers(-(2**53) + 1, 2**53 - 1) | st.booleans() | st.none()))
def test_equal_contents_have_one_encoding(content: dict[str, str | int | bool | None]) -> None:
    """Whatever the text: also where its order in UTF-16 and UTF-8 differs."""
    backwards = Anything(content=dict(reversed(content.items())))
    encoded = canonical(Anything(content=content))
    assert encoded == canonical(backwards)
    assert Anything.model_validate_json(encoded) == backwards


def test_the_answer_is_the_last_message_of_the_model() -> None:
    """None when the step has failed, and when there are no messages at all."""
    assert SECOND.answer == AssistantMessage(text="In the post.", vendor='{"kind":"response"}')
    assert FIRST.model_copy(update={"messages": [UserMessage(text="hello")], "error": "400"}).answer is None
    assert FIRST.model_copy(update={"messages": []}).answer is None


def test_entries_are_never_changed() -> None:
    """P8: an entry in hand cannot be altered by accident."""
    with pytest.raises(ValidationError, match="frozen"):
        FIRST.turn = 2  # type: ignore[misc]


def test_an_entry_of_an_unknown_version_is_refused() -> None:
    """It would be hashed in another way; guessing would call a good chain broken."""
    with pytest.raises(ValidationError, match="version"):
        Entry.model_validate({**json.loads(FIRST.encode()), "version": 2})
