"""The OpenAI chat-completions protocol, as far as the rehearsal endpoint speaks it. Pure.

    request = ChatRequest.model_validate_json(body)
    completion(request, Answer(text="Hello."), key)     # the body of an answer
    chunks(request, Answer(text="Hello."), key)         # the same as server-sent events
    refusal(429, "Slow down.")                          # the body of an error
    embeddings(EmbeddingsRequest(input=["a text"]))     # vectors of texts

What is not known here is ignored: a client may send any option of its vendor.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from activities import search
from activities.endpoints import REHEARSAL

_CHARACTERS_PER_TOKEN = 4
_SERVER_ERROR = 500
_PIECES = re.compile(r"\s*\S+\s*")
"""What one chunk of a streamed answer holds: about a word."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class FunctionCall(_Part):
    """Which function the model asked for, and with what, as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(_Part):
    """A tool call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Part):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, content: Any) -> Any:
        """Content in parts becomes the text of the parts that have some."""
        if isinstance(content, list):
            return "\n".join(part["text"] for part in content if isinstance(part, dict) and _is_text(part.get("text")))
        return "" if content is None else content

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _no_calls(cls, calls: Any) -> Any:
        return [] if calls is None else calls


class Function(_Part):
    """A function that the model may call; `parameters` is its JSON schema."""

    name: str = Field(min_length=1)
    description: str = ""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("description", mode="before")
    @classmethod
    def _no_description(cls, description: Any) -> Any:
        return "" if description is None else description


class Tool(_Part):
    """A tool that is offered."""

    type: Literal["function"] = "function"
    function: Function


class StreamOptions(_Part):
    """What a streamed answer holds beside the answer."""

    include_usage: bool = False


class ChatRequest(_Part):
    """A conversation to be answered."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Any = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("tools", "stream", "stream_options", mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any, info: Any) -> Any:
        nothing = {"tools": [], "stream": False, "stream_options": {}}
        return nothing[info.field_name] if value is None else value

    @model_validator(mode="after")
    def _calls_have_results(self) -> ChatRequest:
        """Refuse what the vendors refuse: a call without its result, a result without its call."""
        open_calls: set[str] = set()
        for number, message in enumerate(self.messages):
            if message.role == "tool":
                if message.tool_call_id not in open_calls:
                    raise ValueError(
                        f"messages[{number}] is a result of the call {message.tool_call_id!r}, and no message with "
                        "that tool call precedes it, or it has a result already"
                    )
                open_calls.remove(message.tool_call_id)
                continue
            if open_calls:
                raise ValueError(
                    f"messages[{number}] follows tool calls that have no result yet: {', '.join(sorted(open_calls))}"
                )
            open_calls = {call.id for call in message.tool_calls}
            if len(open_calls) < len(message.tool_calls):
                raise ValueError(f"messages[{number}] has two tool calls of the same id")
        if open_calls:
            raise ValueError(f"these tool calls have no result: {', '.join(sorted(open_calls))}")
        return self

    @property
    def tools_allowed(self) -> bool:
        """Whether an answer may call a tool."""
        return bool(self.tool_choice != "none")


@dataclass(frozen=True)
class Call:
    """A tool call to be made."""

    tool: str
    arguments: dict[str, JsonValue]


@dataclass(frozen=True)
class Answer:
    """What the model says to a conversation: a text, or tool calls to be made first."""

    text: str = ""
    calls: Sequence[Call] = ()


def models() -> dict[str, Any]:
    """The body that lists the one model there is."""
    return {"object": "list", "data": [{"id": REHEARSAL, "object": "model", "created": 0, "owned_by": "perennial"}]}


def completion(request: ChatRequest, answer: Answer, key: str) -> dict[str, Any]:
    """The body of an answer. The same key gives the same ids."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if answer.calls:
        message["tool_calls"] = _tool_calls(request, answer, key)
    return {
        **_head(request, key, "chat.completion"),
        "choices": [{"index": 0, "finish_reason": _finish(answer), "logprobs": None, "message": message}],
        "usage": _usage(request, answer),
    }


