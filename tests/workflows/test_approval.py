"""Which tool calls wait for a human's decision: the policy and its conditions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from workflows.approval import ApprovalPolicy, Condition, Permission, judge

ALLOW, ASK, REFUSE = Permission.ALLOW, Permission.ASK, Permission.REFUSE
STRICTNESS = [ALLOW, ASK, REFUSE]
REFUND = ApprovalPolicy.model_validate(
    {
        "default": "allow",
        "rules": [
            {"when": {"reason": {"matches": "*lawsuit*"}}, "then": "refuse"},
            {"when": {"amount_cents": {"above": 20000}}, "then": "ask"},
            {"when": {"order.country": {"in": ["US", "UK"]}, "amount_cents": {"at_least": 5000}}, "then": "ask"},
        ],
    }
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def arguments(amount: object = 100, reason: object = "late", country: object = "FR") -> str:
    return json.dumps({"amount_cents": amount, "reason": reason, "order": {"country": country}})


@pytest.mark.parametrize(
    ("given_arguments", "permission"),
    [
        (arguments(), ALLOW),
        (arguments(20_000), ALLOW),
        (arguments(20_001), ASK),
        (arguments(20_000.5), ASK),
        (arguments(5000, country="US"), ASK),
        (arguments(4999, country="US"), ALLOW),
        (arguments(5000, country="us"), ALLOW),
        (arguments(1, reason="A LAWSUIT is coming"), REFUSE),
        (arguments(99_999, reason="lawsuit"), REFUSE),
    ],
)
def test_the_first_rule_that_holds_decides(given_arguments: str, permission: Permission) -> None:
    assert judge(REFUND, given_arguments) is permission


@pytest.mark.parametrize(
    ("given_arguments", "permission"),
    [
        (arguments("20001"), ASK),  # a number in quotes, which the tool may understand
        (arguments(None), ASK),
        (arguments([5]), ASK),
        (arguments(True), ASK),
        (json.dumps({"reason": "late", "order": {"country": "FR"}}), ASK),  # no amount at all
        (json.dumps({"amount_cents": 1, "reason": "late"}), ALLOW),  # no country, but too little for that rule
        (json.dumps({"amount_cents": 5000, "reason": "late"}), ASK),
        (arguments(1, reason=5), REFUSE),
        ("not JSON", REFUSE),
        ("[]", REFUSE),
        ('{"amount_cents": NaN, "reason": "late", "order": {"country": "FR"}}', REFUSE),
        ("[" * 100_000, REFUSE),
    ],
)
def test_what_can_not_be_judged_is_decided_for_the_stricter_side(given_arguments: str, permission: Permission) -> None:
    """No odd argument slips through a policy."""
    assert judge(REFUND, given_arguments) is permission


def test_without_a_policy_every_call_is_made_and_with_an_empty_one_a_human_is_asked() -> None:
    assert judge(None, "not JSON") is ALLOW
    assert judge(ApprovalPolicy(), "{}") is ASK
    assert judge(ApprovalPolicy(default=Permission.REFUSE), "{}") is REFUSE


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ({"equals": 5}, 5.0, True),
        ({"equals": 5}, "5", None),
        ({"equals": True}, 1, None),
        ({"in": [1, "a"]}, "b", False),
        ({"in": [1, "a"]}, [], None),
        ({"above": 1, "below": 3}, 2, True),
        ({"above": 1, "below": 3}, 3, False),
        ({"above": 1, "matches": "x"}, 0, False),
        ({"matches": "a*"}, "Abc", True),
        ({"at_most": 2}, 2, True),
    ],
)
def test_a_condition(condition: dict[str, Any], value: object, holds: bool | None) -> None:
    assert Condition.model_validate(condition).holds(value) is holds


def test_a_condition_says_something() -> None:
    with pytest.raises(ValidationError, match="above, below, at_least, at_most, equals, in, matches"):
        Condition.model_validate({})
    with pytest.raises(ValidationError, match="above, below"):
        Condition.model_validate({"equals": None})


def test_a_policy_means_the_same_after_a_journey_through_a_history() -> None:
    """Agents carry it as JSON, for ever."""
    carried = ApprovalPolicy.model_validate_json(REFUND.model_dump_json())
    assert carried == REFUND
    for text in (
        arguments(),
        arguments(20_001),
        arguments(5000, country="US"),
        arguments(None),
        arguments(1, "lawsuit"),
    ):
        assert judge(carried, text) is judge(REFUND, text)


@given(st.dictionaries(st.sampled_from(["amount_cents", "reason", "order", "x"]), JSON, max_size=4))
def test_any_arguments_get_a_decision_and_a_lack_never_loosens_it(given_arguments: dict[str, Any]) -> None:
    """Leaving out an argument that a rule asks for can't make a call that was refused one that is made."""
    permission = judge(REFUND, json.dumps(given_arguments))
    assert permission in STRICTNESS
    for name in given_arguments:
        rest = {key: value for key, value in given_arguments.items() if key != name}
        assert STRICTNESS.index(judge(REFUND, json.dumps(rest))) >= STRICTNESS.index(permission)
