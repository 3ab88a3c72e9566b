"""Embeddings: texts as vectors, from a server that models.yaml names (`embeddings`).

    embeddings = Embeddings(config, secrets)
    vectors = await embeddings.embed(["Has a dog."])                # [None]: there is none to be had now
    asked = await embeddings.embed(["pets?"], query=True)

Nothing depends on them: what has no vector yet is found by its words. So a server that is away or refuses is no error
here. It is logged and counted, and left alone for half a minute, so that no turn waits for it again and again. A text
that it refuses, such as one that is too long for its model, does not keep others from their vectors.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic_ai.embeddings import EmbeddingModel, EmbeddingSettings, infer_embedding_model
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError, UnexpectedModelBehavior, UserError
from pydantic_ai.providers import Provider, infer_provider_class
from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider

from activities import metrics, vectors
from activities.endpoints import EmbeddingsConfig, ModelsError, remedy_for
from workflows.errors import Remedy
from workflows.messages import Usage

log = logging.getLogger("perennial.embeddings")

POOL = "embeddings"
"""As metrics name these calls, beside the pools of models."""

_PAUSE_SECONDS = 30.0
_REFUSED_IN_A_ROW = 3
_CHARACTERS = 4000  # of a text that is asked for: servers refuse what is too long, 8,192 tokens at OpenAI


class Embeddings:
    """Makes vectors of texts. `close` ends its connections.

    Args:
        config: the model, and where it is.
        secrets: the values of environment variables, by name.
        pause: for how many seconds a server that did not answer is left alone.

    Raises:
        ModelsError: its key is not there, or its package, or there is no such provider.
    """

    def __init__(self, config: EmbeddingsConfig, secrets: Mapping[str, str], pause: float = _PAUSE_SECONDS) -> None:
        self.config = config
        self.name = config.name
        self.similarity = config.similarity
        self._pause = pause
        self._resumes = 0.0
        self._refused: set[str] = set()
        """Texts that the server would not take."""
        key = secrets.get(config.api_key_env) if config.api_key_env else None
        if config.api_key_env and not key:
            raise ModelsError(f"embeddings: set the key in the environment variable {config.api_key_env}")
        self._provider: Provider[Any] | None = None
        self._model = self._build(key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._provider is not None:
            async with self._provider:  # leaving it is how the library closes its client
                pass

    async def embed(self, texts: Sequence[str], *, query: bool = False) -> list[bytes | None]:
        """A vector of each text, as `activities.vectors` packs it; None where there is none to be had now.

        Args:
            texts: what is kept, or what is asked for; of a long one the beginning.
            query: whether it is asked for: some models tell these apart.
        """
        found: dict[str, bytes] = {}
        wanted = [text for text in dict.fromkeys(texts) if text not in self._refused]
        if not await self._have(wanted, found, query=query) and len(wanted) > 1:
            refused = 0
            for text in wanted:  # one of them may be too long for the model
                taken = await self._have([text], found, query=query)
                refused = 0 if taken else refused + 1
                if not taken:
                    self._refused.add(text)
                if refused == _REFUSED_IN_A_ROW:
                    self._rest()  # so it is not the texts
                    break
        return [found.get(text) for text in texts]

    async def _have(self, texts: list[str], found: dict[str, bytes], *, query: bool) -> bool:
        """Ask for vectors of these texts; False if one of them is refused."""
        if not texts or time.monotonic() < self._resumes:
            return True
        started = time.monotonic()
        try:
            made, tokens = await self._asked([text[:_CHARACTERS] for text in texts], query=query)
        except Exception as error:  # noqa: BLE001  # what a server sends is anything, and so is what is raised for it
            log.warning("no vectors of %d texts from %s: %s", len(texts), self.config.model, _said(error))
            is_refused = isinstance(error, (ModelAPIError, UnexpectedModelBehavior)) and (
                remedy_for(error) is Remedy.FINAL
            )
            outcome = "final" if is_refused else "retry_later"
            metrics.model_call(POOL, self.config.model, outcome, time.monotonic() - started)
            if not is_refused:
                self._rest()
            return not is_refused
        metrics.model_call(POOL, self.config.model, "ok", time.monotonic() - started)
        metrics.tokens(POOL, self.config.model, Usage(input_tokens=tokens))
        found.update(zip(texts, made, strict=True))
        return True

    def _rest(self) -> None:
        self._resumes = time.monotonic() + self._pause

    async def _asked(self, texts: list[str], *, query: bool) -> tuple[list[bytes], int]:
        settings = EmbeddingSettings(dimensions=self.config.dimensions) if self.config.dimensions else None
        async with asyncio.timeout(self.config.timeout_seconds):
            answer = await self._model.embed(texts, input_type="query" if query else "document", settings=settings)
        if len(answer.embeddings) != len(texts):
            raise ValueError(f"{len(texts)} vectors were asked for, and {len(answer.embeddings)} came")
        return [vectors.packed(numbers) for numbers in answer.embeddings], answer.usage.input_tokens

    def _build(self, key: str | None) -> EmbeddingModel:
        try:
            return infer_embedding_model(self.config.model, provider_factory=lambda name: self._provided(name, key))
        except ImportError as error:
            provider = self.config.model.partition(":")[0]
            raise ModelsError(
                f"embeddings: {self.config.model} needs more packages: pip install 'pydantic-ai-slim[{provider}]'"
            ) from error
        except (UserError, ValueError) as error:
            raise ModelsError(f"embeddings: {self.config.model} cannot be used: {error}") from error

    def _provided(self, name: str, key: str | None) -> Provider[Any]:
        """The client. A key never goes to a server it was not named for."""
        url = self.config.base_url
        if name == "openai" and url:
            self._provider = OpenAICompatibleProvider(POOL, base_url=url, api_key=key)
        else:
            options = {"api_key": key, "base_url": url}
            made: Provider[Any] = infer_provider_class(name)(**{one: value for one, value in options.items() if value})
            self._provider = made
        if hasattr(self._provider.client, "max_retries"):
            self._provider.client.max_retries = 0  # one try is one request; the next fact or turn is the next try
        return self._provider


def _said(error: Exception) -> str:
    """What happened, in one line."""
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    text = f"HTTP status {error.status_code}: {error.body}" if isinstance(error, ModelHTTPError) else str(error)
    return " ".join(text.split())[:500] or type(error).__name__
