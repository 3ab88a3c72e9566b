"""The rules of the rehearsal endpoint: their file, when they hold, what they call and say."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue
from pydantic_ai.tools import Tool

from activities import demo_carrier, demo_store, documents
from activities.conversation import EARLIER, LEFT_OUT, REMINDER
from activities.forms import Form
from activities.memory_tools import memory_tools
from activities.specs import load_agent
from activities.steps import render
from workers.rehearsal_protocol import Answer, Call
from workers.rehearsal_rules import Applied, Before, Result, Rules, Told, read_event, read_result
from workflows import names, repair
from workflows.approval import ApprovalPolicy, Permission, judge
from workflows.events import Event
from workflows.spec import MemorySpec
from workflows.wake_ups import definitions

NOTHING_BEFORE = Before([], Counter())


def rules(text: str) -> Rules:
    return Rules.model_validate(yaml.safe_load(text))


def find(text: str, told: Told, *offered: str, before: Before = NOTHING_BEFORE) -> Applied | None:
    return rules(text).find(told, offered, before)


def answer(text: str, told: Told, results: dict[str, JsonValue], *, tools_allowed: bool = True) -> Answer:
    """What the only rule answers when these tools have these results."""
    applied = find(text, told, "look", "act", "tell")
    assert applied is not None

    def result_of(call: Call) -> Result | None:
        return Result(results[call.tool]) if call.tool in results else None

    return applied.answer(result_of, tools_allowed=tools_allowed)


def event(kind: str = "shop.order.lost", **data: Any) -> Told:
    return Told(kind, id="e1", subject="order-1", source="/shop", data=data)


def question(text: str) -> Told:
    return Told(names.ASK_TYPE, data={"text": text})


# Reading -------------------------------------------------------------------------------------------------------------


@given(st.text(min_size=1), st.none() | st.text(), st.dictionaries(st.text(), st.integers() | st.text()))
def test_an_event_is_read_as_it_was_rendered(event_id: str, subject: str | None, data: dict[str, JsonValue]) -> None:
    """What think renders is understood; a separator inside an id or a subject can at worst move the border."""
    told = read_event(render(Event(id=event_id, source="/s", type="a.b", subject=subject, data=data)))
    assert told is not None
    assert (told.type, told.data) == ("a.b", data)
    if ", " not in event_id and ", " not in (subject or ""):
        assert (told.id, told.subject, told.source) == (event_id, subject or None, "/s")


def test_what_a_person_wrote_is_a_question() -> None:
    """A message that is no event is what a person said, also when it only looks like an event."""
    for text in ("Hello?", "Event x (id 1, from /s)\nnot JSON"):
        assert read_event(text) == question(text)


@pytest.mark.parametrize(
    "text", [EARLIER, LEFT_OUT, repair.message(["x"]), f"{REMINDER}\n- Has a dog. [0, key, kept 2026-01-02]"]
)
def test_what_stands_for_a_gap_tells_nothing(text: str) -> None:
    """The conversation's own remarks are not answered."""
    assert read_event(text) is None


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ("null", None),
        ("plain words", "plain words"),
        ("Outcome unknown: maybe", {"error": "Outcome unknown: maybe"}),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_result_is_json_or_text(content: str, value: JsonValue) -> None:
    """No result can break the reading; an unknown outcome is an error."""
    assert read_result(content) == value


