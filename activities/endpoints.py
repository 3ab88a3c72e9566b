"""Model endpoints: pools of them, routes through the pools, and what to do about each of their errors.

    pools = Pools(load_models(Path("models.yaml")), secrets)
    answer = await pools.call("default", instructions=..., context=entries, messages=new, tools=tools, key="...")

A route names pools in order; when one can't answer now, the next is tried. The model library's own retries are off:
one try is one HTTP request. What no pool can answer now is raised for Temporal to retry, which an operator sees.

    FinalError        no repetition helps: the request itself was refused
    ApplicationError  of type RetryLater: the same call may succeed later (workflows/errors.py)
    ModelsError       the configuration is wrong
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Protocol, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_ai.direct import model_request, model_request_stream
from pydantic_ai.exceptions import (
    ContentFilterError,
    ModelAPIError,
    ModelAuthenticationError,
    ModelContextWindowExceededError,
    ModelHTTPError,
    ModelNotFoundError,
    ModelQuotaExceededError,
    ModelRequestRejectedError,
    UnexpectedModelBehavior,
    UserError,
)
from pydantic_ai.messages import (
    InstructionPart,
    ModelMessage,
    ModelResponse,
    ModelResponseStreamEvent,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ToolCallPart,
)
from pydantic_ai.models import Model, ModelRequestParameters, infer_model
from pydantic_ai.providers import Provider, infer_provider_class
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition as OfferedTool
from pydantic_ai.usage import RequestUsage
from temporalio.exceptions import ApplicationError

from activities import documents, metrics, prices
from activities.conversation import assistant_message, model_messages, storable, without_calls
from activities.entries import AssistantMessage, Entry, Message
from activities.prices import Price
from workflows.budget import Need
from workflows.errors import Remedy, activity_error, remedy_for_status
from workflows.messages import Usage
from workflows.spec import Name, ToolDefinition

log = logging.getLogger("perennial.endpoints")

REHEARSAL = "rehearsal"
"""The model name of the rehearsal endpoint, and of its pool; answers of such a model are marked as rehearsal."""

_ANSWER_NOW = "You cannot call tools now. Answer with what you know, and say what is missing."
_LONGEST_WAIT = timedelta(hours=1)  # a server may ask for a day; mail would be given up before it was tried again
_TOO_LARGE = 413
_ANSWER_TOKENS = 8192  # the longest answer of a pool that names none, where a budget is to be kept
_OUR_SETTINGS = frozenset({"unknown_parameter", "unsupported_parameter", "unsupported_value"})
_MESSAGE_CHARACTERS = 500

# An agent outlives what a provider keeps for it: everything is sent each time, and nothing by reference.
_STATELESS: dict[str, Any] = {"openai_store": False, "openai_send_reasoning_ids": False}
_FREE = Price(input=Decimal(0), output=Decimal(0))
_RESPONSES_PROVIDERS = frozenset({"openai", "openai-responses"})

_EXTRAS = ("anthropic", "bedrock", "google")


class ModelsError(Exception):
    """The configuration of the model endpoints is wrong; the message says what and where, and what to do."""


class FinalError(Exception):
    """No repetition helps: the request itself was refused. The message says by whom and why."""

    def __init__(self, message: str, *, too_long: bool = False) -> None:
        super().__init__(message)
        self.too_long = too_long
        """Whether a shorter conversation might have been taken."""


class PoolConfig(BaseModel):
    """One way to reach a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9/-]*:\S+$")]
    """`provider:name` as pydantic-ai has it; `openai-chat:name` for every OpenAI-compatible server."""
    base_url: str | None = Field(None, pattern=r"^https?://\S+$")
    """Where the endpoint is; without it, where the provider's is."""
    api_key_env: str | None = Field(None, min_length=1)
    """The environment variable with the key; without it, the one that the provider's own users set."""
    region: str | None = None
    """Of Amazon Bedrock; without it, the one that boto3 finds."""
    timeout_seconds: float = Field(120, gt=0, le=3600)
    """How long one call may take."""
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Any further setting of pydantic-ai's `ModelSettings`, such as `thinking: low` or `cache: true`."""
    price: Price | None = None
    """What it costs; without it, what the table of the package `genai-prices` says of the provider's model."""

    @property
    def longest_answer(self) -> int | None:
        """How many tokens an answer may have, if that is limited."""
        limited = self.settings.get("max_tokens", self.max_output_tokens)
        return limited if isinstance(limited, int) else None


