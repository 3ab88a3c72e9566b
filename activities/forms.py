"""Forms: the JSON Schema that an agent's answers have to fit, and whether one does.

    form = Form(resolve(spec.reply, beside=folder).json_schema)
    form.instruction                            # what the model is told
    form.read('{"verdict": "maybe"}').faults    # ["$.verdict: 'maybe' is not one of ['harmless', 'stolen']"]

The model is told in words and its answer is checked here, so that it is the same with every provider. An answer is one
JSON value; a code fence around it is forgiven.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import rfc8785
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.validators import Draft202012Validator, validator_for
from pydantic import BaseModel, JsonValue, RootModel
from pydantic import ValidationError as NotJsonError
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from activities import documents
from activities.documents import DocumentError
from workflows.spec import ReplyForm, ReplySpec

ASKED_FOR = "one value that fits this JSON Schema."
"""What stands before the schema where a model is told of it; the rehearsal endpoint finds it by that."""

_SCHEMA_CHARACTERS = 50_000  # it is part of every model call
_ANSWER_CHARACTERS = 200_000  # an answer travels twice: as text, and as the data that it is
_DEPTH = 64  # what Temporal's and Kafka's JSON takes, with what is put around it
_FAULTS_LOOKED_AT = 50
_FAULTS_TOLD = 5
_FAULT_CHARACTERS = 300
_FENCED = re.compile(r"```\w*\s*\n(.*?)\n?\s*```", re.DOTALL)
_LOCAL: Registry[Any] = Registry()
"""Without a way to fetch anything: a schema that is elsewhere may change, or be away."""


class FormError(ValueError):
    """A reply schema can't be used; the message says which and why."""


class _File(RootModel[dict[str, JsonValue]]):
    """A file that holds a schema."""


@dataclass(frozen=True)
class Reading:
    """An answer, read."""

    data: JsonValue = None
    faults: list[str] = field(default_factory=list)
    """What is wrong with it, in short lines; then there is no data."""


class Form:
    """What answers have to fit: a schema as `resolve` has given it."""

    def __init__(self, schema: Mapping[str, JsonValue]) -> None:
        self._validator = _validator(schema)
        self.instruction = (
            "Your final answer is read by a program. Give it as JSON alone, with no other words and no code fence "
            f"around it: {ASKED_FOR}\n{json.dumps(schema, ensure_ascii=False)}"
        )
        """What the model is told of the schema."""

    def read(self, text: str) -> Reading:
        """Read an answer. It never raises: whatever a model says is an answer that fits, or one that does not."""
        try:
            data = _parsed(text)
            faults = [*islice(self._faults(data), _FAULTS_TOLD)]
        except ValueError as error:
            return Reading(faults=[_shortened(f"the answer is not JSON: {error}")])
        except RecursionError:
            return Reading(faults=["the answer can't be checked: it or the schema goes too deep"])
        return Reading(faults=faults) if faults else Reading(data)

    def _faults(self, data: JsonValue) -> Iterator[str]:
        told = set()
        for error in islice(self._validator.iter_errors(data), _FAULTS_LOOKED_AT):
            line = _line(best_match(iter([error])) or error)
            if line not in told:
                told.add(line)
                yield line


def resolve(spec: ReplySpec, beside: Path) -> ReplyForm:
    """What the ledger keeps of a spec's `reply`: the schema itself, wherever it is written.

    Raises:
        FormError: it can't be read, or is no JSON Schema; the message names the file or the model.
    """
    where = ""
    if spec.pydantic:
        where, schema = f"{spec.pydantic}: ", _of_model(spec.pydantic, beside)
    elif isinstance(spec.written, str):
        path = beside / spec.written
        where, schema = f"{path}: ", _of_file(path)
    else:
        schema = spec.written or {}
    try:
        _check(schema)
    except FormError as error:
        raise FormError(f"{where}{error}") from error
    return ReplyForm(json_schema=schema, repairs=spec.repairs)


def _of_file(path: Path) -> dict[str, JsonValue]:
    try:
        if path.suffix == ".json":  # nearly YAML, but not where it is indented with tabs
            return _File.model_validate_json(path.read_bytes()).root
        content, _ = documents.read(path, _File)
    except OSError as error:
        raise FormError(f"{path}: cannot be read: {error.strerror}") from error
    except NotJsonError as error:
        raise FormError(f"{path}: {'; '.join(fault['msg'] for fault in error.errors()[:_FAULTS_TOLD])}") from error
    except DocumentError as error:
        raise FormError(str(error)) from error
    return content.root


