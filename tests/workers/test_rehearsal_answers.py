"""What the rehearsal endpoint answers to a conversation: turns, directives, and what it does without a rule."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from activities.forms import Form
from workers.rehearsal_answers import Decision, DirectiveError, Failure, Latency, decide
from workers.rehearsal_protocol import Answer, Call, ChatRequest, completion
from workers.rehearsal_rules import Rules
from workflows import repair

RULES = Rules.model_validate(
    yaml.safe_load("""
    rules:
      - when: {event: shop.lost}
        calls:
          - {tool: look, with: {order_id: "{data.order_id}"}}
          - {tool: act, if: {look.status: lost, before.called.act: null}, with: {order_id: "{data.order_id}"}}
        say: ["Acted on {data.order_id}: {act.case}", "{data.order_id} is {look.status}", "Cannot: {look.error}"]
    """)
)
MOST_STEPS = 100


def tool(name: str, required: list[str], **kinds: str) -> dict[str, Any]:
    properties = {argument: {"type": kind} for argument, kind in kinds.items()}
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}


LOOK = tool("look", ["order_id"], order_id="string", limit="integer")
ACT = tool("act", ["order_id"], order_id="string")


def lost(order_id: str, kind: str = "shop.lost") -> str:
    return f'Event {kind} (id e-{order_id}, from /shop)\n{{"order_id":"{order_id}"}}'


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Talk:
    """A conversation with the endpoint, whose tools answer at once."""

    def __init__(self, *tools: dict[str, Any], rules: Rules = RULES, **results: str) -> None:
        self.tools, self.rules, self.results = list(tools), rules, results
        self.messages: list[dict[str, Any]] = []
        self.steps: list[list[Call]] = []

    def ask(self, **options: Any) -> Decision:
        request = ChatRequest.model_validate(
            {"model": "rehearsal", "messages": self.messages, "tools": self.tools, **options}
        )
        decision = decide(request, self.rules)
        self.messages.append(completion(request, decision.answer, "key")["choices"][0]["message"])
        return decision

    def turn(self, *texts: str, limit: int = MOST_STEPS + 1) -> str:
        """Say this, have all calls made, and return the answer."""
        self.messages += map(user, texts)
        self.steps = []
        while calls := self.ask().answer.calls:
            assert len(self.steps) < limit, "it goes on calling"
            self.steps.append(list(calls))
            for call in self.messages[-1]["tool_calls"]:
                content = self.results.get(call["function"]["name"], '{"status": "fine"}')
                self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        return str(self.messages[-1]["content"])


# Turns ---------------------------------------------------------------------------------------------------------------


def test_a_rule_is_followed_through_the_steps_of_a_turn() -> None:
    """What was called is read from the conversation: nothing is called twice, and the answer uses the results."""
    talk = Talk(LOOK, ACT, look='{"status": "lost"}', act='{"case": 9}')
    assert talk.turn(lost("order-1")) == "Acted on order-1: 9"
    assert talk.steps == [[Call("look", {"order_id": "order-1"})], [Call("act", {"order_id": "order-1"})]]


def test_each_message_of_a_turn_is_answered() -> None:
    """Their calls go in one step where they can; the answers are joined in order."""
    talk = Talk(LOOK, ACT)
    assert talk.turn(lost("order-1"), "Hello?", lost("order-2")).startswith(
        'order-1 is fine\n\nYou told me: "Hello?". I am the rehearsal endpoint'
    )
    assert talk.steps == [[Call("look", {"order_id": "order-1"}), Call("look", {"order_id": "order-2"})]]


def test_the_same_message_twice_in_a_turn_is_two() -> None:
    """Two equal calls have a result each."""
    talk = Talk(LOOK, ACT)
    assert talk.turn(lost("order-1"), lost("order-1")) == "order-1 is fine\n\norder-1 is fine"
    assert talk.steps == [[Call("look", {"order_id": "order-1"})] * 2]


def test_a_rule_remembers_what_was_called_before() -> None:
    """In earlier turns, and for earlier messages of the same turn."""
    talk = Talk(LOOK, ACT, look='{"status": "lost"}', act='{"case": 9}')
    assert talk.turn(lost("order-1"), lost("order-2")) == "Acted on order-1: 9\n\norder-2 is lost"
    assert talk.turn(lost("order-3")) == "order-3 is lost"


def test_a_new_turn_begins_after_an_answer() -> None:
    """What was looked up in an earlier turn is looked up again."""
    talk = Talk(LOOK, ACT)
    talk.turn(lost("order-1"))
    talk.turn(lost("order-1"))
    assert talk.steps == [[Call("look", {"order_id": "order-1"})]]


@pytest.mark.parametrize(
    ("result", "answer"),
    [
        ('{"error": "Outcome unknown: the worker died"}', "Cannot: Outcome unknown: the worker died"),
        ("Outcome unknown: the worker died", "Cannot: Outcome unknown: the worker died"),
        ("order_id: String should have 10 characters", "look answered: order_id: String should have 10 characters"),
        ("[]", "look answered: []"),
    ],
)
def test_a_failed_tool_is_told(result: str, answer: str) -> None:
    """P9: an error is answered sensibly, in whatever form it comes."""
    talk = Talk(LOOK, ACT, look=result)
    assert talk.turn(lost("order-1")) == answer


def test_without_leave_to_call_it_answers() -> None:
    """`tool_choice: none` is respected, by rules, by directives and without either."""
    for text in (lost("order-1"), lost("order-1", "other.kind"), "[[call look {}]]"):
        talk = Talk(LOOK, ACT)
        talk.messages.append(user(text))
        answer = talk.ask(tool_choice="none").answer
        assert not answer.calls
        assert answer.text


# Directives ----------------------------------------------------------------------------------------------------------


def directed(text: str) -> Decision:
    return decide(ChatRequest.model_validate({"model": "rehearsal", "messages": [user(text)]}), RULES)


def test_a_message_can_say_what_is_answered() -> None:
    """Also from anywhere in an event's data."""
    assert directed("Please [[say good morning]]!").answer == Answer("good morning")
    event = json.dumps({"customer": {"notes": ["[[say from afar]]"]}})
    assert directed(f"Event a.b (id 1, from /s)\n{event}").answer == Answer("from afar")