class EmbeddingsConfig(BaseModel):
    """The model that makes vectors of texts, and where it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9/-]*:\S+$")]
    """`provider:name` as pydantic-ai has it; `openai:name` with a base_url for every OpenAI-compatible server."""
    base_url: str | None = Field(None, pattern=r"^https?://\S+$")
    """Where the endpoint is; without it, where the provider's is."""
    api_key_env: str | None = Field(None, min_length=1)
    """The environment variable with the key; without it, the one that the provider's own users set."""
    dimensions: int | None = Field(None, ge=8, le=4096)
    """Of the vectors, where the model can make shorter ones; without it, as many as the model has."""
    similarity: float = Field(0.3, ge=0, le=1)
    """How near a fact has to be to be recalled: the cosine, which for texts that have nothing to do with each other
    differs from model to model."""
    timeout_seconds: float = Field(10, gt=0, le=60)
    """How long one call may take; a turn waits for it."""

    @property
    def name(self) -> str:
        """What vectors of this model are kept under: those of different names can't be compared."""
        return f"{self.model}/{self.dimensions}" if self.dimensions else self.model


class ModelsConfig(BaseModel):
    """The pools, and the routes through them. Without routes, `default` names all pools in their order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pools: dict[Name, PoolConfig] = Field(min_length=1)
    routes: dict[Name, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict, validate_default=True)
    embeddings: EmbeddingsConfig | None = None
    """The model that makes vectors of facts, so that they are recalled by what they mean too; None: by words alone."""

    @field_validator("routes")
    @classmethod
    def _known_pools(cls, routes: dict[str, list[str]], info: ValidationInfo) -> dict[str, list[str]]:
        pools = info.data.get("pools")
        if pools is None:
            return routes  # the fault is in the pools, and reported there
        for route, named in routes.items():
            unknown = [pool for pool in named if pool not in pools]
            if unknown:
                raise ValueError(f"route {route} names {', '.join(unknown)}; the pools are: {', '.join(pools)}")
        return routes or {"default": list(pools)}

    @property
    def variables(self) -> set[str]:
        """The environment variables whose values the pools and the embeddings name as their keys."""
        keys = {pool.api_key_env for pool in self.pools.values()}
        return {key for key in (*keys, self.embeddings and self.embeddings.api_key_env) if key}


def load_models(path: Path) -> ModelsConfig:
    """Read models.yaml.

    Raises:
        ModelsError: the file can't be read or is wrong; the message names the file, line and field.
    """
    try:
        config, _ = documents.read(path, ModelsConfig)
    except documents.DocumentError as error:
        raise ModelsError(str(error)) from error
    return config


_ENVIRONMENT_HELP = """No model is configured. Set one of these in the environment:
  OPENAI_API_KEY             OpenAI (and OPENAI_MODEL to choose the model)
  OPENAI_BASE_URL            an OpenAI-compatible server (and OPENAI_MODEL; OPENAI_API_KEY if it wants a key)
  ANTHROPIC_API_KEY          Anthropic (and ANTHROPIC_MODEL)
  GOOGLE_API_KEY             Gemini (and GEMINI_MODEL)
  AWS_BEARER_TOKEN_BEDROCK   Amazon Bedrock (and AWS_REGION, BEDROCK_MODEL)
  PERENNIAL_MODELS           a models.yaml with pools and routes; see deploy/models.example.yaml