def _of_model(path: str, beside: Path) -> dict[str, JsonValue]:
    module_name, _, name = path.partition(":")
    if str(beside) not in sys.path:
        sys.path.append(str(beside))
    try:
        model = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:  # a module of somebody's own may raise anything
        raise FormError(f"{path}: cannot import {module_name}: {error} (also looked in {beside})") from error
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise FormError(f"{path}: {module_name} has no pydantic model {name}")
    try:
        schema: dict[str, JsonValue] = model.model_json_schema()
    except Exception as error:  # a field's type may have no JSON Schema, or one of somebody's own
        raise FormError(f"{path}: it has no JSON Schema: {error}") from error
    return schema


# Schemas -------------------------------------------------------------------------------------------------------------


def _check(schema: Mapping[str, JsonValue]) -> None:
    """Whether the schema can be recorded, told to a model, and checked against.

    Raises:
        FormError: it can't.
    """
    if not _fits_depth(schema):
        raise FormError(f"the schema is nested deeper than {_DEPTH} levels")
    try:
        size = len(rfc8785.dumps(dict(schema)))
        validator = _validator(schema)
        validator.check_schema(schema)
        _check_references(schema)
        any(validator.iter_errors(None))
    except SchemaError as error:
        raise FormError(f"not a JSON Schema: {_line(error)}") from error
    except RecursionError as error:
        raise FormError("the schema refers to itself without an end") from error
    except FormError:
        raise
    except (ValueError, TypeError, AttributeError) as error:  # numbers that JSON can't hold, an $id that is no text
        raise FormError(f"not a JSON Schema: {error}") from error
    if size > _SCHEMA_CHARACTERS:
        raise FormError(f"the schema has {size} characters; at most {_SCHEMA_CHARACTERS} are taken")


def _check_references(schema: Mapping[str, JsonValue]) -> None:
    """Whether all `$ref`s lead somewhere.

    Raises:
        FormError: one does not.
    """
    root = Resource.from_contents(dict(schema), default_specification=DRAFT202012)
    waiting = [(root, _LOCAL.with_resource(root.id() or "", root).resolver_with_root(root))]
    while waiting:
        resource, resolver = waiting.pop()
        if isinstance(resource.contents, Mapping):
            for word in ("$ref", "$dynamicRef"):
                reference = resource.contents.get(word)
                if not isinstance(reference, str):
                    continue
                try:
                    resolver.lookup(reference)
                except Unresolvable as error:
                    raise FormError(
                        f"the schema refers to {reference}, which is not in it; put that under its $defs"
                    ) from error
        waiting += [(below, resolver.in_subresource(below)) for below in resource.subresources()]


def _validator(schema: Mapping[str, JsonValue]) -> Any:
    kind = validator_for(schema, default=Draft202012Validator)
    return kind(schema, registry=_LOCAL, format_checker=kind.FORMAT_CHECKER)


# Answers -------------------------------------------------------------------------------------------------------------


def _parsed(text: str) -> JsonValue:
    """The JSON value that an answer is.

    Raises:
        ValueError: it is none, or holds what JSON can't carry on.
        RecursionError: it is nested too deep.
    """
    text = text.strip()
    if not text:
        raise ValueError("it is empty")
    if len(text) > _ANSWER_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {_ANSWER_CHARACTERS} are taken")
    fenced = _FENCED.fullmatch(text)
    data: JsonValue = json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant)
    if not _fits_depth(data):
        raise RecursionError
    json.dumps(data, ensure_ascii=False, allow_nan=False).encode()  # 1e999; half of a surrogate pair
    return data


def _refuse_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON number")


def _fits_depth(value: object) -> bool:
    level = [value]
    for _ in range(_DEPTH):
        level = [
            below
            for one in level
            if isinstance(one, (list, dict))
            for below in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return True
    return False


def _line(error: ValidationError | SchemaError) -> str:
    return _shortened(f"{error.json_path}: {error.message}")


def _shortened(text: str) -> str:
    """In one line. What is wrong stands at the end of a message, behind the value that it is wrong with."""
    text = " ".join(text.split())
    if len(text) <= _FAULT_CHARACTERS:
        return text
    half = _FAULT_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"