def test_a_message_can_ask_for_calls() -> None:
    """As often as it says, one a step; brackets inside the arguments do no harm."""
    talk = Talk(LOOK, look='{"status": "[[hang]]"}')
    assert talk.turn('[[call look {"order_id": "]]", "limit": [[1]]} x3]] and [[call act]]').count("look answered") == 3
    call = Call("look", {"order_id": "]]", "limit": [[1]]})
    assert talk.steps == [[call], [call], [call], [Call("act", {})]]
    assert talk.turn("[[call look {}]] [[say done]]") == "done"


def test_a_message_can_ask_for_trouble() -> None:
    """Failures have their times in turn; then the message is answered as if they were not there."""
    decision = directed("[[latency 0.1-0.4]] Hello [[error 429 retry-after=2 times=2]] [[cut times=1]] [[hang]]")
    assert decision.latency == Latency(0.1, 0.4)
    limited, cut, hang = Failure("error", 2, 429, "2"), Failure("cut", 1), Failure("hang")
    assert [decision.failure(asked) for asked in range(1, 6)] == [limited, limited, cut, hang, hang]
    assert '"Hello"' in decision.answer.text
    assert directed("[[error 503 times=1]]").failure(2) is None


def test_an_answer_that_was_sent_back_is_given_again_as_the_message_asks() -> None:
    """The turn is still the same: its directives count, its calls are not made again."""
    talk = Talk(LOOK)
    assert talk.turn("[[call look]] [[say one]] [[again two]] [[again three]]") == "one"
    assert [talk.turn(repair.message(["no"])) for _ in range(3)] == ["two", "three", "three"]
    assert talk.turn("[[say done]]") == "done"
    assert talk.turn(repair.message(["no"])) == "done", "without another answer it is the same"
    assert talk.turn("Hello?").startswith('You told me: "Hello?"')


def test_a_message_can_ask_for_an_answer_that_says_nothing() -> None:
    """It is not shown when the model is asked again; what is said then the message may say, too."""
    assert directed("[[empty]]").answer == Answer()
    told = [user("[[empty]] [[again one]] [[again two]]"), user(repair.SAY_SOMETHING)]
    assert decide(ChatRequest.model_validate({"model": "m", "messages": told}), RULES).answer == Answer("one")
    told = [user("[[call look]] [[empty]]"), user(repair.SAY_SOMETHING)]
    assert decide(ChatRequest.model_validate({"model": "m", "messages": told}), RULES).answer.calls
    with pytest.raises(DirectiveError):
        directed("[[empty handed]]")


def test_an_answer_that_has_to_fit_a_schema_does() -> None:
    """Save what a message directs: tests want wrong answers, too."""
    schema: dict[str, Any] = {"type": "object", "properties": {"note": {"type": "string"}}, "required": ["note"]}
    instruction = {"role": "system", "content": f"Be kind.\n\n{Form(schema).instruction}"}
    talk = Talk(LOOK, ACT)
    talk.messages = [instruction]
    assert json.loads(talk.turn(lost("order-1"))) == {"note": "order-1 is fine"}
    assert talk.turn("[[say no]]") == "no"


def test_directives_of_earlier_turns_are_over() -> None:
    """Only the newest turn counts."""
    messages = [user("[[error 500]]"), said("x"), user("hello")]
    decision = decide(ChatRequest.model_validate({"model": "rehearsal", "messages": messages}), RULES)
    assert decision.failure(1) is None


