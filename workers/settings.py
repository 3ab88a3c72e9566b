"""Settings: the environment, read once, into one frozen model.

Every process calls `Settings.load()` and passes the values on through constructors; nothing else in the
project reads the environment. All faulty variables are reported together, each with its name and remedy.

    settings = Settings.load()
    client = await wiring.connect(settings)

While `perennial dev` runs, it leaves the addresses of its servers in `STATE_DIR/stack.env`; a command started
in the same directory finds them there. A variable set in the environment wins over that file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "PERENNIAL_"
STACK_FILE = "stack.env"

# A provider is configured when one of its variables is set, by the names its own users expect.
PROVIDER_VARIABLES = (
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "ANTHROPIC_API_KEY",
    "GOOGLE_API_KEY",
    "GEMINI_API_KEY",
    "AWS_BEARER_TOKEN_BEDROCK",
)

# And what goes with them.
_PROVIDER_OPTIONS = (
    "OPENAI_MODEL",
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_MODEL",
    "GEMINI_MODEL",
    "BEDROCK_MODEL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


class SettingsError(Exception):
    """One or more settings are wrong; the message names each variable, what was wrong and what is expected."""


class Settings(BaseSettings):
    """What every process needs to know of its surroundings. Variables are `PERENNIAL_` + the field's name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    temporal_address: str = Field("127.0.0.1:7233", description="Temporal frontend, host:port")
    temporal_namespace: str = Field("default", description="Temporal namespace")
    temporal_ui: str = Field("http://127.0.0.1:8233", description="base address of the Temporal Web UI, for links")
    temporal_api_key: str | None = Field(None, description="API key of the Temporal namespace (turns TLS on)")
    temporal_tls: bool = Field(default=False, description="connect to Temporal with TLS")
    task_queue: Annotated[str, Field(min_length=1)] = Field(
        "perennial",
        description="Temporal task queue of the agents; model calls use the queue of that name + `.models`",
    )

    kafka_bootstrap: str = Field("127.0.0.1:9092", description="Kafka bootstrap servers, host:port, comma separated")
    kafka_idempotence: bool = Field(
        default=True, description="idempotent producer; false for the embedded broker, which has none"
    )
    consumer_group: Annotated[str, Field(min_length=1)] = Field(
        "perennial-ingest", description="Kafka consumer group of the ingest workers"
    )
    kafka_session_seconds: Annotated[float, Field(ge=6, le=300)] = Field(
        10.0, description="after so long without a heartbeat an ingest worker counts as dead in its group, in seconds"
    )

    ledger_url: str = Field(
        "sqlite:///.perennial/ledger.db",
        pattern=r"^(sqlite:///|postgresql(\+psycopg)?://).+",
        description="the ledger: sqlite:///path, or postgresql://user:password@host/database",
    )
    specs: Path = Field(Path("deploy/agents"), description="folder with the agents' specs, *.yaml")
    models: Path | None = Field(None, description="models.yaml with pools and routes; without it, the environment")
    rehearsal_url: str | None = Field(
        None,
        description="rehearsal endpoint to use when no model provider is configured (set by the embedded stack)",
    )
    rehearsal_rules: Path | None = Field(
        None, description="rules of the rehearsal endpoint; without it, deploy/rehearsal.yaml if that is there"
    )
    rehearsal_latency: str = Field(
        "0.02", description="seconds the rehearsal endpoint takes to answer: a number, or a range such as 0.1-0.4"
    )

    state_dir: Path = Field(Path(".perennial"), description="where the embedded stack keeps its state and logs")
    metrics_address: str = Field(
        "127.0.0.1:0", description="where a worker serves /metrics, host:port; port 0 picks a free one"
    )
    drain_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        20.0, description="how long a worker that is asked to stop lets running activities finish, in seconds"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="level of the logs")

    @property
    def drain(self) -> timedelta:
        """How long a stopping worker lets running activities finish."""
        return timedelta(seconds=self.drain_seconds)

    @classmethod
    def load(cls) -> Self:
        """The settings of this process, from the environment and a running embedded stack.

        Raises:
            SettingsError: one or more variables are wrong; all of them are named.
        """
        state_dir = Path(os.environ.get(PREFIX + "STATE_DIR", ".perennial"))
        stack_file = state_dir / STACK_FILE
        try:
            return cls(_env_file=stack_file if stack_file.is_file() else None)
        except ValidationError as error:
            lines = [
                f"  {PREFIX}{str(fault['loc'][0]).upper()}: {fault['msg']} (got {fault['input']!r})"
                for fault in error.errors()
            ]
            raise SettingsError(
                "These settings are wrong; correct them in the environment:\n" + "\n".join(lines)
            ) from error


def provider_configured() -> bool:
    """Whether the environment names a model provider."""
    return bool(environment(PROVIDER_VARIABLES))


def provider_environment() -> dict[str, str]:
    """The model providers' own variables that are set (`OPENAI_API_KEY`, `OPENAI_MODEL` and the like)."""
    return environment((*PROVIDER_VARIABLES, *_PROVIDER_OPTIONS))


def environment(names: Iterable[str]) -> dict[str, str]:
    """Those of these variables that are set, and not empty."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def inherited_environment() -> dict[str, str]:
    """A copy of this process's environment, for the processes it starts."""
    return dict(os.environ)
