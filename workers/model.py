"""The model worker: makes the model calls."""

from __future__ import annotations

import asyncio
import contextlib

from temporalio.client import Client
from temporalio.worker import Worker

from activities.endpoints import ModelsConfig, ModelsError, Pools, load_models, models_from_environment
from activities.ledger import Ledger
from activities.memory import Embedder
from activities.model import Model
from activities.stream import Put
from activities.stream_topic import StreamTopic
from workers import embeddings, kafka, wiring
from workers.agent import HEARTBEAT_THROTTLE
from workers.settings import Settings, environment, provider_environment
from workflows import names


def models_config(settings: Settings) -> ModelsConfig:
    """The pools and routes: of the models file if there is one, else of the environment.

    Raises:
        ModelsError: the file or the environment is wrong, or names no model.
    """
    if settings.models is not None:
        return load_models(settings.models)
    return models_from_environment(provider_environment(), settings.rehearsal_url)


def model_pools(config: ModelsConfig) -> Pools:
    """The pools, with their keys from the environment, ready to be called.

    Raises:
        ModelsError: a key or a package is missing.
    """
    pools = Pools(config, environment(config.variables))
    pools.check()
    return pools


def model_worker(  # noqa: PLR0913, PLR0917  # what it is wired from
    client: Client,
    settings: Settings,
    ledger: Ledger,
    pools: Pools,
    put: Put | None = None,
    embedder: Embedder | None = None,
) -> Worker:
    """The worker for the queue of the model calls; `put` takes what models say, for `agents.stream`."""
    model = Model(ledger, pools, put, embedder)
    return Worker(
        client,
        task_queue=names.model_queue(settings.task_queue),
        activities=[model.think, model.compact],
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        graceful_shutdown_timeout=settings.drain,
    )


async def main(settings: Settings, stop: asyncio.Event) -> None:
    """Run until asked to stop; then let running model calls finish, within the drain time.

    Raises:
        SystemExit: the models are not configured rightly; the message says what to do.
    """
    try:
        pools = model_pools(models_config(settings))
    except ModelsError as error:
        raise SystemExit(str(error)) from error
    runtime = wiring.start_metrics(settings)
    client = await wiring.connect_patiently(settings, stop, runtime=runtime)
    if client is None:
        return
    stream = StreamTopic(kafka.reached_by(settings))
    async with (
        Ledger(settings.ledger_url) as ledger,
        pools,
        contextlib.aclosing(stream),
        embeddings.embedder(settings) as embedder,
        model_worker(client, settings, ledger, pools, stream.put, embedder),
    ):
        await stop.wait()
