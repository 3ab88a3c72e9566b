"""The conversation as models are shown it: nothing is lost on the way, and what a provider would refuse is mended."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from pydantic_ai.messages import (
    ModelRequest,
    ModelResponse,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)

from activities import conversation
from activities.conversation import assistant_message, model_messages, shown, storable, without_calls
from activities.entries import (
    AssistantMessage,
    Entry,
    Fact,
    MemoryMessage,
    Message,
    RepairMessage,
    ToolMessage,
    UserMessage,
    canonical,
)
from workflows.messages import ToolCall, ToolOutcome
from workflows.spec import Scope

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = st.sampled_from(["", "a", "b", "a-2", "call", "call-2"])
calls = st.builds(ToolCall, id=ids, name=st.sampled_from(["look", "act"]), arguments=st.one_of(st.just("{}"), texts))
answers = st.builds(AssistantMessage, text=texts, tool_calls=st.lists(calls, max_size=3))
results = st.builds(
    ToolMessage, call_id=ids, name=st.just("look"), content=texts, outcome=st.sampled_from(list(ToolOutcome))
)
facts = st.builds(Fact, text=texts)
reminders = st.builds(MemoryMessage, facts=st.lists(facts, max_size=2))
told = st.builds(UserMessage, text=texts) | st.builds(RepairMessage, text=texts)
messages = st.lists(st.one_of(told, reminders, answers, results), max_size=8)


def entry(*content: Message, error: str | None = None) -> Entry:
    return Entry(
        workflow_id="agent/t/a/k", turn=1, step=1, parent=None, messages=list(content), error=error, recorded_at=""
    )


@given(
    st.builds(AssistantMessage, text=texts.filter(lambda text: not text or text.strip()), tool_calls=st.lists(calls))
)
def test_an_answer_survives_the_way_to_the_library_and_back(answer: AssistantMessage) -> None:
    """Text, and tool calls with arguments as the model wrote them, come back unchanged."""
    (start, *rest) = shown([], [answer])
    assert start == UserMessage(text=conversation.EARLIER)
    sent = [message for message in model_messages([], [answer]) if isinstance(message, ModelResponse)]
    assert [assistant_message(response) for response in sent] == [m for m in rest if isinstance(m, AssistantMessage)]


@given(st.lists(messages, max_size=3), messages)
def test_every_provider_can_take_what_is_shown(earlier: list[list[Message]], new: list[Message]) -> None:
    """It begins with a user; calls are followed by exactly their results, in order; ids are there and unique."""
    mended = shown([entry(*content) for content in earlier], new)
    assert isinstance(mended[0], (UserMessage, MemoryMessage, RepairMessage))
    waiting: list[str] = []
    seen: set[str] = set()
    for message in mended:
        if isinstance(message, ToolMessage):
            assert message.call_id == waiting.pop(0)
        else:
            assert not waiting
        if isinstance(message, AssistantMessage):
            assert message.text.strip() or message.tool_calls
            waiting = [call.id for call in message.tool_calls]
            assert all(waiting)
            assert len(seen | set(waiting)) == len(seen) + len(waiting)
            seen.update(waiting)
    assert not waiting


@given(st.lists(messages, max_size=3), messages)
def test_nothing_a_user_or_model_said_is_lost(earlier: list[list[Message]], new: list[Message]) -> None:
    """All users' texts, and all texts and calls of the model, are shown, in their order."""
    everything = [*(message for content in earlier for message in content), *new]
    mended = shown([entry(*content) for content in earlier], new)
    said = [m.text for m in mended if isinstance(m, UserMessage) and m.text != conversation.EARLIER]
    assert said == [message.text for message in everything if isinstance(message, UserMessage)]
    spoken = [(m.text, [c.arguments for c in m.tool_calls]) for m in mended if isinstance(m, AssistantMessage)]
    assert spoken == [
        (m.text, [c.arguments for c in m.tool_calls])
        for m in everything
        if isinstance(m, AssistantMessage) and (m.text.strip() or m.tool_calls)
    ]


