"""models.yaml and the environment: which endpoints there are, and clear words when they can't be used."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import ValidationError

from activities.endpoints import ModelsConfig, ModelsError, PoolConfig, Pools, load_models, models_from_environment
from activities.prices import Price

REPOSITORY = Path(__file__).parents[2]


def only_pool(variables: dict[str, str], rehearsal_url: str | None = None) -> tuple[str, PoolConfig]:
    """The pool that these variables mean; the default route leads to it."""
    config = models_from_environment(variables, rehearsal_url)
    ((name, pool),) = config.pools.items()
    assert config.routes == {"default": [name]}
    return name, pool


def test_the_shipped_example_is_valid() -> None:
    """What people copy works."""
    config = load_models(REPOSITORY / "deploy" / "models.example.yaml")
    assert "default" in config.routes
    Pools(config, dict.fromkeys(config.variables, "key")).check()


def test_without_routes_the_default_is_all_pools_in_their_order() -> None:
    """One endpoint needs three lines."""
    pool = PoolConfig(model="openai-chat:x", base_url="http://127.0.0.1:1")
    assert ModelsConfig(pools={"b": pool, "a": pool}).routes == {"default": ["b", "a"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "pools:\n  p: {model: 'openai-chat:x'}\nroutes:\n  default: [p, q]\n",
            ":4: routes: .*names q; the pools are: p",
        ),
        ("pools:\n  p: {model: gpt}\n", r":2: pools\.p\.model: "),
        ("pools:\n  p:\n    model: 'openai-chat:x'\n    modle: x\n", r":4: pools\.p\.modle: "),
        ("pools: {}\n", ":1: pools: "),
        ("pools:\n  p: {model: 'openai-chat:x', timeout_seconds: 0}\n", r":2: pools\.p\.timeout_seconds: "),
        ("pools:\n  p: {model: 'openai-chat:x', base_url: here}\n", r":2: pools\.p\.base_url: "),
        (
            "pools:\n  p: {model: 'openai-chat:x'}\nembeddings: {model: 'openai:x', dimension: 9}\n",
            r":3: embeddings\.dimension: ",
        ),
        ("pools:\n  p: [\n", "not valid YAML"),
    ],
)
def test_a_fault_in_the_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    """P14: file, line and field, and what would be right."""
    path = tmp_path / "models.yaml"
    path.write_text(text)
    with pytest.raises(ModelsError, match=said) as refused:
        load_models(path)
    assert str(path) in str(refused.value)


def test_openai_is_used_by_the_names_its_users_expect() -> None:
    """A key alone is enough; a model may be chosen."""
    name, pool = only_pool({"OPENAI_API_KEY": "k", "OPENAI_MODEL": "gpt-x", "ANTHROPIC_API_KEY": "k"}, "http://r")
    assert (name, pool.model, pool.base_url, pool.api_key_env) == (
        "openai",
        "openai-chat:gpt-x",
        None,
        "OPENAI_API_KEY",
    )


def test_any_openai_compatible_server_needs_only_its_address() -> None:
    """Chat completions, which all of them speak; a key only if one is given."""
    _, pool = only_pool({"OPENAI_BASE_URL": "http://127.0.0.1:8000/v1"})
    assert pool.model.startswith("openai-chat:")
    assert (pool.base_url, pool.api_key_env) == ("http://127.0.0.1:8000/v1", None)


@pytest.mark.parametrize(
    ("variables", "name", "provider"),
    [
        ({"ANTHROPIC_API_KEY": "k"}, "anthropic", "anthropic:"),
        ({"GEMINI_API_KEY": "k"}, "google", "google:"),
        ({"GOOGLE_API_KEY": "k"}, "google", "google:"),
        ({"AWS_BEARER_TOKEN_BEDROCK": "k", "AWS_REGION": "eu-west-1"}, "bedrock", "bedrock:"),
    ],
)
def test_other_providers_are_found(variables: dict[str, str], name: str, provider: str) -> None:
    """By their own variables; a client can be made of them."""
    found, pool = only_pool(variables, "http://r")
    assert found == name
    assert pool.model.startswith(provider)
    Pools(models_from_environment(variables, None), variables).check()


def test_without_a_provider_the_rehearsal_endpoint_is_used() -> None:
    """No key at all: the stack still answers, from rules. A region is no provider, and neither is an empty key."""
    assert only_pool({"AWS_REGION": "eu-west-1", "OPENAI_API_KEY": ""}, "http://127.0.0.1:9/v1") == (
        "rehearsal",
        PoolConfig(
            model="openai-chat:rehearsal",
            base_url="http://127.0.0.1:9/v1",
            price=Price(input=Decimal(0), output=Decimal(0)),
        ),
    )


def test_with_nothing_at_all_the_person_is_told_what_to_set() -> None:
    """The variables are named."""
    with pytest.raises(ModelsError, match="OPENAI_API_KEY"):
        models_from_environment({}, None)


def test_a_wrong_address_in_the_environment_is_named() -> None:
    """What was wrong, and what was there."""
    with pytest.raises(ModelsError, match=r"base_url.*localhost:8000"):
        models_from_environment({"OPENAI_BASE_URL": "localhost:8000"}, None)


def test_a_key_that_is_not_set_is_named() -> None:
    """Before the first call, not in the middle of the night."""
    config = ModelsConfig(
        pools={"house": PoolConfig(model="openai-chat:x", base_url="http://x", api_key_env="HOUSE_KEY")}
    )
    for secrets in ({}, {"HOUSE_KEY": ""}):
        with pytest.raises(ModelsError, match=r"house.*HOUSE_KEY"):
            Pools(config, secrets)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nowhere:x", "Unknown provider: nowhere"),
        ("groq:x", r"pip install 'pydantic-ai-slim\[groq\]'"),
        ("bedrock:x", "region"),
    ],
)
def test_a_client_that_cannot_be_made_says_why(
    model: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`check` finds it before the first call."""
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ModelsError, match=said):
        Pools(ModelsConfig(pools={"p": PoolConfig(model=model, api_key_env="K")}), {"K": "k"}).check()


def test_a_missing_extra_of_ours_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the library's, which its users need not know."""
    monkeypatch.setitem(__import__("sys").modules, "anthropic", None)
    monkeypatch.delitem(__import__("sys").modules, "pydantic_ai.providers.anthropic", raising=False)
    with pytest.raises(ModelsError, match=r"pip install 'perennial\[anthropic\]'"):
        Pools(ModelsConfig(pools={"p": PoolConfig(model="anthropic:x", api_key_env="K")}), {"K": "k"}).check()


def test_no_unknown_field_is_ignored() -> None:
    """A typing mistake is not silently without effect."""
    with pytest.raises(ValidationError, match="temprature"):
        PoolConfig.model_validate({"model": "openai-chat:x", "temprature": 1})
