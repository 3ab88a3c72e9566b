r"""The rules of the rehearsal endpoint: their file, and what one of them says to one event. Pure.

    rules:
      - name: a parcel is late
        when: {event: store.shipment.*, data.days_late: "*"}
        calls:
          - {tool: look_up_order, with: {order_id: "{data.order_id}"}}
          - {tool: flag_shipment, if: {look_up_order.status: shipped}, with: {order_id: "{data.order_id}"}}
        say:
          - {if: {flag_shipment.error: null}, text: {en: "It is flagged.", fr: "C'est signalé."}}
          - "Order {data.order_id} is {look_up_order.status}."
      - data: {status: "{look_up_order.status}", days: "{data.days_late}"}

The first rule whose `when` holds decides, if the tools it calls are offered. A call is made when its `if` holds and
everything its arguments mention is there; it waits only for earlier calls that it mentions. Of calls with the same name
(`as`, else the tool's) the first such one is made. Of `say`, the first candidate counts whose `if` holds and whose text
has everything it mentions.

Fields are `type`, `id`, `subject`, `source`, `data.*`, `text` (what a person wrote), `match.*` (the named groups of
`when.text`), `lang`, `before.count`, `before.last` and `before.called.<tool>` (how many messages came before, the last
of them, and how often a tool was called for them), and `<tool>.*`: a call's result; of a call that went wrong,
`<tool>.error`.

A condition is a value (of a text a glob), a comparison such as "> 3", a list of which one fits, or null: the field is
not there. What is said is a text, or `data`: an answer in JSON. `{field}` in a text is replaced, `{field:cents}` by an
amount (1250: 12.50); when it is the whole of an argument, or of a value in `data`, its JSON type is kept.
"""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from activities.conversation import CANCELLED, EARLIER, INTERRUPTED, LEFT_OUT, REMINDER, SUMMARY
from workers.rehearsal_protocol import Answer, Call
from workflows import names, repair

Conditions = dict[str, JsonValue]
Fields = Mapping[str, JsonValue]

_EVENT_FIELDS = ("type", "id", "subject", "source", "data", "text", "match", "lang", "before")
_NOTES = (REMINDER, SUMMARY, repair.WRONG, *(note.partition("{")[0] for note in (INTERRUPTED, CANCELLED)))
"""How what is told begins that is no event."""
_RENDERED = re.compile(r"Event (\S+) \(id (.*?)(?:, subject (.*?))?, from (.*?)(?:, at (\S+))?\)\n(.*)", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*(?:\.[\w-]+)*)(:cents)?\}")
_COMPARISON = re.compile(r"([<>]=?)\s*(-?\d+(?:\.\d+)?)")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_UNKNOWN = "Outcome unknown:"


class _Absent(Exception):  # noqa: N818  # not an error: what mentions the field does not apply
    """A field is not there."""


# Events --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What one message told the agent: an event, or what a person said."""

    type: str
    id: str = ""
    subject: str | None = None
    source: str = ""
    data: JsonValue = None

    @property
    def text(self) -> str:
        """What a person said, in it or as the whole of it."""
        text = self.data.get("text") if isinstance(self.data, dict) else self.data
        return text if isinstance(text, str) else ""

    @property
    def is_question(self) -> bool:
        """Whether it is what a person said, and nothing else."""
        return self.type == names.ASK_TYPE

    def texts(self) -> Iterator[str]:
        """All texts in its data."""
        yield from _texts(self.data)

    def without(self, remove: Callable[[str], str]) -> Told:
        """The same, with something removed from all texts."""
        return replace(self, data=_changed(self.data, remove))


def read_event(content: str) -> Told | None:
    """A user's message, as `activities/steps.py` renders events, or as a person wrote it; None if it tells nothing."""
    if content in {EARLIER, LEFT_OUT} or content.startswith(_NOTES):
        return None
    rendered = _RENDERED.fullmatch(content)
    if rendered:
        kind, event_id, subject, source, _, data = rendered.groups()
        try:
            return Told(kind, event_id, subject, source, json.loads(data))
        except (ValueError, RecursionError):
            pass  # somebody wrote what looks like an event
    return Told(names.ASK_TYPE, data={"text": content})


def read_result(content: str) -> JsonValue:
    """A tool's result: JSON if it is, else text; of one that went wrong `{"error": ...}`."""
    if content.startswith(_UNKNOWN):
        return {"error": content}
    try:
        value: JsonValue = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return value


@dataclass
class Before:
    """What came before a message: of users' messages the text, oldest first, and which tools were called how often."""

    messages: list[str]
    called: Counter[str]