@given(st.text(st.sampled_from("aé😀\ud83d\ude00\x00"), max_size=8))
def test_any_text_can_be_stored(text: str) -> None:
    """Lone surrogates are replaced, and nothing else is changed."""
    stored = storable(text)
    canonical(UserMessage(text=stored))
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert stored == text


def test_a_call_without_a_result_is_said_to_be_not_completed() -> None:
    """A turn that failed between a call and its result doesn't make the agent unable to go on."""
    broken = entry(UserMessage(text="hi"), AssistantMessage(tool_calls=[ToolCall(id="1", name="pay")]))
    _, _, request = model_messages([broken], [UserMessage(text="and now?")])
    assert isinstance(request, ModelRequest)
    result, user = request.parts
    assert isinstance(result, ToolReturnPart)
    assert result.tool_call_id == "1"
    assert result.content == f"Outcome unknown: {conversation.NOT_COMPLETED}"
    assert isinstance(user, UserPromptPart)


def test_what_was_refused_is_not_sent_again() -> None:
    """An event no model will answer must not make every later turn fail too."""
    asked = entry(UserMessage(text="look"), AssistantMessage(tool_calls=[ToolCall(id="1", name="look")]))
    refused = entry(
        ToolMessage(call_id="1", name="look", content="poison"), UserMessage(text="poison"), error="refused"
    )
    mended = shown([asked, refused], [UserMessage(text="go on")])
    assert "poison" not in str(mended)
    assert [message.role for message in mended] == ["user", "assistant", "tool", "user", "user"]


def test_results_whose_calls_are_no_longer_shown_are_left_out() -> None:
    """The beginning of a long turn is cut off between a call and its result."""
    cut = entry(ToolMessage(call_id="1", name="look", content="x"), AssistantMessage(text="done"))
    assert shown([cut], [UserMessage(text="hi")]) == [
        UserMessage(text=conversation.EARLIER),
        AssistantMessage(text="done"),
        UserMessage(text="hi"),
    ]


def test_an_outcome_that_is_not_ok_is_visible_to_the_model() -> None:
    """Errors use the provider's own error channel; what is not known says so."""
    calling = AssistantMessage(tool_calls=[ToolCall(id=str(n), name="pay") for n in range(3)])
    outcomes = [
        ToolMessage(call_id=str(number), name="pay", content="text", outcome=outcome)
        for number, outcome in enumerate(ToolOutcome)
    ]
    request = model_messages([entry(UserMessage(text="hi"), calling)], outcomes)[-1]
    assert isinstance(request, ModelRequest)
    parts = [part for part in request.parts if isinstance(part, ToolReturnPart)]
    assert [(part.outcome, part.content) for part in parts] == [
        ("success", "text"),
        ("failed", "text"),
        ("failed", "Outcome unknown: text"),
    ]


def thoughtful() -> ModelResponse:
    return ModelResponse(
        parts=[
            ThinkingPart("hm", signature="signed", provider_name="anthropic"),
            TextPart("I look."),
            ToolCallPart("look", '{"a": ', tool_call_id="1"),
            ToolCallPart("look", "{}", tool_call_id="1"),
        ],
        provider_name="anthropic",
        provider_url="https://example.test",
    )


def test_what_only_the_provider_understands_is_given_back_to_it() -> None:
    """Thinking and its signature are kept beside text and calls, whose ids are made unique on the way."""
    answer = assistant_message(thoughtful())
    assert [call.id for call in answer.tool_calls] == ["1", "1-2"]
    back = model_messages([entry(UserMessage(text="hi"), answer)], [])[1]
    assert isinstance(back, ModelResponse)
    assert back.parts[0] == thoughtful().parts[0]
    assert (back.provider_name, back.provider_url) == ("anthropic", "https://example.test")
    assert [part.tool_call_id for part in back.parts if isinstance(part, ToolCallPart)] == ["1", "1-2"]
    assert assistant_message(back).text == answer.text


def test_plain_answers_keep_nothing_of_the_vendor() -> None:
    """The ledger doesn't hold everything twice."""
    assert assistant_message(ModelResponse(parts=[TextPart("hi"), ToolCallPart("look", "{}", "1")])).vendor is None


