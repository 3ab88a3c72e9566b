"""`perennial doctor`: what is reachable, what is not, and what to do.

    for check in await examine(settings): print(check.what, check.ok, check.found, check.remedy)

Nothing is changed, and no money is spent: model endpoints are connected to, and asked nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from pydantic import BaseModel
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError

from activities.endpoints import EmbeddingsConfig, ModelsConfig, ModelsError
from activities.ledger import Ledger, sqlite_file
from workers import embeddings, kafka, operations, topics, wiring
from workers.embedded import TOPICS
from workers.exits import CommandError
from workers.model import model_pools, models_config
from workers.settings import Settings
from workflows import names
from workflows.spec import AgentSpec

_NEEDED_MB = 200
_SECONDS = 10.0
_DEV = "Start the embedded stack with `perennial dev`"


class Check(BaseModel):
    """One thing looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""
    """What to do; empty when it is ok."""
    needed: bool = True
    """Whether agents can't work without it."""


async def examine(settings: Settings) -> list[Check]:
    """Look at everything that Perennial needs, with these settings. Never raises for what it finds."""
    specs, spec_check = _specs(settings)
    models, model_checks = _models(settings, specs)
    parts = await asyncio.gather(
        _ledger(settings),
        _temporal(settings),
        _kafka(settings, specs),
        *map(_endpoint, _places(models)),
        _embeddings(models.embeddings if models else None),
    )
    return [spec_check, *model_checks, *(check for part in parts for check in part), _disk(settings.state_dir)]


# What is configured -----------------------------------------------------------------------------------------------


def _specs(settings: Settings) -> tuple[list[AgentSpec], Check]:
    what = "specs"
    try:
        specs = operations.check_specs(settings.specs)
    except CommandError as error:
        return [], Check(what=what, ok=False, found=str(error), remedy="Correct the files named")
    if not specs:
        return [], Check(
            what=what,
            ok=False,
            found=f"no *.yaml in {settings.specs}",
            remedy="Write an agent's spec there, or set PERENNIAL_SPECS to another folder",
        )
    agents = ", ".join(f"{spec.tenant}/{spec.name}" for spec in specs)
    return specs, Check(what=what, ok=True, found=f"{agents} in {settings.specs}")


def _models(settings: Settings, specs: list[AgentSpec]) -> tuple[ModelsConfig | None, list[Check]]:
    what = "models"
    try:
        config = models_config(settings)
        model_pools(config)
    except ModelsError as error:
        return None, [Check(what=what, ok=False, found=str(error), remedy="Configure them as the message says")]
    pools = ", ".join(f"{name} ({pool.model})" for name, pool in config.pools.items())
    lost = sorted({f"{spec.name} wants route {spec.route!r}" for spec in specs if spec.route not in config.routes})
    if lost:
        routes = ", ".join(config.routes)
        return config, [
            Check(
                what=what,
                ok=False,
                found=f"{'; '.join(lost)}; the routes are: {routes}",
                remedy="Add the route to models.yaml, or correct the spec",
            )
        ]
    return config, [Check(what=what, ok=True, found=pools)]


def _places(config: ModelsConfig | None) -> Iterable[tuple[str, str]]:
    """The pools whose address we know, and that address."""
    pools = config.pools.items() if config else ()
    return [(name, pool.base_url) for name, pool in pools if pool.base_url]


async def _endpoint(place: tuple[str, str]) -> list[Check]:
    """Connect to a model endpoint, and ask it nothing."""
    name, url = place
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    what = f"model endpoint {name}"
    try:
        async with asyncio.timeout(_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port)
        writer.close()
    except (OSError, TimeoutError) as error:
        return [Check(what=what, ok=False, found=f"{url}: {_said(error)}", remedy="Start it, or correct its address")]
    return [Check(what=what, ok=True, found=f"{url} takes connections")]


async def _embeddings(config: EmbeddingsConfig | None) -> list[Check]:
    """What makes vectors of facts, if anything does. Agents work without it."""
    if config is None:
        return []
    what, remedy = "embeddings", "Until then facts are found by their words alone"
    try:
        async with embeddings.client(config):
            pass
    except ModelsError as error:
        return [Check(what=what, ok=False, needed=False, found=str(error), remedy=remedy)]
    if config.base_url is None:
        return [Check(what=what, ok=True, needed=False, found=config.model)]
    (there,) = await _endpoint((what, config.base_url))
    return [there.model_copy(update={"what": what, "needed": False, "remedy": "" if there.ok else remedy})]


# What is reachable ------------------------------------------------------------------------------------------------


async def _ledger(settings: Settings) -> list[Check]:
    what, remedy = "ledger", "Correct PERENNIAL_LEDGER_URL, or start the database"
    try:
        ledger = Ledger(settings.ledger_url)
        if missing := _database_to_be(settings.ledger_url):
            return [_unmade_ledger(missing)]
        async with asyncio.timeout(_SECONDS), ledger:
            totals = await ledger.totals()
    except TimeoutError:
        found = f"{ledger.place}: no answer within {_SECONDS:g} s"
    except Exception as error:  # noqa: BLE001  # whatever a database driver raises is what we are asked to tell
        found = _said(error)
    else:
        return [Check(what=what, ok=True, found=f"{ledger.place}: {totals}")]
    return [Check(what=what, ok=False, found=found, remedy=remedy)]


def _database_to_be(url: str) -> Path | None:
    """The SQLite file that this URL names and that is not there. To connect would make it."""
    file = sqlite_file(url)
    return file if file and not file.exists() else None


