"""The model that makes vectors of facts, as models.yaml names it; used by both workers and by `perennial memory`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from activities.memory import Embedder
from workers.settings import Settings, environment

log = logging.getLogger("perennial.embeddings")


@asynccontextmanager
async def embedder(settings: Settings) -> AsyncIterator[Embedder | None]:
    """What makes vectors, for as long as it is used; None: nothing does, or it can't here, which is logged.

    A worker that has not the key still runs: facts get their vectors from one that has.
    """
    if settings.models is None:
        yield None
        return
    from activities.embeddings import Embeddings  # noqa: PLC0415  # with it comes the model library, which is slow
    from activities.endpoints import ModelsError, load_models  # noqa: PLC0415

    made = None
    try:
        config = load_models(settings.models).embeddings
        if config is not None:
            made = Embeddings(config, environment([config.api_key_env] if config.api_key_env else []))
    except ModelsError as error:
        log.warning("facts are remembered and recalled by words alone: %s", error)
    if made is None:
        yield None
        return
    async with made:
        yield made
