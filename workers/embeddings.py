"""The model that makes vectors of facts, as models.yaml names it; used by both workers and by `perennial memory`."""
# ruff: noqa: PLC0415  # with its modules comes the model library, which is slow to import

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from workers.settings import Settings, environment

if TYPE_CHECKING:
    from activities.embeddings import Embeddings
    from activities.endpoints import EmbeddingsConfig

log = logging.getLogger("perennial.embeddings")


@asynccontextmanager
async def embedder(settings: Settings) -> AsyncIterator[Embeddings | None]:
    """What makes vectors, for as long as it is used; None: nothing does, or it can't here, which is logged.

    A worker that has not the key still runs: facts get their vectors from one that has.
    """
    if settings.models is None:
        yield None
        return
    from activities.endpoints import ModelsError, load_models

    made = None
    try:
        config = load_models(settings.models).embeddings
        made = client(config) if config else None
    except ModelsError as error:
        log.warning("facts are remembered and recalled by words alone: %s", error)
    if made is None:
        yield None
        return
    async with made:
        yield made


def client(config: EmbeddingsConfig) -> Embeddings:
    """A client of the server, with its key from the environment.

    Raises:
        ModelsError: the key or a package is missing.
    """
    from activities.embeddings import Embeddings

    return Embeddings(config, environment([config.api_key_env] if config.api_key_env else []))
