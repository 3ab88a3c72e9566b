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
import shlex
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

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

KAFKA_SECURITY_VARIABLES = tuple(
    PREFIX + name
    for name in (
        *(
            "KAFKA_SECURITY_PROTOCOL",
            "KAFKA_TLS_CA",
            "KAFKA_TLS_CERTIFICATE",
            "KAFKA_TLS_KEY",
            "KAFKA_TLS_KEY_PASSWORD",
        ),
        *("KAFKA_SASL_MECHANISM", "KAFKA_SASL_USERNAME", "KAFKA_SASL_PASSWORD"),
        *("KAFKA_OAUTH_TOKEN_FILE", "KAFKA_OAUTH_TOKEN_COMMAND"),
    )
)
"""What the embedded broker, which lets in everybody on this machine, has no use for."""


class SettingsError(Exception):
    """One or more settings are wrong; the message names each variable, what was wrong and what is expected."""


class Settings(BaseSettings):
    """What every process needs to know of its surroundings. Variables are `PERENNIAL_` + the field's name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    temporal_address: str = Field("127.0.0.1:7233", description="Temporal frontend, host:port")
    temporal_namespace: str = Field("default", description="Temporal namespace")
    temporal_ui: str = Field("http://127.0.0.1:8233", description="base address of the Temporal Web UI, for links")
    temporal_api_key: SecretStr | None = Field(None, description="API key of the Temporal namespace (turns TLS on)")
    temporal_tls: bool = Field(default=False, description="connect to Temporal with TLS")
    task_queue: Annotated[str, Field(min_length=1)] = Field(
        "perennial",
        description="Temporal task queue of the agents; model calls use the queue of that name + `.models`",
    )

    kafka_bootstrap: str = Field("127.0.0.1:9092", description="Kafka bootstrap servers, host:port, comma separated")
    kafka_idempotence: bool = Field(
        default=True, description="idempotent producer; false for the embedded broker, which has none"
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to speak to Kafka: PLAINTEXT, SSL (TLS), SASL_PLAINTEXT or SASL_SSL"
    )
    kafka_tls_ca: Path | None = Field(
        None, description="PEM file of the CA of Kafka's certificates; without it, the CAs that the system trusts"
    )
    kafka_tls_certificate: Path | None = Field(
        None, description="PEM file of our certificate, where Kafka asks clients for one"
    )
    kafka_tls_key: Path | None = Field(
        None, description="PEM file of its key; without it, the key is in the certificate's file"
    )
    kafka_tls_key_password: SecretStr | None = Field(None, description="password of that key, where it has one")
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = Field(
        None, description="how to log in to Kafka: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER"
    )
    kafka_sasl_username: str | None = Field(None, description="user for PLAIN and SCRAM")
    kafka_sasl_password: SecretStr | None = Field(None, description="password for PLAIN and SCRAM")
    kafka_oauth_token_file: Path | None = Field(
        None, description="file with the token for OAUTHBEARER; read anew for each connection"
    )
    kafka_oauth_token_command: str | None = Field(
        None, description="or a command that prints the token; run anew for each connection, without a shell"
    )
    consumer_group: Annotated[str, Field(min_length=1)] = Field(
        "perennial-ingest", description="Kafka consumer group of the ingest workers"
    )
    kafka_instance_id: Annotated[str, Field(min_length=1, max_length=249)] | None = Field(
        None,
        description="static membership: a name of this ingest worker's own in its group; started again under it within "
        "the session time it gets its partitions back, and the others notice nothing",
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

    @model_validator(mode="after")
    def _kafka_security_fits_together(self) -> Self:
        faults = [f"{PREFIX}{name.upper()}: {fault}" for name, fault in self._kafka_security_faults()]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _kafka_security_faults(self) -> Iterator[tuple[str, str]]:
        protocol, mechanism = self.kafka_security_protocol, self.kafka_sasl_mechanism
        tls, sasl = protocol.endswith("SSL"), protocol.startswith("SASL")
        oauth = mechanism == "OAUTHBEARER"
        wants_tls, wants_sasl = f"{protocol} has no TLS; use SSL or SASL_SSL", f"{protocol} has no login; use SASL_SSL"
        if sasl and not mechanism:
            yield "kafka_sasl_mechanism", f"{protocol} needs one"
        # What is set would be of no effect, and whoever set it believes that it is.
        useless = {
            "kafka_tls_ca": (tls, wants_tls),
            "kafka_tls_certificate": (tls, wants_tls),
            "kafka_tls_key": (self.kafka_tls_certificate, "it needs PERENNIAL_KAFKA_TLS_CERTIFICATE"),
            "kafka_tls_key_password": (self.kafka_tls_certificate, "it needs PERENNIAL_KAFKA_TLS_CERTIFICATE"),
            "kafka_sasl_mechanism": (sasl, wants_sasl),
            "kafka_sasl_username": (mechanism and not oauth, "it goes with PLAIN and SCRAM only"),
            "kafka_sasl_password": (mechanism and not oauth, "it goes with PLAIN and SCRAM only"),
            "kafka_oauth_token_file": (oauth, "it goes with the mechanism OAUTHBEARER only"),
            "kafka_oauth_token_command": (oauth, "it goes with the mechanism OAUTHBEARER only"),
        }
        for name, (used, why) in useless.items():
            if getattr(self, name) is not None and not used:
                yield name, why
        if mechanism and not oauth:
            for name in ("kafka_sasl_username", "kafka_sasl_password"):
                if not getattr(self, name):
                    yield name, f"{mechanism} needs one"
        if oauth:
            yield from self._token_faults()
        if tls:
            yield from self._tls_faults()

    def _token_faults(self) -> Iterator[tuple[str, str]]:
        if (self.kafka_oauth_token_file is None) == (self.kafka_oauth_token_command is None):
            yield "kafka_oauth_token_file", "OAUTHBEARER needs either this or PERENNIAL_KAFKA_OAUTH_TOKEN_COMMAND"
        if self.kafka_oauth_token_command is not None:
            try:
                if not shlex.split(self.kafka_oauth_token_command):
                    yield "kafka_oauth_token_command", "it names no command"
            except ValueError as error:
                yield "kafka_oauth_token_command", f"it is no command line: {error}"

    def _tls_faults(self) -> Iterator[tuple[str, str]]:
        from activities.kafka import tls_context  # noqa: PLC0415  # `perennial --help` need not load aiokafka

        password = self.kafka_tls_key_password.get_secret_value() if self.kafka_tls_key_password else None
        try:
            tls_context(self.kafka_tls_ca, None, None, None)
        except OSError as error:
            yield "kafka_tls_ca", str(error)
        if self.kafka_tls_certificate is not None:
            try:
                tls_context(None, self.kafka_tls_certificate, self.kafka_tls_key, password)
            except OSError as error:
                yield "kafka_tls_certificate", str(error)

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
            lines = [f"  {line}" for fault in error.errors() for line in _described(fault)]
            raise SettingsError(
                "These settings are wrong; correct them in the environment:\n" + "\n".join(lines)
            ) from error


def _described(fault: ErrorDetails) -> list[str]:
    """A fault in words; what was got is not shown where it may be a secret, or is everything."""
    if not fault["loc"]:
        return str(fault["ctx"]["error"]).splitlines()
    name = str(fault["loc"][0])
    got = "" if name.endswith(("password", "command", "key", "url")) else f" (got {fault['input']!r})"
    return [f"{PREFIX}{name.upper()}: {fault['msg']}{got}"]


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