or run `perennial dev`, which brings a rehearsal endpoint that answers from rules."""


def models_from_environment(variables: Mapping[str, str], rehearsal_url: str | None) -> ModelsConfig:
    """One pool for the provider whose variables are set, else for the rehearsal endpoint.

    Args:
        variables: the environment, or the part of it that `_ENVIRONMENT_HELP` names. An empty variable is none.
        rehearsal_url: where the rehearsal endpoint is, if there is one.

    Raises:
        ModelsError: none of them is there, or one holds what can't be.
    """
    try:
        found = _pool_from({name: value for name, value in variables.items() if value}, rehearsal_url)
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']} (got {fault['input']!r})" for fault in error.errors())
        raise ModelsError(f"The model provider's environment variables are wrong: {faults}") from error
    if found is None:
        raise ModelsError(_ENVIRONMENT_HELP)
    name, pool = found
    return ModelsConfig(pools={name: pool})


def _pool_from(variables: Mapping[str, str], rehearsal_url: str | None) -> tuple[str, PoolConfig] | None:
    if "OPENAI_API_KEY" in variables or "OPENAI_BASE_URL" in variables:
        return "openai", PoolConfig(
            model=f"openai-chat:{variables.get('OPENAI_MODEL', 'gpt-6-luna')}",
            base_url=variables.get("OPENAI_BASE_URL"),
            api_key_env="OPENAI_API_KEY" if "OPENAI_API_KEY" in variables else None,
        )
    if "ANTHROPIC_API_KEY" in variables:
        return "anthropic", PoolConfig(
            model=f"anthropic:{variables.get('ANTHROPIC_MODEL', 'claude-haiku-5-5')}",
            base_url=variables.get("ANTHROPIC_BASE_URL"),
            api_key_env="ANTHROPIC_API_KEY",
        )
    for key in ("GOOGLE_API_KEY", "GEMINI_API_KEY"):
        if key in variables:
            model = variables.get("GEMINI_MODEL", "gemini-3.5-flash-lite")
            return "google", PoolConfig(model=f"google:{model}", api_key_env=key)
    if "AWS_BEARER_TOKEN_BEDROCK" in variables:
        return "bedrock", PoolConfig(
            model=f"bedrock:{variables.get('BEDROCK_MODEL', 'global.anthropic.claude-haiku-5-5')}",
            api_key_env="AWS_BEARER_TOKEN_BEDROCK",
            region=variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION"),
        )
    if rehearsal_url:
        return REHEARSAL, PoolConfig(model=f"openai-chat:{REHEARSAL}", base_url=rehearsal_url, price=_FREE)
    return None


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    message: AssistantMessage
    usage: Usage
    model: str
    """As the model names itself, else as the pool names it."""
    pool: str
    rehearsal: bool
    micro_usd: int | None = None
    """What it has cost, in micro-dollars; None: its price is not known."""


class Listener(Protocol):
    """Is told what a model says, as it says it."""

    def begin(self) -> None:
        """A request is made; what was told of an earlier one is void."""

    def text(self, text: str) -> None:
        """More of the answer's text."""

    def tool_call(self, name: str) -> None:
        """A tool is called."""


