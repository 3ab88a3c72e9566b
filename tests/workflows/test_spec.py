"""Specs: what is allowed in a YAML file, and what the workflow carries of it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from workflows.spec import (
    AgentSpec,
    BudgetSpec,
    ControlSpec,
    MailboxSpec,
    ResolvedSpec,
    Scope,
    Subscription,
    ToolDefinition,
)

MINIMAL: dict[str, Any] = {"name": "desk", "instructions": "Answer."}


def test_name_and_instructions_are_enough() -> None:
    """The first agent of one's own is two lines; the rest has defaults that make sense."""
    spec = AgentSpec.model_validate(MINIMAL)
    assert (spec.tenant, spec.route, spec.tools, spec.subscriptions) == ("default", "default", [], [])
    assert (spec.budget.steps_per_turn, spec.mailbox.events_per_turn, spec.mailbox.remember_ids) == (10, 10, 2000)
    assert spec.hibernate_after_seconds is None
    assert spec.memory is None, "it is off unless it is turned on"
    memory = AgentSpec.model_validate({**MINIMAL, "memory": {}}).memory
    assert memory is not None
    assert (memory.read, memory.write, memory.recalled) == ([Scope.KEY], [Scope.KEY], 8)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"name": "Desk"}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"name": "desk/one"}, "name"),
        ({"tenant": ""}, "tenant"),
        ({"instructions": ""}, "instructions"),
        ({"intructions": "x"}, "intructions"),
        ({"tools": [{"python": "no_colon"}]}, "tools.0.python"),
        ({"memory": {"read": ["everybody"]}}, "memory.read.0"),
        ({"memory": {"write": "key"}}, "memory.write"),
        ({"memory": {"recalled": 51}}, "memory.recalled"),
        ({"memory": {"recal": 5}}, "memory.recal"),
        ({"tools": [{"python": "m:f", "timeout_seconds": 0}]}, "tools.0.timeout_seconds"),
        ({"tools": [{"python": "m:f", "attempts": 0}]}, "tools.0.attempts"),
        ({"tools": [{"python": "m:f", "retries": 3}]}, "tools.0.retries"),
        ({"subscriptions": [{"topic": "a b"}]}, "subscriptions.0.topic"),
        ({"subscriptions": [{"topic": "t", "types": []}]}, "subscriptions.0.types"),
        ({"subscriptions": [{"topic": "t", "key": "order_id"}]}, "subscriptions.0.key"),
        ({"subscriptions": [{"topic": "t", "key": "data."}]}, "subscriptions.0.key"),
        ({"budget": {"steps_per_turn": 0}}, "budget.steps_per_turn"),
        ({"mailbox": {"events_per_turn": 0}}, "mailbox.events_per_turn"),
        ({"mailbox": {"remember_ids": 1}}, "mailbox.remember_ids"),
        ({"context": {"tokens": 1}}, "context.tokens"),
        ({"reply": {}}, "reply"),
        ({"reply": {"schema": {}, "pydantic": "m:M"}}, "reply"),
        ({"reply": {"written": {}}}, "reply.written"),
        ({"reply": {"pydantic": "no_colon"}}, "reply.pydantic"),
        ({"reply": {"schema": {}, "repairs": -1}}, "reply.repairs"),
        ({"hibernate_after_seconds": 0}, "hibernate_after_seconds"),
    ],
)
def test_a_mistake_is_named_by_its_field(wrong: dict[str, Any], field: str) -> None:
    """P14: also a misspelt field, which would otherwise be ignored without a word."""
    with pytest.raises(ValidationError) as refused:
        AgentSpec.model_validate({**MINIMAL, **wrong})
    places = [[str(part) for part in fault["loc"]] for fault in refused.value.errors()]
    assert [".".join(part for part in place if not part.startswith("<")) for place in places] == [field]


@pytest.mark.parametrize(
    ("types", "event_type", "wanted"),
    [
        (["*"], "anything", True),
        (["store.customer.*"], "store.customer.asked", True),
        (["store.customer.*"], "store.customer.asked.twice", True),
        (["store.customer.*"], "store.customer", False),
        (["store.customer.*"], "STORE.customer.asked", False),
        (["store.order.placed", "store.alert.*"], "store.alert.raised", True),
        (["store.order.placed"], "store.order.placed.v2", False),
    ],
)
def test_a_subscription_wants_the_types_it_names(types: list[str], event_type: str, *, wanted: bool) -> None:
    """`*` stands for any text; case matters, as in CloudEvents."""
    assert Subscription(topic="t", types=types).wants(event_type) is wanted


def test_the_workflow_carries_only_what_it_decides_by() -> None:
    """Instructions and tool descriptions stay out of every agent's history."""
    tool = ToolDefinition(name="pay", python="m:pay", timeout=timedelta(seconds=3), repeatable=False, attempts=1)
    resolved = ResolvedSpec(
        name="desk",
        tenant="acme",
        instructions="a secret of the house",
        tools=[tool],
        budget=BudgetSpec(steps_per_turn=3),
        mailbox=MailboxSpec(events_per_turn=2),
        hibernate_after=timedelta(hours=1),
    )
    control = resolved.control("digest")
    assert "secret" not in control.model_dump_json()
    assert control.digest == "digest"
    assert (control.budget.steps_per_turn, control.mailbox.events_per_turn) == (3, 2)
    assert control.hibernate_after == timedelta(hours=1)
    pay = control.tools["pay"]
    assert (pay.timeout, pay.repeatable, pay.attempts) == (timedelta(seconds=3), False, 1)


def test_a_control_spec_in_a_history_is_read_by_every_release() -> None:
    """Unknown fields are ignored, missing ones have defaults."""
    assert ControlSpec.model_validate_json('{"digest": "d", "colour": "red"}') == ControlSpec(digest="d")


@pytest.mark.parametrize("part", ["budget", "mailbox"])
def test_a_part_of_a_control_spec_that_a_newer_release_extended_is_read(part: str) -> None:
    """An agent whose history a newer worker wrote is not stuck when an older one takes it over in a rolling deploy."""
    text = f'{{"digest": "d", "{part}": {{"a_field_of_tomorrow": 1}}}}'
    assert ControlSpec.model_validate_json(text) == ControlSpec(digest="d")