# The file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rules:\n  - {say: hi, wen: {}}", ":2: rules.0.wen: Extra inputs"),
        ("rules:\n  - {when: {}}", ":2: rules.0.say: Field required"),
        (
            "rules:\n  - when:\n      text: '('\n    say: hi",
            ":3: rules.0.when.text: Value error, not a regular expression",
        ),
        ("rules:\n  - when: {colour: red}\n    say: hi", ":2: rules.0.when: Value error, 'colour' is not known here"),
        ("rules:\n  - say: '{look.status}'", ":2: rules.0: Value error, 'look.status' is not known here"),
        ("rules:\n  - calls: [{tool: data}]\n    say: hi", "'data' is a field of the event"),
        ("rules:\n  - {say: [{text: hi, data: {}}]}", ":2: rules.0.say.0: Value error, give either a text or data"),
        ("rules:\n  - {say: [{if: {}}]}", ":2: rules.0.say.0: Value error, give either a text or data"),
        ("rules:\n  - {say: [{data: {a: ['{look.b}']}}]}", ":2: rules.0: Value error, 'look.b' is not known here"),
        ("languages: {fr: '('}", "rules.yaml:1: languages: Value error, fr: not a regular expression"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    """P14: a rule that could never work is found when the file is read: file, line, field and what is wrong."""
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(documents.DocumentError) as refused:
        documents.read(path, Rules)
    assert fault in str(refused.value)


# When ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "told", "holds"),
    [
        ("{}", event(), True),
        ("{event: shop.order.*}", event(), True),
        ("{event: [shop.customer.*, shop.order.lost]}", event(), True),
        ("{event: shop.customer.*}", event(), False),
        ("{data.lang: es}", event(lang="es"), True),
        ("{data.lang: es}", event(lang="en"), False),
        ("{data.lang: es}", event(), False),
        ("{data.lang: [fr, es]}", event(lang="es"), True),
        ("{data.lang: null}", event(), True),
        ("{data.lang: [null, en]}", event(lang="fr"), False),
        ("{data.days: '> 3'}", event(days=4), True),
        ("{data.days: '> 3'}", event(days=3), False),
        ("{data.days: '>= 3'}", event(days="many"), False),
        ("{data.damaged: true}", event(damaged=True), True),
        ("{data.damaged: true}", event(damaged=1), False),
        ("{data.days: 3}", event(days=3), True),
        ("{data.items.1.name: sock*}", event(items=[{}, {"name": "socks"}]), True),
        ("{data.items.7.name: sock*}", event(items=[]), False),
        ("{subject: order-*}", event(), True),
        ("{text: WHERE}", event(text="so where is it?"), True),
        ("{text: where}", event(note="where"), False),
        ("{text: where}", question("Where is it?"), True),
        ("{before.count: '> 0'}", event(), False),
        ("{tools: [look]}", event(), True),
        ("{tools: [other]}", event(), False),
    ],
)
def test_a_rule_applies_when_all_its_conditions_hold(when: str, told: Told, holds: bool) -> None:
    """Globs, comparisons, lists, absence, expressions, and the tools that are offered."""
    assert (find(f"rules: [{{when: {when}, say: ok}}]", told, "look") is not None) == holds


def test_the_first_rule_that_holds_decides() -> None:
    """Order counts; a rule whose tools are not offered is passed over."""
    text = """
    rules:
      - {name: a, when: {event: other.*}, say: a}
      - {name: b, calls: [{tool: gone}], say: b}
      - {name: c, say: c}
      - {name: d, say: d}
    """
    applied = find(text, event(), "look")
    assert applied is not None
    assert applied.rule.name == "c"


def test_the_language_is_the_events_or_that_of_the_words() -> None:
    """`data.lang` says it, region aside; else the words do; else the first text is said."""
    text = r"""
    languages: {fr: '\bbonjour\b', es: '\bhola\b'}
    rules: [{say: {text: {en: Hello, fr: Bonjour, es: Hola}}}]
    """
    said = {
        "Hola": question("¡Hola!"),
        "Bonjour": event(lang="fr-CA", text="hola"),
        "Hello": question("Hi"),
    }
    assert {expected: answer(text, told, {}).text for expected, told in said.items()} == {said: said for said in said}


# Calls and what is said ----------------------------------------------------------------------------------------------

CHAIN = """
rules:
  - calls:
      - {tool: look, with: {order: "{data.order}", note: "about {subject}", amount: "{data.amount}"}}
      - {tool: act, if: {look.status: lost}, with: {order: "{look.order}"}}
      - {tool: tell, with: {who: "{id}"}}
    say:
      - {if: {act.error: "*"}, text: "failed: {act.error}"}
      - "done: {act.case}"
      - "only {look.status}"
"""


def test_calls_are_made_when_what_they_need_is_there() -> None:
    """Those that need nothing of each other go in one step; a dependent one waits; JSON types are kept."""
    told = event(order=7, amount=1.5)
    first = answer(CHAIN, told, {})
    assert first.calls == [
        Call("look", {"order": 7, "note": "about order-1", "amount": 1.5}),
        Call("tell", {"who": "e1"}),
    ]
    looked: dict[str, JsonValue] = {"look": {"status": "lost", "order": 7}, "tell": "ok"}
    assert answer(CHAIN, told, looked).calls == [Call("act", {"order": 7})]
    assert answer(CHAIN, told, {**looked, "act": {"case": 3}}) == Answer("done: 3")


