"""Embeddings over HTTP, from the rehearsal endpoint; and what becomes of a server that is away, slow or refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY

from activities.embeddings import Embeddings
from activities.endpoints import EmbeddingsConfig, ModelsConfig, ModelsError
from activities.vectors import nearest
from workers.rehearsal import serving
from workers.rehearsal_rules import Rules

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def configured(url: str, **extra: Any) -> EmbeddingsConfig:
    return EmbeddingsConfig(model="openai:rehearsal", base_url=url, **extra)


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"pool": "embeddings", "model": "openai:rehearsal", **labels}) or 0.0


@asynccontextmanager
async def a_server(answer: Answer) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers each request with a status and a body; what it was asked."""
    asked: list[dict[str, Any]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        asked.append({**json.loads(await reader.readexactly(length)), "head": head})
        status, content = answer(asked[-1])
        body = json.dumps(content).encode()
        writer.write(
            f"HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", asked


def vectors_of(asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": i, "embedding": [1.0, i]} for i, _ in enumerate(asked["input"])],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }


async def test_texts_that_share_parts_of_words_are_near() -> None:
    """Over HTTP, as from any OpenAI-compatible server; calls and tokens are counted."""
    calls, tokens = (
        counted("perennial_model_calls_total", outcome="ok"),
        counted("perennial_tokens_total", direction="input"),
    )
    async with serving(Rules()) as url, Embeddings(configured(url, dimensions=512), {}) as embeddings:
        texts = ["Sonnenschirm bestellt", "Hat einen Hund", ""]
        kept = await embeddings.embed(texts)
        (wanted,) = await embeddings.embed(["Schirme"], query=True)
    assert wanted is not None
    assert len(wanted) == 512 * 4
    candidates = [(text, vector) for text, vector in zip(texts, kept, strict=True) if vector is not None]
    assert len(candidates) == 3
    assert nearest(wanted, candidates, least=0.2, count=9) == ["Sonnenschirm bestellt"]
    assert counted("perennial_model_calls_total", outcome="ok") == calls + 2
    assert counted("perennial_tokens_total", direction="input") > tokens


async def test_a_server_that_is_away_is_left_alone_for_a_while() -> None:
    """Nothing is raised, and no turn waits for it again and again; after the pause it is asked again."""
    async with (
        a_server(lambda _: (503, {})) as (url, asked),
        Embeddings(configured(url), {}) as patient,
        Embeddings(configured(url), {}, pause=0) as keen,
    ):
        for _ in range(3):
            assert await patient.embed(["a", "b"]) == [None, None]
            assert await keen.embed(["a", "b"]) == [None, None]
    assert len(asked) == 1 + 3
    async with Embeddings(configured(url), {}) as nobody:
        assert await nobody.embed(["a"]) == [None]


@pytest.mark.parametrize(
    "content",
    [
        {"object": "list", "model": "m", "data": []},
        {"object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [0.0, 0.0]}]},
        {"error": "none"},
        "nonsense",
        [],
    ],
)
async def test_an_answer_without_vectors_is_none(content: Any) -> None:
    """Whatever a server sends with status 200."""
    async with a_server(lambda _: (200, content)) as (url, _), Embeddings(configured(url), {}) as embeddings:
        assert await embeddings.embed(["a"]) == [None]


async def test_a_slow_server_is_not_waited_for() -> None:
    """Longer than its timeout."""
    hangs = await asyncio.start_server(lambda *_: asyncio.sleep(3600), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{hangs.sockets[0].getsockname()[1]}/v1"
    async with Embeddings(configured(url, timeout_seconds=0.2), {}) as embeddings:
        assert await embeddings.embed(["a"]) == [None]
    hangs.close()


async def test_a_text_that_is_refused_does_not_keep_others_from_their_vectors() -> None:
    """It may be too long for the model. It is not asked for again."""

    def answer(asked: dict[str, Any]) -> tuple[int, Any]:
        return (413, {"error": {"message": "too long"}}) if "long" in asked["input"] else (200, vectors_of(asked))

    async with a_server(answer) as (url, asked), Embeddings(configured(url), {}) as embeddings:
        for _ in range(2):
            found = await embeddings.embed(["a", "long", "b"])
            assert [vector is not None for vector in found] == [True, False, True]
    assert [one["input"] for one in asked] == [["a", "long", "b"], ["a"], ["long"], ["b"], ["a", "b"]]


async def test_a_server_that_refuses_everything_is_not_asked_for_each_text() -> None:
    """So it is not the texts."""
    no = {"error": {"message": "no"}}
    async with a_server(lambda _: (400, no)) as (url, asked), Embeddings(configured(url), {}) as embeddings:
        assert await embeddings.embed([str(number) for number in range(32)]) == [None] * 32
    assert len(asked) == 1 + 3


async def test_a_key_is_sent_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the variable that is named; never the provider's own key to another server."""
    monkeypatch.setenv("OPENAI_API_KEY", "private")
    async with (
        a_server(lambda asked: (200, vectors_of(asked))) as (url, asked),
        Embeddings(configured(url), {}) as without,
        Embeddings(configured(url, api_key_env="HOUSE_KEY"), {"HOUSE_KEY": "ours"}) as own,
    ):
        await without.embed(["a"])
        await own.embed(["a"])
    assert "private" not in asked[0]["head"]
    assert "bearer ours" in asked[1]["head"]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model": "openai:m", "api_key_env": "HOUSE_KEY"}, "HOUSE_KEY"),
        ({"model": "nobody:m"}, "nobody:m cannot be used"),
        ({"model": "anthropic:m"}, "anthropic:m cannot be used"),
    ],
)
def test_what_cannot_be_used_is_said(config: dict[str, Any], complaint: str) -> None:
    """P14: which variable, which model."""
    with pytest.raises(ModelsError, match=complaint):
        Embeddings(EmbeddingsConfig(**config), {"ANTHROPIC_API_KEY": "x"})


def test_vectors_are_kept_under_the_model_and_its_dimensions() -> None:
    """They are in the database: never another name for the same."""
    assert EmbeddingsConfig(model="openai:m").name == "openai:m"
    assert EmbeddingsConfig(model="openai:m", dimensions=256, base_url="http://x/v1").name == "openai:m/256"
    config = ModelsConfig.model_validate(
        {"pools": {"a": {"model": "openai-chat:m"}}, "embeddings": {"model": "openai:m", "api_key_env": "HOUSE_KEY"}}
    )
    assert config.variables == {"HOUSE_KEY"}
