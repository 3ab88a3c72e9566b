"""How the rehearsal endpoint answers where an answer has to fit a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, JsonValue

from activities.forms import Form
from workers.rehearsal_forms import in_form, schema_asked_for

LOG: dict[str, JsonValue] = {
    "type": "object",
    "properties": {"verdict": {"enum": ["fine", "bad"]}, "log": {"type": "array", "items": {"type": "string"}}},
    "required": ["verdict", "log"],
}


class Part(BaseModel):
    name: str
    price: float | None
    count: int


class Order(BaseModel):
    parts: list[Part]
    rush: bool
    note: str = ""


@pytest.mark.parametrize("schema", [LOG, {"type": "object"}, {}, Order.model_json_schema()])
def test_the_schema_is_found_where_the_model_is_told_of_it(schema: dict[str, Any]) -> None:
    """In whatever else the instructions say, before it and after it."""
    assert schema_asked_for(f"Be kind.\n\n{Form(schema).instruction}\n\nYou cannot call tools now.") == schema
    assert schema_asked_for("Be kind.") is None
    assert schema_asked_for(Form({}).instruction.replace("{}", "{")) is None


@given(st.lists(st.text(max_size=20), min_size=1, max_size=3))
@pytest.mark.parametrize(
    "schema", [LOG, Order.model_json_schema(), {"type": "string"}, {}, {"type": ["null", "string"]}]
)
def test_what_the_rules_say_is_brought_into_form(schema: dict[str, Any], texts: list[str]) -> None:
    """Whatever they say, it fits: an agent with a schema has a rehearsal too."""
    assert Form(schema).read(in_form(schema, texts)).faults == []


@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "required": ["at", "who"],
            "properties": {"at": {"format": "date-time"}, "who": {"const": 7}},
        },
        {"type": "array", "minItems": 3, "items": {"type": "integer", "exclusiveMinimum": 4}},
        {"anyOf": [{"type": "number", "minimum": 1.5}, {"type": "null"}]},
        {"type": "string", "maxLength": 3},
    ],
)
def test_the_simplest_value_keeps_to_common_bounds(schema: dict[str, Any]) -> None:
    """Formats, least values, lengths, constants, alternatives."""
    assert Form(schema).read(in_form(schema, ["It is late."])).faults == []


def test_answers_to_several_messages_become_one() -> None:
    """Lists one after the other, else the last one counts; a text among them is brought into form."""
    said = [json.dumps({"verdict": "bad", "log": ["one"]}), "Two.", json.dumps({"verdict": "bad", "log": ["three"]})]
    assert json.loads(in_form(LOG, said)) == {"verdict": "bad", "log": ["one", "Two.", "three"]}
