"""Forms: which schemas can be used, which answers fit, and what is said of those that don't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from activities.forms import ASKED_FOR, Form, FormError, Reading, resolve
from workflows.messages import Decision
from workflows.spec import ReplyForm, ReplySpec

VERDICT: dict[str, JsonValue] = {
    "type": "object",
    "properties": {
        "verdict": {"enum": ["harmless", "stolen"]},
        "signs": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["verdict"],
    "additionalProperties": False,
}
FORM = Form(VERDICT)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=20,
)


def spec(**reply: Any) -> ReplySpec:
    return ReplySpec.model_validate(reply)


# Answers -------------------------------------------------------------------------------------------------------------


@given(values)
def test_every_json_value_is_an_answer_where_anything_may_be(value: JsonValue) -> None:
    """It is read as it was written, in a code fence too, and can go on to Temporal and come back."""
    form, text = Form({}), json.dumps(value)
    assert form.read(text) == form.read(f"```json\n{text}\n```\n") == Reading(value)
    assert Decision.model_validate_json(Decision(head="", data=value).model_dump_json()).data == value


@given(st.text())
def test_no_answer_breaks_the_reading(text: str) -> None:
    """What does not fit has faults, a few short lines; what fits has none."""
    reading = FORM.read(text)
    assert bool(reading.faults) != isinstance(reading.data, dict)
    assert len(reading.faults) <= 5
    assert all(fault == " ".join(fault.split()) and len(fault) < 350 for fault in reading.faults)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ('{"verdict": "stolen", "signs": []}', []),
        ("", ["the answer is not JSON: it is empty"]),
        ("It is stolen.", ["the answer is not JSON: Expecting value: line 1 column 1 (char 0)"]),
        ('{"verdict": "stolen"} Good luck!', ["the answer is not JSON: Extra data: line 1 column 23 (char 22)"]),
        ("{}", ["$: 'verdict' is a required property"]),
        (
            '{"verdict": "lost", "signs": [1, "x"]}',
            ["$.verdict: 'lost' is not one of ['harmless', 'stolen']", "$.signs[0]: 1 is not of type 'string'"],
        ),
        ('{"verdict": "stolen", "x": 1}', ["$: Additional properties are not allowed ('x' was unexpected)"]),
        ("NaN", ["the answer is not JSON: NaN is no JSON number"]),
        ("[" * 65 + "]" * 65, ["the answer can't be checked: it or the schema goes too deep"]),
        ("[" * 100_000, ["the answer can't be checked: it or the schema goes too deep"]),
        ('"' + "x" * 200_000 + '"', ["the answer is not JSON: it has 200002 characters; at most 200000 are taken"]),
    ],
)
def test_what_does_not_fit_is_named(text: str, faults: list[str]) -> None:
    """Where in the answer, what is there, and what should be."""
    assert FORM.read(text).faults == faults


@pytest.mark.parametrize("text", ['"\\ud800"', "1e999", "-Infinity", "9" * 5000])
def test_what_json_cannot_carry_on_is_no_answer(text: str) -> None:
    """Half a surrogate pair, numbers without end: Temporal and Kafka could not take them."""
    assert Form({}).read(text).faults[0].startswith("the answer is not JSON: ")


def test_faults_are_few_and_short_however_wrong_an_answer_is() -> None:
    """They go into a message to the model, and into the error of the turn."""
    many = FORM.read(json.dumps({"verdict": "x" * 10_000, "signs": [*range(1000)]})).faults
    assert len(many) == 5
    assert many[0].startswith("$.verdict: 'xxx")
    assert many[0].endswith("is not one of ['harmless', 'stolen']")
    assert len(many[0]) < 350


def test_of_alternatives_the_nearest_is_named() -> None:
    """`anyOf` alone would say that nothing fits."""
    form = Form({"anyOf": [{"type": "null"}, {"type": "object", "properties": {"n": {"type": "integer"}}}]})
    assert form.read('{"n": "one"}').faults == ["$.n: 'one' is not of type 'integer'"]


def test_the_model_is_told_the_schema() -> None:
    """In words, so that every provider's model can be asked."""
    told = FORM.instruction.partition(ASKED_FOR)[2]
    assert json.loads(told) == VERDICT


# Schemas -------------------------------------------------------------------------------------------------------------