def _unmade_ledger(file: Path) -> Check:
    what, there = "ledger", _nearest(file.parent)
    if there.is_dir() and os.access(there, os.W_OK):
        return Check(what=what, ok=True, found=f"{file} is not there yet; the first worker makes it")
    return Check(
        what=what,
        ok=False,
        found=f"{file} can't be made: {there} can't be written to",
        remedy="Let us write there, or set PERENNIAL_LEDGER_URL",
    )


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


async def _temporal(settings: Settings) -> list[Check]:
    what = "Temporal"
    try:
        client = await operations.connect(settings)
    except CommandError as error:
        return [Check(what=what, ok=False, found=str(error).partition(" Start ")[0], remedy=_DEV)]
    namespace = settings.temporal_namespace
    try:
        await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=namespace))
    except RPCError as error:
        return [
            Check(
                what=what,
                ok=False,
                found=f"{settings.temporal_address}, namespace {namespace}: {error.message}",
                remedy="Create the namespace, or set PERENNIAL_TEMPORAL_NAMESPACE",
            )
        ]
    reachable = Check(what=what, ok=True, found=f"{settings.temporal_address}, namespace {namespace}")
    queue = settings.task_queue
    rest = await asyncio.gather(
        _search_attributes(client),
        _pollers(client, "agent", queue, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW),
        _pollers(client, "model", names.model_queue(queue), TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
    )
    return [reachable, *rest]


async def _search_attributes(client: Client) -> Check:
    what = "search attributes"
    request = ListSearchAttributesRequest(namespace=client.namespace)
    try:
        known = await client.operator_service.list_search_attributes(request)
    except RPCError as error:
        return Check(
            what=what, ok=False, needed=False, found=error.message, remedy="Only needed if agents do not start"
        )
    missing = [name for name in wiring.SEARCH_ATTRIBUTES if name not in known.custom_attributes]
    if missing:
        add = " ".join(f"--name {name} --type Keyword" for name in missing)
        remedy = f"temporal operator search-attribute create --namespace {client.namespace} {add}"
        return Check(what=what, ok=False, found=f"missing: {', '.join(missing)}", remedy=remedy)
    return Check(what=what, ok=True, found=", ".join(wiring.SEARCH_ATTRIBUTES))


async def _pollers(client: Client, name: str, queue: str, kind: TaskQueueType.ValueType) -> Check:
    what = f"{name} worker"
    try:
        found = await operations.pollers(client, queue, kind)
    except RPCError as error:
        return Check(what=what, ok=False, found=error.message, remedy="See Temporal's log")
    if not found:
        return Check(
            what=what,
            ok=False,
            found=f"nobody polls the task queue {queue}",
            remedy=f"Start one: `perennial worker {name}`",
        )
    return Check(what=what, ok=True, found=f"{queue}: {', '.join(sorted(found))}")


async def _kafka(settings: Settings, specs: list[AgentSpec]) -> list[Check]:
    what = "Kafka"
    try:
        known = await topics.topics(settings)
    except topics.NotLetInError as error:
        found, _, remedy = str(error).rpartition(". ")
        return [Check(what=what, ok=False, found=found, remedy=remedy.rstrip("."))]
    except CommandError as error:
        return [Check(what=what, ok=False, found=str(error).partition(" Start ")[0], remedy=_DEV)]
    unused = set() if any(spec.stream for spec in specs) else {names.STREAM_TOPIC}
    wanted = {*TOPICS, *(subscription.topic for spec in specs for subscription in spec.subscriptions)} - unused
    missing = sorted(wanted - known)
    checks = [
        Check(what=what, ok=True, found=settings.kafka_bootstrap),
        Check(
            what="topics",
            ok=not missing,
            found=f"missing: {', '.join(missing)}" if missing else ", ".join(sorted(wanted)),
            remedy="Create them on the broker" if missing else "",
        ),
    ]
    return [*checks, *await _ingest(settings)]


async def _ingest(settings: Settings) -> list[Check]:
    what, group = "ingest worker", settings.consumer_group
    admin = AIOKafkaAdminClient(**kafka.reached_by(settings).client())
    try:
        async with asyncio.timeout(_SECONDS):
            await admin.start()
            (answer,) = await admin.describe_consumer_groups([group])
    except (KafkaError, TimeoutError, ValueError) as error:
        # The embedded broker answers, others may not let us ask.
        return [Check(what=what, ok=True, needed=False, found=f"{group}: not known ({_said(error)})")]
    finally:
        await admin.close()
    members = [member for described in answer.groups for member in described[5]]
    if members:
        return [Check(what=what, ok=True, found=f"{group}: {len(members)} in the consumer group")]
    remedy = "Start one: `perennial worker ingest`"
    return [Check(what=what, ok=False, found=f"nobody is in the consumer group {group}", remedy=remedy)]


def _disk(folder: Path) -> Check:
    what = "disk"
    free = shutil.disk_usage(_nearest(folder)).free // 1_000_000
    found = f"{free} MB free for {folder}"
    if free < _NEEDED_MB:
        return Check(what=what, ok=False, found=found, remedy="Make room, or set PERENNIAL_STATE_DIR to another disk")
    return Check(what=what, ok=True, found=found)


def _said(error: BaseException) -> str:
    # Temporal's errors carry their message apart from their type.
    return str(getattr(error, "message", "") or error) or type(error).__name__