# The file ------------------------------------------------------------------------------------------------------------


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class When(BaseModel):
    """When a rule applies. Further fields are conditions on the event."""

    model_config = ConfigDict(extra="allow", frozen=True)

    event: str | list[str] = "*"
    """A glob for the event's type, or several."""
    text: str | None = None
    """A regular expression to be found in what a person wrote; upper and lower case are the same."""

    tools: list[str] = Field(default_factory=list)
    """Tools that are offered, beside those that the rule calls."""

    @field_validator("text")
    @classmethod
    def _is_expression(cls, text: str | None) -> str | None:
        try:
            re.compile(text or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return text

    @model_validator(mode="after")
    def _known_fields(self) -> Self:
        _check_mentions(self.conditions, None, _EVENT_FIELDS)
        return self

    @property
    def conditions(self) -> Conditions:
        """The conditions on the event's fields."""
        return self.model_extra or {}


class CallRule(_Form):
    """A tool call that a rule makes."""

    tool: str = Field(min_length=1)
    name: str = Field("", alias="as", pattern=r"^([A-Za-z_]\w*)?$")
    """By what its result is mentioned; the tool's name if nothing is said."""
    conditions: Conditions = Field(default_factory=dict, alias="if")
    arguments: dict[str, JsonValue] = Field(default_factory=dict, alias="with")

    @property
    def known_as(self) -> str:
        """By what its result is mentioned."""
        return self.name or self.tool


class Say(_Form):
    """Something a rule may say: one text, or one for each language, or an answer in JSON."""

    conditions: Conditions = Field(default_factory=dict, alias="if")
    text: str | dict[str, str] | None = Field(None, min_length=1)
    data: dict[str, JsonValue] | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.text is None) == (self.data is None):
            raise ValueError("give either a text or data")
        return self


