"""What a model call costs: prices of our own, else those of the table that `genai-prices` maintains.

    micro = micro_usd("anthropic:claude-haiku-5-5", None, None, usage)      # None: nobody knows

A price in US dollars per million tokens is a price in micro-dollars per token. The table comes with the package: it is
brought up to date with it, and asks nobody while a call is made.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal
from typing import Annotated

import genai_prices
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai.usage import RequestUsage

_PROVIDERS = {"openai-chat": "openai", "openai-responses": "openai", "bedrock": "aws", "google-vertex": "google"}
"""Where the table has another name for a provider than the model library."""

_PerMillion = Annotated[Decimal, Field(ge=0, decimal_places=6)]


class Price(BaseModel):
    """A model's price, in US dollars per million tokens. It stands for the maintained table's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: _PerMillion
    output: _PerMillion
    cached_input: _PerMillion | None = None
    """Of the input, what the provider had in its cache; without it, as `input`."""


def micro_usd(model: str, base_url: str | None, price: Price | None, usage: RequestUsage) -> int | None:
    """What a call costs, in micro-dollars, rounded up; None if the price is not known.

    Args:
        model: `provider:name`, as in models.yaml.
        base_url: of the endpoint, if it is not the provider's own: its prices need not be the provider's.
        price: that counts instead of the table's.
        usage: what the call has used, or may use.
    """
    exact = _own(price, usage) if price else _from_table(model, base_url, usage)
    return None if exact is None else int(exact.to_integral_value(ROUND_CEILING))


def _own(price: Price, usage: RequestUsage) -> Decimal:
    cached = min(usage.cache_read_tokens, usage.input_tokens)
    of_cached = price.input if price.cached_input is None else price.cached_input
    return (usage.input_tokens - cached) * price.input + cached * of_cached + usage.output_tokens * price.output


def _from_table(model: str, base_url: str | None, usage: RequestUsage) -> Decimal | None:
    provider, _, name = model.partition(":")
    try:
        if base_url:
            found = genai_prices.calc_price(usage, name, provider_api_url=base_url)
        else:
            found = genai_prices.calc_price(usage, name, provider_id=_PROVIDERS.get(provider, provider))
    except (LookupError, ValueError):
        return None
    return found.total_price * 1_000_000