def chunks(request: ChatRequest, answer: Answer, key: str) -> Iterator[str]:
    """An answer as server-sent events, about a word each."""
    head = _head(request, key, "chat.completion.chunk")

    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield event({"role": "assistant", "content": None if answer.calls else ""})
    for piece in _PIECES.findall(answer.text):
        yield event({"content": piece})
    for index, call in enumerate(_tool_calls(request, answer, key)):
        arguments = call["function"]["arguments"]
        begun = {**call, "index": index, "function": {**call["function"], "arguments": ""}}
        yield event({"tool_calls": [begun]})
        yield event({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
    yield event({}, _finish(answer))
    if request.stream_options.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(request, answer)})
    yield "data: [DONE]\n\n"


def refusal(status: int, message: str) -> dict[str, Any]:
    """The body of an error."""
    kind, code = _kind(status)
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _kind(status: int) -> tuple[str, str | None]:
    match status:
        case 401:
            return "invalid_request_error", "invalid_api_key"
        case 404:
            return "invalid_request_error", "not_found"
        case 429:
            return "requests", "rate_limit_exceeded"
        case _:
            return ("server_error" if status >= _SERVER_ERROR else "invalid_request_error"), None


def _head(request: ChatRequest, key: str, kind: str) -> dict[str, Any]:
    # Marked as rehearsal whatever model was asked for, so that nobody takes it for that model's answer.
    name = request.model if request.model.startswith(REHEARSAL) else REHEARSAL
    return {"id": f"chatcmpl-{_digest(request, key)}", "object": kind, "created": int(time.time()), "model": name}


def _tool_calls(request: ChatRequest, answer: Answer, key: str) -> list[dict[str, Any]]:
    digest = _digest(request, key)
    return [
        {
            "id": f"call_{digest}_{number}",
            "type": "function",
            "function": {"name": call.tool, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for number, call in enumerate(answer.calls, 1)
    ]


def _digest(request: ChatRequest, key: str) -> str:
    """Different in every step of a conversation, which is one message longer each time."""
    return hashlib.sha256(f"{len(request.messages)}/{key}".encode()).hexdigest()[:16]


def _finish(answer: Answer) -> str:
    return "tool_calls" if answer.calls else "stop"


def _usage(request: ChatRequest, answer: Answer) -> dict[str, int]:
    asked = sum(
        len(message.content) + sum(len(call.function.name + call.function.arguments) for call in message.tool_calls)
        for message in request.messages
    ) + sum(len(tool.function.model_dump_json()) for tool in request.tools)
    answered = len(answer.text) + sum(len(call.tool + json.dumps(call.arguments)) for call in answer.calls)
    prompt, said = math.ceil(asked / _CHARACTERS_PER_TOKEN), math.ceil(answered / _CHARACTERS_PER_TOKEN)
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# Embeddings ----------------------------------------------------------------------------------------------------------

_DIMENSIONS = 256
_GRAM = 4


class EmbeddingsRequest(_Part):
    """Texts to be made vectors of."""

    model: str
    input: list[str] = Field(min_length=1)
    dimensions: int = Field(_DIMENSIONS, ge=1, le=4096)

    @field_validator("input", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def embeddings(asked: EmbeddingsRequest) -> dict[str, JsonValue]:
    """The body of an answer: vectors of the parts of the words, four letters each. Texts that share some are near.

    So nothing is understood, but "Sonnenschirm" is near to "Schirm", and a typing mistake does little harm.
    """
    tokens = sum(-(-len(text) // _CHARACTERS_PER_TOKEN) for text in asked.input)
    return {
        "object": "list",
        "model": f"{REHEARSAL}-embeddings",
        "data": [
            {"object": "embedding", "index": index, "embedding": list(_embedding(text, asked.dimensions))}
            for index, text in enumerate(asked.input)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _embedding(text: str, dimensions: int) -> list[float]:
    numbers = [0.0] * dimensions
    for word in search.words(text):
        for start in range(max(1, len(word) - _GRAM + 1)):
            number = zlib.crc32(word[start : start + _GRAM].encode())
            numbers[number // 2 % dimensions] += 1.0 if number % 2 else -1.0
    return numbers if any(numbers) else [1.0] * dimensions