def test_a_call_whose_condition_fails_is_not_made() -> None:
    """And what would mention its result is not said."""
    told = event(order=7, amount=1)
    assert answer(CHAIN, told, {"look": {"status": "fine"}, "tell": "ok"}) == Answer("only fine")


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (
            {"look": {"status": "lost", "order": 7}, "act": {"error": "Outcome unknown: x"}},
            "failed: Outcome unknown: x",
        ),
        ({"look": {"error": "order: Field required"}}, "look did not work: order: Field required tell answered: ok"),
        ({"look": "no such thing"}, "look answered: no such thing tell answered: ok"),
        ({"look": None}, "look answered: null tell answered: ok"),
    ],
)
def test_a_result_that_is_an_error_leads_to_something_sensible(results: dict[str, JsonValue], said: str) -> None:
    """Where no candidate fits, what the tools answered is told."""
    assert answer(CHAIN, event(order=7, amount=1), {"tell": "ok", **results}) == Answer(said)


def test_without_tools_it_is_said_what_can_be() -> None:
    """In the last step of a turn no calls are made."""
    assert answer(
        CHAIN, event(order=7, amount=1), {"look": {"status": "lost", "order": 7}}, tools_allowed=False
    ) == Answer("only lost")


def test_of_calls_with_one_name_the_first_that_applies_is_made() -> None:
    """Alternatives, also when the first has to wait for its decision."""
    text = """
    rules:
      - calls:
          - {tool: look}
          - {tool: act, if: {look.lang: fr}, with: {text: bonjour}}
          - {tool: act, with: {text: hello}}
        say: ["{act}"]
    """
    assert answer(text, event(), {}).calls == [Call("look", {})]
    assert answer(text, event(), {"look": {"lang": "fr"}}).calls == [Call("act", {"text": "bonjour"})]
    assert answer(text, event(), {"look": {"lang": "de"}}).calls == [Call("act", {"text": "hello"})]


def test_amounts_are_written_as_the_language_has_it() -> None:
    """Cents become whole money."""
    text = "rules: [{say: '{data.paid:cents}'}]"
    assert answer(text, event(paid=1250, lang="en"), {}).text == "12.50"
    assert answer(text, event(paid=1250, lang="fr"), {}).text == "12,50"


def test_named_groups_of_the_expression_are_fields() -> None:
    """What was found in the text can be used."""
    text = (
        r"rules: [{when: {text: '(?P<order>order-\d+)'}, calls: [{tool: look, with: {id: '{match.order}'}}], say: x}]"
    )
    assert answer(text, question("And ORDER-12?"), {}).calls == [Call("look", {"id": "ORDER-12"})]


def test_what_is_said_may_be_json() -> None:
    """A value keeps its type where it is the whole; what is not there passes to the next candidate."""
    text = """
    rules:
      - calls: [{tool: look}]
        say:
          - data: {days: "{look.days}", why: ["late by {look.days}", 1]}
          - data: {days: null}
    """
    assert json.loads(answer(text, event(), {"look": {"days": 3}}).text) == {"days": 3, "why": ["late by 3", 1]}
    assert json.loads(answer(text, event(), {"look": {}}).text) == {"days": None}


# The demo's rules ----------------------------------------------------------------------------------------------------

STORE = Path("deploy/rehearsal.yaml")
TOOLS = (
    "look_up_order",
    "list_orders",
    "refund",
    "flag_shipment",
    "recent_logins",
    "lock_account",
    "send_text_message",
    "track_parcel",
    *(tool.name for tool in memory_tools(MemorySpec())),
    *(tool.name for tool in definitions()),
)


def properties(tool: Tool[None]) -> dict[str, Any]:
    """The arguments of a tool, as its schema has them."""
    found: dict[str, Any] = tool.tool_def.parameters_json_schema["properties"]
    return found


