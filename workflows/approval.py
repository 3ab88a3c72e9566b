"""Which tool calls wait for a human's decision: `judge` decides by a tool's policy and the call's arguments. Pure.

    approval:                                    # in a tool's entry of a spec
      default: allow
      rules:                                     # the first that holds decides
        - when: {amount_cents: {above: 20000}}
          then: ask
        - when: {reason: {matches: "*lawsuit*"}, country: {in: [US, UK]}} # all of these
          then: refuse
      expires_seconds: 86400                     # undecided for so long: `on_expiry`
      on_expiry: refuse
      remind_seconds: 14400

A condition that can't be judged, since the argument is missing or of another kind, may hold: then the stricter of what
would follow decides. So no odd argument slips through a policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

_STRICTNESS = ("allow", "ask", "refuse")
_Number = int | float


class Permission(StrEnum):
    """What becomes of a call."""

    ALLOW = "allow"
    ASK = "ask"
    """A human decides."""
    REFUSE = "refuse"


class _Part(BaseModel):
    # Unknown fields are ignored: agents carry a policy (DESIGN.md, "Contracts"). In a spec they are an error.
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class Condition(_Part):
    """What is said of an argument; all of it has to hold."""

    above: _Number | None = None
    below: _Number | None = None
    at_least: _Number | None = None
    at_most: _Number | None = None
    equals: JsonValue = None
    among: list[JsonValue] | None = Field(None, alias="in")
    matches: str | None = None
    """A glob over the whole text, whatever its case: `*` stands for any text."""

    @model_validator(mode="after")
    def _says_something(self) -> Condition:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(f"a condition is one of {', '.join(_NAMES)}")
        return self

    def holds(self, value: Any) -> bool | None:
        """Whether it holds of a value; None if that can't be judged."""
        verdicts = [
            *(_compared(value, limit, sign) for limit, sign in self._limits() if limit is not None),
            *([_equal(value, [self.equals])] if self.equals is not None else []),
            *([_equal(value, self.among)] if self.among is not None else []),
            *([_matches(value, self.matches)] if self.matches is not None else []),
        ]
        return _all(verdicts)

    def _limits(self) -> tuple[tuple[_Number | None, str], ...]:
        return (self.above, ">"), (self.below, "<"), (self.at_least, ">="), (self.at_most, "<=")


_NAMES = tuple(field.alias or name for name, field in Condition.model_fields.items())


class Rule(_Part):
    """What becomes of calls with such arguments."""

    when: dict[str, Condition] = Field(min_length=1)
    """By argument; a dotted path leads into objects, as in `order.total`."""
    then: Permission

    def holds(self, arguments: Mapping[str, Any]) -> bool | None:
        """Whether all its conditions hold; None if that can't be judged."""
        return _all([condition.holds(_at(arguments, path)) for path, condition in self.when.items()])


class ApprovalPolicy(_Part):
    """Which calls of a tool are made, which wait for a decision, and which are not made."""

    default: Permission = Permission.ASK
    """Of calls that no rule is about."""
    rules: list[Rule] = Field(default_factory=list)
    expires_seconds: float | None = Field(None, ge=1, le=366 * 86_400)
    """After how long without a decision `on_expiry` is the decision; None: it waits for ever."""
    on_expiry: Literal["refuse", "allow"] = "refuse"
    remind_seconds: float | None = Field(None, ge=1)
    """How often its people are reminded while it waits; None: never."""

    @property
    def paths(self) -> list[str]:
        """The arguments that its rules are about."""
        return [path for rule in self.rules for path in rule.when]

    @property
    def expires(self) -> timedelta | None:
        """As `expires_seconds`."""
        return timedelta(seconds=self.expires_seconds) if self.expires_seconds else None

    @property
    def reminds(self) -> timedelta | None:
        """As `remind_seconds`."""
        return timedelta(seconds=self.remind_seconds) if self.remind_seconds else None


def judge(policy: ApprovalPolicy | None, arguments: str) -> Permission:
    """What becomes of a call.

    Args:
        policy: the tool's; None: every call is made.
        arguments: JSON text, as the model wrote it.
    """
    if policy is None:
        return Permission.ALLOW
    strictest = Permission.ALLOW
    given = _read(arguments)
    for rule in policy.rules:
        holds = None if given is None else rule.holds(given)
        if holds is not False:
            strictest = _stricter(strictest, rule.then)
        if holds:
            return strictest
    return _stricter(strictest, policy.default)


def _stricter(one: Permission, other: Permission) -> Permission:
    return max(one, other, key=lambda permission: _STRICTNESS.index(permission.value))


def _read(arguments: str) -> dict[str, Any] | None:
    """The arguments; None if they are no JSON object, which the tool will refuse."""
    try:
        read = json.loads(arguments or "{}", parse_constant=_refused)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number to compare with")


class _Missing:
    """What is at a path that leads nowhere."""


def _at(arguments: Mapping[str, Any], path: str) -> Any:
    if path in arguments:
        return arguments[path]
    value: Any = arguments
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return _Missing
        value = value[part]
    return value


def _all(verdicts: list[bool | None]) -> bool | None:
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _compared(value: Any, limit: _Number, sign: str) -> bool | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return {">": value > limit, "<": value < limit, ">=": value >= limit, "<=": value <= limit}[sign]


def _equal(value: Any, wanted: list[JsonValue]) -> bool | None:
    """Whether it is one of these; a value of another kind may mean the same, as "5" and 5."""
    kinds = {_kind(one) for one in wanted}
    if value is _Missing or _kind(value) not in kinds:
        return None
    return any(_kind(value) == _kind(one) and value == one for one in wanted)


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None or not isinstance(value, (int, float)):
        return type(value).__name__
    return "number"


def _matches(value: Any, pattern: str) -> bool | None:
    return fnmatchcase(value.casefold(), pattern.casefold()) if isinstance(value, str) else None