class Rule(_Form):
    """What is done about some events."""

    name: str = ""
    when: When = Field(default_factory=When)
    calls: list[CallRule] = Field(default_factory=list)
    say: list[Say] = Field(min_length=1)

    @field_validator("say", mode="before")
    @classmethod
    def _one_candidate(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _mentions(self) -> Self:
        """Every field that is mentioned can be there when it is needed."""
        known = list(_EVENT_FIELDS)
        for call in self.calls:
            _check_mentions(call.conditions, dict(call.arguments), known)
            if call.known_as in _EVENT_FIELDS:
                raise ValueError(f"{call.known_as!r} is a field of the event; give the call another name with `as`")
            known.append(call.known_as)
        for say in self.say:
            texts: JsonValue = [*say.text.values()] if isinstance(say.text, dict) else say.text
            _check_mentions(say.conditions, texts or say.data, known)
        return self

    def considered(self, offered: Iterable[str]) -> bool:
        """Whether it may decide, these tools being offered."""
        return {*self.when.tools, *(call.tool for call in self.calls)} <= set(offered)


class Rules(_Form):
    """The file."""

    languages: dict[str, str] = Field(default_factory=dict)
    """For each language a regular expression, to recognise it where `data.lang` does not say it."""
    rules: list[Rule] = Field(default_factory=list)

    @field_validator("languages")
    @classmethod
    def _are_expressions(cls, languages: dict[str, str]) -> dict[str, str]:
        for language, expression in languages.items():
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{language}: not a regular expression: {error}") from error
        return languages

    def find(self, told: Told, offered: Iterable[str], before: Before) -> Applied | None:
        """The rule that decides about an event, ready to be asked; None if there is none.

        Args:
            told: the event.
            offered: the names of the tools that can be called, or have been in this turn.
            before: what came before it.
        """
        fields = self._fields(told, before)
        offered = list(offered)
        for rule in self.rules:
            match = _match(rule.when, told, fields)
            if match is not None and rule.considered(offered):
                return Applied(rule, {**fields, "match": match})
        return None

    def _fields(self, told: Told, before: Before) -> Fields:
        said = told.data.get("lang") if isinstance(told.data, dict) else None
        found = (name for name, words in self.languages.items() if re.search(words, told.text, re.IGNORECASE))
        return {
            "type": told.type,
            "id": told.id,
            "subject": told.subject,
            "source": told.source,
            "data": told.data,
            "text": told.text or None,
            "lang": re.split("[-_]", said)[0].lower() if isinstance(said, str) else next(found, None),
            "before": {
                "count": len(before.messages),
                "last": before.messages[-1] if before.messages else None,
                "called": {**before.called},
            },
        }


@dataclass(frozen=True)
class Applied:
    """A rule that decides about an event."""

    rule: Rule
    fields: Fields

    def answer(self, result_of: ResultOf, *, tools_allowed: bool) -> Answer:
        """The calls to be made now, or, when there are none, what is said.

        Args:
            result_of: the result of a call that was made in this turn; each is given once.
            tools_allowed: False if no calls may be made: then it is said what can be said without them.
        """
        fields = dict(self.fields)
        waiting: set[str] = set()
        made: list[Call] = []
        results: list[tuple[str, JsonValue]] = []
        for rule in self.rule.calls:
            if rule.known_as in fields or rule.known_as in waiting:
                continue  # another of the same name is made in its place
            if waiting.intersection(_roots(rule.conditions, rule.arguments)):
                waiting.add(rule.known_as)
                continue
            arguments = _filled(rule.arguments, fields) if _hold(rule.conditions, fields) else None
            if arguments is None:
                continue  # not to be made: its result stays absent
            result = result_of(Call(rule.tool, arguments))
            if result is not None:
                fields[rule.known_as] = result.value
                results.append((rule.tool, result.value))
            elif tools_allowed:
                made.append(Call(rule.tool, arguments))
                waiting.add(rule.known_as)
        if made:
            return Answer(calls=made)
        return Answer(self._said(fields) or reported(results) or "Noted.")

    def _said(self, fields: Fields) -> str | None:
        for say in self.rule.say:
            if _hold(say.conditions, fields) and (said := _said(say, fields)) is not None:
                return said
        return None


def _said(say: Say, fields: Fields) -> str | None:
    """What is said, if all that it mentions is there."""
    if say.data is not None:
        filled = _filled(say.data, fields)
        return None if filled is None else json.dumps(filled, ensure_ascii=False)
    text = say.text or ""
    if isinstance(text, dict):
        text = text.get(str(fields["lang"])) or next(iter(text.values()))
    return _filled_text(text, fields)


@dataclass(frozen=True)
class Result:
    """What a call came to, as `read_result` reads it."""

    value: JsonValue


ResultOf = Callable[[Call], Result | None]


def reported(results: Iterable[tuple[str, JsonValue]]) -> str:
    """A plain sentence about each tool's result."""
    return " ".join(
        f"{tool} did not work: {_shown(value['error'])}"
        if isinstance(value, dict) and value.get("error")
        else f"{tool} answered: {_shown(value)}"
        for tool, value in results
    )


# Fields, conditions and placeholders ---------------------------------------------------------------------------------


def _match(when: When, told: Told, fields: Fields) -> dict[str, JsonValue] | None:
    """The named groups of its expression, if it holds."""
    globs = [when.event] if isinstance(when.event, str) else when.event
    if not any(fnmatchcase(told.type, glob) for glob in globs) or not _hold(when.conditions, fields):
        return None
    if when.text is None:
        return {}
    found = re.search(when.text, told.text, re.IGNORECASE)
    return {**found.groupdict()} if found else None


def _value(path: str, fields: Fields) -> JsonValue:
    """What is at a path such as `data.items.0.name`; None when nothing is."""
    value: JsonValue = dict(fields)
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _hold(conditions: Conditions, fields: Fields) -> bool:
    return all(_holds(condition, _value(path, fields)) for path, condition in conditions.items())


def _holds(condition: JsonValue, value: JsonValue) -> bool:
    if isinstance(condition, list):
        return any(_holds(one, value) for one in condition)
    if condition is None or value is None:
        return condition is value
    if isinstance(condition, str):
        if comparison := _COMPARISON.fullmatch(condition):
            return _is_number(value) and _COMPARE[comparison[1]](value, float(comparison[2]))
        return fnmatchcase(_shown(value), condition)
    return type(condition) is type(value) and condition == value


def _filled_text(text: str, fields: Fields) -> str | None:
    """The text with its placeholders replaced; None if something is not there."""
    values = {
        whole[0]: _amount(_value(whole[1], fields), fields) if whole[2] else _value(whole[1], fields)
        for whole in _PLACEHOLDER.finditer(text)
    }
    if None in values.values():
        return None
    return _PLACEHOLDER.sub(lambda placeholder: _shown(values[placeholder[0]]), text)


def _amount(cents: JsonValue, fields: Fields) -> str | None:
    """An amount of money, as it is written in the language."""
    if not _is_number(cents):
        return None
    amount = f"{cents / 100:.2f}"
    return amount if fields["lang"] in {None, "en"} else amount.replace(".", ",")


def _is_number(value: JsonValue) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _filled(arguments: dict[str, JsonValue], fields: Fields) -> dict[str, JsonValue] | None:
    """The arguments with their placeholders replaced; None if something is not there."""
    try:
        return {name: _filled_value(value, fields) for name, value in arguments.items()}
    except _Absent:
        return None


def _filled_value(value: JsonValue, fields: Fields) -> JsonValue:
    if isinstance(value, list):
        return [_filled_value(one, fields) for one in value]
    if isinstance(value, dict):
        return {name: _filled_value(one, fields) for name, one in value.items()}
    if not isinstance(value, str):
        return value
    whole = _PLACEHOLDER.fullmatch(value)
    filled = _value(whole[1], fields) if whole and not whole[2] else _filled_text(value, fields)
    if filled is None:
        raise _Absent
    return filled


def _shown(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _texts(value: JsonValue) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _changed(value: JsonValue, change: Callable[[str], str]) -> JsonValue:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    return {name: _changed(one, change) for name, one in value.items()} if isinstance(value, dict) else value


def _paths(conditions: Conditions, texts: JsonValue) -> set[str]:
    """The fields that are mentioned."""
    return {*conditions, *(found[1] for text in _texts(texts) for found in _PLACEHOLDER.finditer(text))}


def _roots(conditions: Conditions, texts: JsonValue) -> set[str]:
    return {path.partition(".")[0] for path in _paths(conditions, texts)}


def _check_mentions(conditions: Conditions, texts: JsonValue, known: Iterable[str]) -> None:
    known = list(known)
    for path in sorted(_paths(conditions, texts)):
        if path.partition(".")[0] not in known:
            raise ValueError(f"{path!r} is not known here; known are: {', '.join(known)}")