def test_vendor_data_that_cannot_be_used_is_ignored() -> None:
    """Of another version of the library, or not what the entry says: text and tool calls are enough to go on."""
    answer = assistant_message(thoughtful())
    other = assistant_message(ModelResponse(parts=[ThinkingPart("x"), TextPart("other")])).vendor
    for vendor in ("no JSON", "[]", "{}", '[{"kind": "future"}]', '[{"kind": "request", "parts": []}]', other):
        back = model_messages([], [answer.model_copy(update={"vendor": vendor})])[1]
        assert isinstance(back, ModelResponse)
        assert [type(part) for part in back.parts] == [TextPart, ToolCallPart, ToolCallPart]


def test_vendor_data_with_broken_text_can_be_stored() -> None:
    """A lone surrogate in a thought doesn't keep the answer out of the ledger."""
    answer = assistant_message(ModelResponse(parts=[ThinkingPart("h\ud800m"), TextPart("a\udc00b")]))
    canonical(answer)
    assert answer.text == "a\ufffdb"
    assert json.loads(answer.vendor or "")


def test_calls_that_were_not_allowed_are_dropped() -> None:
    """Whatever else was said stays."""
    answer = assistant_message(without_calls(thoughtful()))
    assert answer.tool_calls == []
    assert answer.text == "I look."
    assert "ToolCall" not in (answer.vendor or "")


# What the agent was reminded of --------------------------------------------------------------------------------------


def reminder(*texts_of_facts: str, pinned: bool = False) -> MemoryMessage:
    return MemoryMessage(
        facts=[
            Fact(
                id="0123456789abcdef",
                text=text,
                scope=Scope.KEY,
                pinned=pinned,
                workflow_id="agent/t/a/k",
                turn=1,
                entry=None,
                kept_at="2026-01-02T03:04:05+00:00",
            )
            for text in texts_of_facts
        ]
    )


def test_a_reminder_is_shown_as_notes_a_line_each() -> None:
    """With the id by which a fact is forgotten; a fact of several lines does not look like several facts."""
    (request,) = model_messages([], [reminder("Has a dog.", "Tea\n- and milk", pinned=True), UserMessage(text="Hello")])
    assert isinstance(request, ModelRequest)
    notes, hello = request.parts
    assert isinstance(notes, UserPromptPart)
    assert str(notes.content).splitlines() == [
        conversation.REMINDER,
        "- Has a dog. [0123456789abcdef, key, pinned, kept 2026-01-02]",
        "- Tea - and milk [0123456789abcdef, key, pinned, kept 2026-01-02]",
    ]
    assert hello == UserPromptPart("Hello", timestamp=hello.timestamp)


def test_a_reminder_stays_for_its_turn_and_no_longer() -> None:
    """In the further steps of its turn it is there; the next events bring their own, or none."""
    first, second = reminder("one"), reminder("two")
    asked = entry(first, UserMessage(text="1"), AssistantMessage(tool_calls=[ToolCall(id="c", name="look")]))
    result = ToolMessage(call_id="c", name="look", content="found")
    assert first in shown([asked], [result])
    answered = entry(result, AssistantMessage(text="done"))
    for new in ([second, UserMessage(text="2")], [UserMessage(text="2")]):
        mended = shown([asked, answered], new)
        assert [message for message in mended if isinstance(message, MemoryMessage)] == new[:-1]
    assert first not in shown([entry(first, UserMessage(text="1"), error="refused")], [])


def test_what_was_wrong_with_an_answer_is_told_after_it() -> None:
    """As by a user, in this turn and later ones: the conversation is what it was."""
    asked = entry(UserMessage(text="Is it?"), AssistantMessage(text="maybe"))
    repaired = entry(RepairMessage(text="not so"), AssistantMessage(text="yes"))
    sent = model_messages([asked, repaired], [UserMessage(text="Why?")])
    assert [[part.content for part in message.parts] for message in sent] == [  # type: ignore[union-attr]
        ["Is it?"],
        ["maybe"],
        ["not so"],
        ["yes"],
        ["Why?"],
    ]