def test_a_schema_stands_in_the_spec_or_in_a_file_or_is_a_model_s(tmp_path: Path) -> None:
    """Whichever it is, the schema itself is what the ledger keeps."""
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT, indent="\t"))
    (tmp_path / "verdict.yaml").write_text("type: object\nrequired: [verdict]\n")
    (tmp_path / "form_models.py").write_text(
        "from pydantic import BaseModel\n\n\nclass Verdict(BaseModel):\n    verdict: str\n    sure: bool = False\n"
    )
    assert resolve(spec(schema=VERDICT), tmp_path) == ReplyForm(json_schema=VERDICT)
    assert resolve(spec(schema="verdict.json", repairs=0), tmp_path) == ReplyForm(json_schema=VERDICT, repairs=0)
    assert resolve(spec(schema="verdict.yaml"), tmp_path).json_schema == {"type": "object", "required": ["verdict"]}
    model = Form(resolve(spec(pydantic="form_models:Verdict"), tmp_path).json_schema)
    assert model.read('{"verdict": "stolen"}').faults == []
    assert model.read('{"sure": true}').faults == ["$: 'verdict' is a required property"]


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"type": "objekt"}, "not a JSON Schema: $.type: 'objekt' is not valid"),
        ({"properties": {"x": 5}}, "not a JSON Schema: $.properties.x: 5 is not of type 'object', 'boolean'"),
        ({"pattern": "("}, "not a JSON Schema: $.pattern: '(' is not a 'regex'"),
        ({"$id": 5}, "not a JSON Schema: "),
        ({"$schema": 5}, "not a JSON Schema: "),
        ({"$ref": "#/$defs/Gone"}, "refers to #/$defs/Gone, which is not in it"),
        ({"$ref": "https://example.com/schema.json"}, "refers to https://example.com/schema.json, which is not in it"),
        ({"properties": {"a": {"items": {"$ref": "#b"}}}}, "refers to #b, which is not in it"),
        ({"$ref": "#"}, "refers to itself without an end"),
        ({"minimum": 2**60}, "not a JSON Schema: "),
        ({"minimum": float("inf")}, "not a JSON Schema: "),
        ({"description": "x" * 50_000}, "at most 50000 are taken"),
    ],
)
def test_a_schema_that_could_not_be_used_is_refused(schema: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    """P14: when the spec is read, not when the first answer comes. Nothing is fetched from elsewhere."""
    with pytest.raises(FormError) as refused:
        resolve(spec(schema=schema), tmp_path)
    assert complaint in str(refused.value)


def test_a_schema_may_refer_to_its_own_parts_and_to_itself(tmp_path: Path) -> None:
    """By pointer, by anchor, of an older draft, and recursively."""
    tree: dict[str, JsonValue] = {
        "type": "object",
        "properties": {"name": {"$ref": "#named"}, "below": {"type": "array", "items": {"$ref": "#"}}},
        "$defs": {"name": {"$anchor": "named", "type": "string"}},
    }
    form = Form(resolve(spec(schema=tree), tmp_path).json_schema)
    assert form.read('{"name": "a", "below": [{"name": "b", "below": []}]}').faults == []
    assert form.read('{"below": [{"name": 1}]}').faults == ["$.below[0].name: 1 is not of type 'string'"]
    old: dict[str, JsonValue] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"n": {"type": "integer"}},
        "$ref": "#/definitions/n",
    }
    assert Form(resolve(spec(schema=old), tmp_path).json_schema).read("1.5").faults == [
        "$: 1.5 is not of type 'integer'"
    ]


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ({"schema": "gone.json"}, "{folder}/gone.json: cannot be read: No such file"),
        ({"schema": "broken.json"}, "{folder}/broken.json: Invalid JSON"),
        ({"schema": "list.json"}, "{folder}/list.json: Input should be an object"),
        ({"schema": "list.yaml"}, "{folder}/list.yaml:1: "),
        ({"schema": "wrong.yaml"}, "{folder}/wrong.yaml: not a JSON Schema: $.type: 5 is not valid"),
        ({"pydantic": "gone_forms:Verdict"}, "gone_forms:Verdict: cannot import gone_forms"),
        ({"pydantic": "json:loads"}, "json:loads: json has no pydantic model loads"),
        ({"pydantic": "odd_forms:Odd"}, "odd_forms:Odd: it has no JSON Schema"),
    ],
)
def test_what_cannot_be_read_is_named(reply: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    """P14: the file or the model, and what is wrong with it."""
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "list.yaml").write_text("[]")
    (tmp_path / "wrong.yaml").write_text("type: 5")
    (tmp_path / "odd_forms.py").write_text(
        "from collections.abc import Callable\nfrom pydantic import BaseModel\n\n\n"
        "class Odd(BaseModel):\n    call: Callable[[], None]\n"
    )
    with pytest.raises(FormError) as refused:
        resolve(spec(**reply), tmp_path)
    assert str(refused.value).startswith(complaint.format(folder=tmp_path))
