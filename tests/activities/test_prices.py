"""What calls cost: our own prices, the maintained table, and nothing where nobody knows."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_ai.usage import RequestUsage

from activities.prices import Price, micro_usd

TOKENS = st.integers(0, 10**7)
MILLION = RequestUsage(input_tokens=1_000_000, output_tokens=0)


@given(used=TOKENS, cached=TOKENS, answered=TOKENS)
def test_a_price_of_one_s_own_counts_to_the_micro_dollar(used: int, cached: int, answered: int) -> None:
    """Dollars per million tokens are micro-dollars per token; what is left over is rounded up."""
    price = Price(input=Decimal("0.25"), output=Decimal(2), cached_input=Decimal("0.05"))
    usage = RequestUsage(input_tokens=used, cache_read_tokens=cached, output_tokens=answered)
    found = micro_usd("openai-chat:any", "http://127.0.0.1:9/v1", price, usage)
    of_cache = min(used, cached)
    exact = Decimal("0.25") * (used - of_cache) + Decimal("0.05") * of_cache + 2 * answered
    assert found is not None
    assert exact <= found < exact + 1


@pytest.mark.parametrize(
    "model",
    [
        "openai-chat:gpt-6-luna",
        "openai-responses:gpt-6-luna",
        "anthropic:claude-haiku-5-5",
        "google:gemini-3.5-flash-lite",
        "bedrock:global.anthropic.claude-haiku-5-5",
    ],
)
def test_the_table_knows_the_models_that_the_environment_chooses(model: str) -> None:
    """Who sets a provider's key and a limit in dollars need not look for prices."""
    found = micro_usd(model, None, None, MILLION)
    assert found is not None
    assert 10_000 < found < 100_000_000, "a cent to a hundred dollars per million tokens"


@pytest.mark.parametrize(
    ("model", "base_url"),
    [
        ("openai-chat:gpt-6-luna", "http://127.0.0.1:8000/v1"),
        ("openai-chat:my-own", None),
        ("nobody:gpt-6-luna", None),
    ],
)
def test_what_nobody_knows_costs_no_number(model: str, base_url: str | None) -> None:
    """A server of one's own need not have its provider's prices, whatever it calls its model."""
    assert micro_usd(model, base_url, None, MILLION) is None


def test_a_provider_s_own_address_has_its_prices() -> None:
    """An address that the table knows is as good as none."""
    assert micro_usd("openai-chat:gpt-6-luna", "https://api.openai.com/v1", None, MILLION) == micro_usd(
        "openai-chat:gpt-6-luna", None, None, MILLION
    )