def demo_events() -> list[Event]:
    """The events of the demo that are any."""
    events = []
    for line in Path("deploy/demo/events.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
            events.append(Event.model_validate(content))
        except ValueError:
            continue
    return events


def test_every_event_of_the_demo_meets_a_rule() -> None:
    """And every rule about events is met; so that the demo and its rules are not changed apart."""
    store, _ = documents.read(STORE, Rules)
    met: set[str] = set()
    for one in demo_events():
        told = read_event(render(one))
        assert told is not None
        applied = store.find(told, TOOLS, NOTHING_BEFORE)
        assert applied is not None, one
        met.add(applied.rule.name)
    about_events = {rule.name for rule in store.rules if rule.when.event not in {names.ASK_TYPE, names.WAKE_TYPE}}
    assert met == about_events


def test_a_call_of_the_demo_has_arguments_that_its_tool_knows() -> None:
    """The rules call the store's tools as these are declared, and what they mention of an event is in the events."""
    store, _ = documents.read(STORE, Rules)
    built_in = {tool.name: set(properties(tool)) for tool in memory_tools(MemorySpec())}
    for tool in definitions():
        built_in[tool.name] = set(cast("dict[str, JsonValue]", tool.parameters["properties"]))
    for rule in store.rules:
        for call in rule.calls:
            home = demo_carrier if call.tool == "track_parcel" else demo_store
            known = built_in.get(call.tool) or set(getattr(home, call.tool).__annotations__) - {"return"}
            assert set(call.arguments) <= known, (rule.name, call.tool)
    fields = {name for one in demo_events() if isinstance(one.data, dict) for name in one.data}
    rules_only = "\n".join(line for line in STORE.read_text(encoding="utf-8").splitlines() if "#" not in line)
    mentioned = set(re.findall(r"\bdata\.(\w+)", rules_only))
    assert mentioned <= fields


def refunds(store: Rules, told: Told, order: dict[str, JsonValue]) -> list[Call]:
    """What the demo's rules refund about an event, when the order that they look up is this one."""
    applied = store.find(told, TOOLS, NOTHING_BEFORE)
    assert applied is not None
    made = applied.answer(
        lambda call: Result(order) if call.tool == "look_up_order" else None,  # once looked up, it is decided upon
        tools_allowed=True,
    )
    return [call for call in made.calls if call.tool == "refund"]


@pytest.fixture(scope="module")
def policy() -> ApprovalPolicy:
    """Which refunds a person has to approve, by the spec of the demo's customer service."""
    agent = load_agent(Path("deploy/agents/customer-service.yaml"))
    (found,) = (tool.approval for tool in agent.definitions if tool.name == "refund")
    assert found is not None
    return found


def orders(paid_cents: int) -> list[dict[str, JsonValue]]:
    """Orders for which a refund may be due."""
    order: dict[str, JsonValue] = {"order_id": "order-1024", "refunded_cents": 0, "paid_cents": paid_cents}
    late = {"status": "delayed", "days_late": 9}
    return [{**order, **more} for more in ({"status": "lost", "days_late": 0}, late, {"status": "delivered"})]


def test_the_demo_waits_for_nobody(policy: ApprovalPolicy) -> None:
    """It ends by itself: no refund that its events lead to is one that a person has to approve."""
    store, _ = documents.read(STORE, Rules)
    made = [
        call
        for one in demo_events()
        for order in (*orders(24900), *orders(20000), *orders(4990))
        if (told := read_event(render(one)))
        for call in refunds(store, told, order)
    ]
    assert made
    assert {judge(policy, json.dumps(call.arguments)) for call in made} == {Permission.ALLOW}


@pytest.mark.parametrize(("paid_cents", "expected"), [(24900, Permission.ASK), (20000, Permission.ALLOW)])
def test_a_colleague_can_have_a_person_asked(policy: ApprovalPolicy, paid_cents: int, expected: Permission) -> None:
    """As the README tells: of a refund above 200 EUR, and of no other."""
    store, _ = documents.read(STORE, Rules)
    for order in orders(paid_cents):
        (call,) = refunds(store, question("Refund order-1024, as agreed."), order)
        assert judge(policy, json.dumps(call.arguments)) is expected
    assert not refunds(store, question("Is there a refund for order-1024?"), orders(paid_cents)[0])


def test_what_the_demo_s_rules_say_to_security_fits_its_schema() -> None:
    """Whatever its tools answer, or if they break."""
    store, _ = documents.read(STORE, Rules)
    agent = load_agent(Path("deploy/agents/security.yaml"))
    assert agent.reply is not None
    form = Form(agent.reply.json_schema)
    failed: dict[str, JsonValue] = {"error": 'it said "no"'}
    logins: list[JsonValue] = [
        {"succeeded": succeeded, "device": "an unknown browser", "place": "Lyon"} for succeeded in (True, False)
    ]
    for one in demo_events():
        if not one.type.startswith("store.security."):
            continue
        for results in (
            {"recent_logins": failed},
            {"recent_logins": logins, "lock_account": failed},
            {
                "recent_logins": logins,
                "lock_account": {"customer_id": "c", "locked_at": "now"},
                "send_text_message": failed,
            },
            {
                "recent_logins": logins,
                "lock_account": {"customer_id": "c", "locked_at": "now"},
                "send_text_message": {},
            },
            {"recent_logins": []},
        ):
            told = read_event(render(one))
            assert told is not None
            applied = store.find(told, TOOLS, NOTHING_BEFORE)
            assert applied is not None
            made = applied.answer(lambda call, results=results: Result(results[call.tool]), tools_allowed=True)  # type: ignore[misc]
            assert not made.calls
            assert form.read(made.text).faults == []