class Pools:
    """The model endpoints. Clients are made when first used, and kept; `close` ends their connections.

    Args:
        config: pools and routes.
        secrets: the values of environment variables, by name: at least `config.variables`.

    Raises:
        ModelsError: a pool names a variable that is not among the secrets.
    """

    def __init__(self, config: ModelsConfig, secrets: Mapping[str, str]) -> None:
        self._config = config
        self._secrets = secrets
        self._models: dict[str, Model[Any]] = {}
        self._not_streaming: set[str] = set()
        """Pools that were asked to stream an answer and sent none so."""
        for name, pool in config.pools.items():
            if pool.api_key_env and not secrets.get(pool.api_key_env):
                raise ModelsError(f"pool {name}: set its key in the environment variable {pool.api_key_env}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def check(self) -> None:
        """Make the clients of all pools now, so that a wrong configuration is found before the first call.

        Raises:
            ModelsError: one can't be made.
        """
        for name in self._config.pools:
            self._model(name)

    async def close(self) -> None:
        """Close all connections. Calls in progress fail."""
        models, self._models = self._models, {}
        for model in models.values():
            async with model:  # leaving it is how the library closes its client
                pass

    async def call(  # noqa: PLR0913  # a call has these parts; they are passed by name
        self,
        route: str,
        *,
        instructions: str,
        context: Sequence[Entry],
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition],
        key: str,
        tools_allowed: bool = True,
        budgeted: bool = False,
        listener: Listener | None = None,
    ) -> Answer:
        """Have the conversation answered by the first pool of the route that can.

        Args:
            route: which pools to try, in order.
            instructions: the agent's instructions.
            context: the conversation so far, oldest first.
            messages: what is new in it.
            tools: the tools the agent has.
            key: idempotency key, the same whenever this call is made again.
            tools_allowed: False if the model has to answer without calling a tool.
            budgeted: let no answer be longer than `need` has it.
            listener: is told of the answer as it comes; without one, it is not asked for bit by bit.

        Raises:
            FinalError: the request was refused, and would be again.
            ApplicationError: RetryLater: no pool can answer now, or there is no such route.
        """
        names = self._route(route)
        conversation = model_messages(context, messages)
        parameters = ModelRequestParameters(
            # Tools are declared also when they may not be called: providers refuse earlier calls of unknown tools.
            function_tools=[_offered(tool) for tool in tools],
            instruction_parts=[
                InstructionPart(instructions if tools_allowed else f"{instructions}\n\n{_ANSWER_NOW}"),
            ],
        )
        failures: list[_Failure] = []
        for name in names:
            settings = _settings(self._config.pools[name], key, tools_allowed=tools_allowed)
            if budgeted:
                settings.setdefault("max_tokens", _ANSWER_TOKENS)
            try:
                return await self._ask(name, conversation, settings, parameters, listener)
            except _Failure as failure:
                log.warning("%s", failure)
                failures.append(failure)
                if failure.remedy is not Remedy.RETRY_ELSEWHERE:
                    break
        raise _no_answer(route, failures)

    def need(self, route: str, input_tokens: int) -> Need:
        """What a call with so much input may take at most, whichever pool of the route answers it.

        Raises:
            ApplicationError: RetryLater: there is no such route.
        """
        tokens, micro, unpriced = 0, 0, ""
        for name in self._route(route):
            pool = self._config.pools[name]
            usage = RequestUsage(input_tokens=input_tokens, output_tokens=pool.longest_answer or _ANSWER_TOKENS)
            tokens = max(tokens, usage.input_tokens + usage.output_tokens)
            costs = _micro_usd(pool, usage)
            if costs is None:
                unpriced = unpriced or f"{pool.model} (pool {name})"
            else:
                micro = max(micro, costs)
        return Need(tokens=tokens, micro_usd=None if unpriced else micro, unpriced=unpriced)

    def _route(self, route: str) -> list[str]:
        """The pools of a route, in order."""
        names = self._config.routes.get(route)
        if names is None:
            raise activity_error(
                Remedy.RETRY_LATER,
                f"There is no route {route!r}; the routes are: {', '.join(self._config.routes)}. "
                "Add it to models.yaml and restart the model workers, or correct the agent's spec.",
            )
        return names

    async def _ask(
        self,
        name: str,
        conversation: list[ModelMessage],
        settings: ModelSettings,
        parameters: ModelRequestParameters,
        listener: Listener | None,
    ) -> Answer:
        """One call of one pool: one HTTP request."""
        pool = self._config.pools[name]
        try:
            model = self._model(name)
        except ModelsError as error:
            raise _Failure(str(error), Remedy.RETRY_ELSEWHERE) from error
        started = time.monotonic()
        try:
            request = (model, conversation, settings, parameters)
            if listener is None or name in self._not_streaming:
                response = await _whole(*request)
            else:
                try:
                    response = await _heard(*request, listener)
                except _NotStreamedError:
                    response = await _whole(*request)
                    if response.parts:  # so it was not that the model had nothing to say
                        log.warning("pool %s does not stream its answers; from now on it is asked for them whole", name)
                        self._not_streaming.add(name)
            _refuse_withheld(response)
        except (ModelAPIError, UnexpectedModelBehavior) as error:
            remedy = remedy_for(error)
            metrics.model_call(name, pool.model, _OUTCOMES[remedy], time.monotonic() - started)
            message = f"pool {name}: {_said(error)}"
            if remedy is Remedy.FINAL:
                raise FinalError(message, too_long=_is_too_long(error)) from error
            raise _Failure(message, remedy, getattr(error, "retry_after", None)) from error
        metrics.model_call(name, pool.model, "ok", time.monotonic() - started)
        usage = Usage(input_tokens=response.usage.input_tokens, output_tokens=response.usage.output_tokens)
        metrics.tokens(name, pool.model, usage)
        if settings.get("tool_choice") == "none":
            response = without_calls(response)
        model_name = response.model_name or pool.model
        return Answer(
            message=assistant_message(response),
            usage=usage,
            model=storable(model_name),
            pool=name,
            rehearsal=model_name.startswith(REHEARSAL),
            micro_usd=_micro_usd(pool, response.usage),
        )

    def _model(self, name: str) -> Model[Any]:
        if name not in self._models:
            pool = self._config.pools[name]
            key = self._secrets[pool.api_key_env] if pool.api_key_env else None
            self._models[name] = _build(name, pool, key)
        return self._models[name]


# Errors --------------------------------------------------------------------------------------------------------------

