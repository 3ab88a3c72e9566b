"""How the rehearsal endpoint answers where an answer has to fit a JSON Schema, as `activities/forms.py` asks for. Pure.

    schema = schema_asked_for(system_message)
    in_form(schema, ["It is late.", '{"urgent": true, "why": ["late"]}'])

What its rules say as text goes into the strings of the simplest value that fits; a pattern is beyond it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import JsonValue

from activities.forms import ASKED_FOR

_DEPTH = 16
_FORMATS = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "P1D",
    "email": "nobody@example.com",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def schema_asked_for(instructions: str) -> dict[str, JsonValue] | None:
    """The schema that the instructions ask answers to fit; None: answers are text."""
    _, asked, rest = instructions.rpartition(ASKED_FOR)
    try:
        schema, _ = json.JSONDecoder().raw_decode(rest.lstrip()) if asked else (None, 0)
    except (ValueError, RecursionError):
        return None
    return schema if isinstance(schema, dict) else None


def in_form(schema: Mapping[str, JsonValue], said: Iterable[str]) -> str:
    """One answer that fits, made of what was said to each message: texts, or objects that were meant to fit."""
    parts = [*said]
    objects = [_object(part) for part in parts]
    if any(found is not None for found in objects):
        merged: dict[str, Any] = {}
        for part, found in zip(parts, objects, strict=True):
            made: Any = _example(schema, part, schema) if found is None else found
            for name, value in made.items() if isinstance(made, dict) else ():
                both = isinstance(value, list) and isinstance(merged.get(name), list)
                merged[name] = merged[name] + value if both else value
        return json.dumps(merged, ensure_ascii=False)
    return json.dumps(_example(schema, "\n\n".join(filter(None, parts)), schema), ensure_ascii=False)


def _object(text: str) -> dict[str, JsonValue] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _example(schema: object, text: str, root: Mapping[str, JsonValue], depth: int = _DEPTH) -> JsonValue:
    """The simplest value that fits."""
    if not isinstance(schema, Mapping) or not depth:
        return text
    options: Any = schema.get("enum") or [schema.get("const")]
    if options[0] is not None:
        found: JsonValue = options[0]
        return found
    below = _below(schema, root)
    return _of_kind(schema, text, root, depth - 1) if below is None else _example(below, text, root, depth - 1)


def _of_kind(schema: Mapping[str, Any], text: str, root: Mapping[str, JsonValue], depth: int) -> JsonValue:
    value: JsonValue
    match _kind(schema):
        case "object":
            properties = schema.get("properties", {})
            value = {name: _example(properties.get(name), text, root, depth) for name in schema.get("required", [])}
        case "array":
            value = [_example(schema.get("items"), text, root, depth)] * max(1, schema.get("minItems", 1))
        case "integer" | "number":
            value = schema.get("minimum", int(schema.get("exclusiveMinimum", -1)) + 1)
        case "boolean":
            value = False
        case "null":
            value = None
        case _:
            value = _FORMATS.get(str(schema.get("format")), text)[: schema.get("maxLength")]
    return value


def _below(schema: Mapping[str, Any], root: Mapping[str, Any]) -> object:
    """What a schema leads to that says nothing itself."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: Any = root
        for part in reference[2:].split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        return found
    for word in ("anyOf", "oneOf", "allOf"):
        options = schema.get(word)
        if isinstance(options, list) and options:
            return options[0]
    return None


def _kind(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type", "object" if "properties" in schema else "string")
    return str(next(iter(kinds), "string")) if isinstance(kinds, list) else str(kinds)