@pytest.mark.parametrize(
    "text",
    [
        "[[latency]]",
        "[[latency 2-1]]",
        "[[latency 99999]]",
        "[[error]]",
        "[[error 200]]",
        "[[error 503 often]]",
        "[[cut twice]]",
        "[[call]]",
        "[[call look {]]",
        "[[call look {} x0]]",
        "[[call look {} x101]]",
        "[[call look {}",
        "[[say hello",
    ],
)
def test_a_directive_that_is_wrong_is_refused(text: str) -> None:
    """P14: whoever writes one is told which is wrong and what is expected."""
    with pytest.raises(DirectiveError, match=r"expected"):
        directed(text)


def test_what_only_looks_like_a_directive_is_text() -> None:
    """Double brackets have other uses."""
    assert "[[wiki link]]" in directed("See [[wiki link]].").answer.text


# Without a rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tools", "call"),
    [
        (lost("order-1", "x.y"), [LOOK], Call("look", {"order_id": "order-1"})),
        (
            'Event x.y (id 1, from /s)\n{"order_id":"a","limit":3,"other":1}',
            [LOOK],
            Call("look", {"order_id": "a", "limit": 3}),
        ),
        ('Event x.y (id 1, from /s)\n{"order_id":5}', [LOOK], None),
        ("Where is order-1042, please?", [LOOK], Call("look", {"order_id": "order-1042"})),
        ("Where is parcel-1042, please?", [LOOK], None),
        (
            "How warm is it in Oslo?",
            [tool("find", ["what"], what="string")],
            Call("find", {"what": "How warm is it in Oslo?"}),
        ),
        ("Hello", [tool("find", ["what", "where"], what="string", where="string")], None),
        ("What time is it?", [LOOK, tool("clock", [])], Call("clock", {})),
        (lost("order-1", "x.y"), [tool("clock", []), LOOK], Call("look", {"order_id": "order-1"})),
        ("Hello", [], None),
    ],
)
def test_a_stranger_agent_sees_something_happen(text: str, tools: list[dict[str, Any]], call: Call | None) -> None:
    """A tool whose arguments are found is called once, and the answer tells its result; else it tells what it heard."""
    talk = Talk(*tools, look='{"status": "on its way"}', find="-4 °C", clock="noon")
    answer = talk.turn(text)
    assert talk.steps == ([[call]] if call else [])
    if call:
        assert talk.results[call.tool] in answer
    else:
        assert "I am the rehearsal endpoint" in answer


def test_a_failed_call_is_told() -> None:
    """Also without a rule."""
    assert "look did not work: no such order" in Talk(LOOK, look='{"error": "no such order"}').turn("And order-7?")


def test_it_can_show_that_it_remembers() -> None:
    """How many messages it was shown, and the last one."""
    talk = Talk()
    assert talk.turn("Do you remember me?") == "I was shown no message before this one."
    talk.messages.append(user("(A message is left out here: it could not be answered.)"))
    talk.turn('Event a.b (id 1, from /s)\n{"text":"My name is Ada."}')
    assert (
        talk.turn("What did I say before?") == 'I was shown 2 messages before this one. The last was: "My name is Ada."'
    )


# Whatever the conversation -------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            lost("order-1"),
            lost("order-2"),
            lost("order-1", "x.y"),
            "Where is order-7?",
            "[[call look {} x3]]",
            '[[call act {"order_id": "order-1"}]]',
            "[[say yes]]",
            "remember?",
            "(A message is left out here: it could not be answered.)",
        ]
    ),
)
RESULTS = st.sampled_from(
    ['{"status": "lost"}', "null", "[]", "Outcome unknown: x", '{"error": "y"}', '{"case": {}}', ""]
)


@settings(max_examples=200)
@given(st.lists(st.lists(TEXTS, min_size=1, max_size=4), min_size=1, max_size=3), RESULTS, RESULTS)
def test_every_turn_ends(turns: list[list[str]], look: str, act: str) -> None:
    """No call is repeated for ever: each turn comes to an answer, after as many steps as were asked for at most."""
    talk = Talk(LOOK, ACT, tool("clock", []), look=look, act=act)
    for texts in turns:
        assert talk.turn(*texts, limit=3 * len(texts) + 2)


def test_a_turn_ends_also_when_its_calls_are_not_recognised() -> None:
    """A client that changes what was called is answered in the end."""
    talk = Talk(LOOK)
    talk.messages.append(user(lost("order-1", "x.y")))
    for _ in range(MOST_STEPS):
        assert talk.ask().answer.calls
        message = talk.messages[-1]
        message["tool_calls"][0]["function"]["arguments"] = "{}"
        talk.messages.append({"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "x"})
    assert not talk.ask().answer.calls