_OUTCOMES = {
    Remedy.RETRY_LATER: "retry_later",
    Remedy.RETRY_ELSEWHERE: "retry_elsewhere",
    Remedy.FINAL: "final",
}
"""The remedies as the metrics name them."""


class _Failure(Exception):  # noqa: N818  # a pool's failure is an error only when no other pool answers
    """A pool could not answer, and something may help."""

    def __init__(self, message: str, remedy: Remedy, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.retry_after = retry_after


class _NotStreamedError(Exception):
    """No answer came bit by bit: the model or its server can't, or there was nothing to say."""


def remedy_for(error: ModelAPIError | UnexpectedModelBehavior) -> Remedy:
    """What helps against an error of the model library.

    Not final is what an operator can mend (keys, accounts, names of models, our own settings): mail is kept until
    then. Answers that can't be read, and whatever happened on the way, may be better elsewhere.
    """
    if isinstance(error, (ModelAuthenticationError, ModelNotFoundError, ModelQuotaExceededError)):
        return Remedy.RETRY_ELSEWHERE
    if isinstance(error, (ModelContextWindowExceededError, ContentFilterError)):
        return Remedy.FINAL
    if isinstance(error, ModelHTTPError):
        if error.provider_error_code in _OUR_SETTINGS:
            return Remedy.RETRY_ELSEWHERE
        return remedy_for_status(error.status_code)
    return Remedy.FINAL if isinstance(error, ModelRequestRejectedError) else Remedy.RETRY_ELSEWHERE


async def _whole(
    model: Model[Any], conversation: list[ModelMessage], settings: ModelSettings, parameters: ModelRequestParameters
) -> ModelResponse:
    """Make a request whose answer comes in one piece."""
    return await model_request(model, conversation, model_settings=settings, model_request_parameters=parameters)


async def _heard(
    model: Model[Any],
    conversation: list[ModelMessage],
    settings: ModelSettings,
    parameters: ModelRequestParameters,
    listener: Listener,
) -> ModelResponse:
    """Make a request whose answer comes bit by bit.

    Raises:
        _NotStreamedError: it can't come so.
        UnexpectedModelBehavior: it ended without an end: what came may be half of it.
    """
    listener.begin()
    stream = model_request_stream(model, conversation, model_settings=settings, model_request_parameters=parameters)
    has_begun = False
    try:
        async with stream as events:
            has_begun = True
            async for event in events:
                _tell(listener, event)
            response = events.get()
    except NotImplementedError as error:  # not every kind of model can
        raise _NotStreamedError from error
    except ContentFilterError:
        raise
    except UnexpectedModelBehavior as error:
        if has_begun:
            raise
        raise _NotStreamedError from error  # not every server can: some send the whole answer, which is no stream
    if response.finish_reason is None:
        raise UnexpectedModelBehavior("the model's answer broke off")
    return response


def _tell(listener: Listener, event: ModelResponseStreamEvent) -> None:
    match event:
        case PartStartEvent(part=TextPart(content=text)) | PartDeltaEvent(delta=TextPartDelta(content_delta=text)):
            listener.text(text)
        case PartStartEvent(part=ToolCallPart(tool_name=name)):
            listener.tool_call(name)
        case _:
            pass  # thinking, arguments, and what is told otherwise


def _refuse_withheld(response: ModelResponse) -> None:
    """Raise if the provider held the answer back: it is none, though its status was 200."""
    if response.parts:
        return
    if response.finish_reason == "content_filter":
        details = response.provider_details or {}
        reason = details.get("refusal") or details.get("block_reason") or "its content filter"
        raise ContentFilterError(f"the provider withheld the answer: {reason}")
    if response.finish_reason == "error":
        raise UnexpectedModelBehavior("the model broke off without an answer")


def _is_too_long(error: Exception) -> bool:
    return isinstance(error, ModelContextWindowExceededError) or getattr(error, "status_code", None) == _TOO_LARGE


def _said(error: ModelAPIError | UnexpectedModelBehavior) -> str:
    """What happened, in one line."""
    if isinstance(error, ModelHTTPError):
        body: Any = error.body
        while isinstance(body, dict):  # OpenAI: {message}; Anthropic, Google: {error: {message}}
            body = body.get("message") or body.get("error")
        text = f"HTTP status {error.status_code}: {body or 'no explanation'}"
    else:
        text = f"{type(error).__name__}: {error.message}"
    return storable(" ".join(text.split())[:_MESSAGE_CHARACTERS])


def _no_answer(route: str, failures: Sequence[_Failure]) -> ApplicationError:
    """The error for Temporal, to be retried when the first of the servers has asked us to, if one has."""
    waits = [timedelta(seconds=failure.retry_after) for failure in failures if failure.retry_after]
    return activity_error(
        Remedy.RETRY_LATER,
        f"No pool of route {route!r} can answer now. {'; '.join(map(str, failures))}",
        retry_after=min(*waits, _LONGEST_WAIT) if waits else None,
    )


# Requests and clients ------------------------------------------------------------------------------------------------


def _offered(tool: ToolDefinition) -> OfferedTool:
    schema: dict[str, Any] = {"type": "object", "properties": {}, **tool.parameters}
    return OfferedTool(name=tool.name, description=tool.description, parameters_json_schema=schema)


def _settings(pool: PoolConfig, key: str, *, tools_allowed: bool) -> ModelSettings:
    settings: dict[str, Any] = dict(_STATELESS) if _provider_of(pool) in _RESPONSES_PROVIDERS else {}
    if pool.max_output_tokens is not None:
        settings["max_tokens"] = pool.max_output_tokens
    if pool.temperature is not None:
        settings["temperature"] = pool.temperature
    settings |= pool.settings
    settings["extra_headers"] = {**settings.get("extra_headers", {}), "Idempotency-Key": key}
    settings["request_timeout"] = pool.timeout_seconds
    if _provider_of(pool) != "bedrock":  # its client is told when it is made
        settings |= {"timeout": pool.timeout_seconds, "max_retries": 0}
    if not tools_allowed:
        settings["tool_choice"] = "none"
    return cast("ModelSettings", settings)


def _micro_usd(pool: PoolConfig, usage: RequestUsage) -> int | None:
    return prices.micro_usd(pool.model, pool.base_url, pool.price, usage)


def _provider_of(pool: PoolConfig) -> str:
    return pool.model.partition(":")[0]


def _build(name: str, pool: PoolConfig, key: str | None) -> Model[Any]:
    try:
        return infer_model(pool.model, lambda provider: _provider(name, provider, pool, key))
    except ImportError as error:
        provider = _provider_of(pool)
        package = f"perennial[{provider}]" if provider in _EXTRAS else f"pydantic-ai-slim[{provider}]"
        raise ModelsError(f"pool {name}: {pool.model} needs more packages: pip install '{package}'") from error
    except (UserError, ValueError) as error:
        raise ModelsError(f"pool {name}: {pool.model} cannot be used: {error}") from error


def _provider(name: str, provider: str, pool: PoolConfig, key: str | None) -> Provider[Any]:
    """The client of a pool. Keys never go to a server they were not named for."""
    if provider == "bedrock":
        return _bedrock(pool, key)
    if provider == "openai-chat" and pool.base_url:
        from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider  # noqa: PLC0415  # see _bedrock

        return OpenAICompatibleProvider(name, base_url=pool.base_url, api_key=key)
    options = {"api_key": key, "base_url": pool.base_url}
    return infer_provider_class(provider)(**{option: value for option, value in options.items() if value})


def _bedrock(pool: PoolConfig, key: str | None) -> Provider[Any]:
    """A client of Amazon Bedrock that makes one try: the library's own provider leaves botocore's retries on."""
    # Packages of one provider are imported when it is used: they are optional, and slow to import.
    from botocore.config import Config  # noqa: PLC0415
    from botocore.exceptions import NoRegionError  # noqa: PLC0415
    from botocore.session import Session  # noqa: PLC0415
    from botocore.tokens import FrozenAuthToken  # noqa: PLC0415
    from pydantic_ai.providers.bedrock import BedrockProvider  # noqa: PLC0415

    session = Session()
    options: dict[str, Any] = {"retries": {"total_max_attempts": 1}, "read_timeout": pool.timeout_seconds}
    if key:
        session.get_auth_token = lambda **_: FrozenAuthToken(key)
        options["signature_version"] = "bearer"
    try:
        client = session.create_client(
            "bedrock-runtime", region_name=pool.region, endpoint_url=pool.base_url, config=Config(**options)
        )
    except NoRegionError as error:
        raise ValueError("set the pool's `region`, or AWS_REGION") from error
    return BedrockProvider(bedrock_client=client)
