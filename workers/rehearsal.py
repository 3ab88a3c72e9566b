"""The rehearsal endpoint: an HTTP server that speaks the OpenAI chat-completions protocol and answers from rules.

    perennial worker rehearsal                       # at PERENNIAL_REHEARSAL_URL
    async with serving(Rules()) as url: ...          # in a test

It stands in where no model is configured, and serves tests and benchmarks: the client's whole path is real, only the
mind is not. Rules are described in `workers/rehearsal_rules.py`, what can be asked for in a message (errors, latency,
tool calls) in `workers/rehearsal_answers.py`. `GET /rehearsal/calls` says how often each call was asked for and
answered, and when it was last asked for, by its Idempotency-Key: an answer is counted when all of it is sent to a
client that is still there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from activities import documents
from workers.rehearsal_answers import Decision, DirectiveError, Latency, decide
from workers.rehearsal_protocol import (
    ChatRequest,
    EmbeddingsRequest,
    chunks,
    completion,
    embeddings,
    models,
    refusal,
)
from workers.rehearsal_rules import Rules
from workers.settings import PREFIX, Settings

log = logging.getLogger("perennial.rehearsal")

DEFAULT_RULES = Path("deploy/rehearsal.yaml")
DEFAULT_URL = "http://127.0.0.1:8400/v1"
KEY_HEADER = "Idempotency-Key"

_HOST = "127.0.0.1"
_PATH = "/v1"
_MOST_KEYS = 100_000
"""Of so many calls the counts are kept: some tens of MB."""
_MOST_BYTES = 32 * 1024 * 1024
"""A larger body is refused."""
_CLOSING_SECONDS = 1
"""What connections may take to end when the server does."""

_BAD_REQUEST = 400
_TOO_LARGE = 413
_SERVER_ERROR = 500


async def main(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until asked to stop.

    Raises:
        SystemExit: a setting or the rules are wrong, or the port is taken; the message says so.
    """
    url = settings.rehearsal_url or DEFAULT_URL
    host, port = _address(url)
    rules = _rules(settings.rehearsal_rules)
    try:
        latency = Latency.parse(settings.rehearsal_latency)
    except DirectiveError as error:
        raise SystemExit(f"{PREFIX}REHEARSAL_LATENCY: {error}") from error
    try:
        listening = _listen(host, port)
    except OSError as error:
        raise SystemExit(
            f"Cannot serve the rehearsal endpoint at {url}: {error}. End what uses the port, or set "
            f"{PREFIX}REHEARSAL_URL to another http://host:port/v1."
        ) from error
    async with _running(Endpoint(rules, latency), listening):
        log.info("rehearsal endpoint at %s, %d rules", url, len(rules.rules))
        await stop.wait()


@asynccontextmanager
async def serving(rules: Rules, latency: str = "0", port: int = 0) -> AsyncIterator[str]:
    """A server on 127.0.0.1 in this process; its base address, as clients want it."""
    listening = _listen(_HOST, port)
    url = f"http://{_HOST}:{listening.getsockname()[1]}{_PATH}"
    async with _running(Endpoint(rules, Latency.parse(latency)), listening):
        yield url


# What is answered ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Count:
    """How often a call was asked for, and how often its answer was handed over."""

    key: str
    asked: int = 0
    answered: int = 0
    asked_at: float = 0.0
    """When it was last asked for: seconds since 1970 (UTC)."""


class Counts:
    """The counts of the calls asked for most recently."""

    def __init__(self, most: int = _MOST_KEYS) -> None:
        self._most = most
        self._counts: OrderedDict[str, Count] = OrderedDict()

    def asked(self, key: str) -> Count:
        """The call is asked for once more."""
        count = self._counts.setdefault(key, Count(key))
        count.asked += 1
        count.asked_at = time.time()
        self._counts.move_to_end(key)
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)
        return count

    def __iter__(self) -> Iterator[Count]:
        return iter(self._counts.values())


class Endpoint:
    """The application. Apart from the counts it keeps nothing: a conversation is all in its request."""

    def __init__(self, rules: Rules, latency: Latency) -> None:
        self._rules = rules
        self._latency = latency
        self._counts = Counts()
        self._stopping = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route(f"{_PATH}/models", self._models),
                Route(f"{_PATH}/chat/completions", self._completions, methods=["POST"]),
                Route(f"{_PATH}/embeddings", self._embeddings, methods=["POST"]),
                Route("/rehearsal/calls", self._calls),
            ],
            exception_handlers={HTTPException: _refuse, Exception: _report},
        )

    def stop(self) -> None:
        """Break off whatever waits."""
        self._stopping.set()

    async def _models(self, _: Request) -> Response:
        return JSONResponse(models())

    async def _calls(self, _: Request) -> Response:
        return JSONResponse([asdict(count) for count in self._counts])

    async def _embeddings(self, request: Request) -> Response:
        body = await _body(request)
        if body is None:
            return _too_large()
        try:
            return JSONResponse(embeddings(EmbeddingsRequest.model_validate_json(body)))
        except ValidationError as error:
            return _refused(_BAD_REQUEST, _faults(error))

    async def _completions(self, request: Request) -> Response | _Reply:
        body = await _body(request)
        if body is None:
            return _too_large()
        # A client that names no key is known by what it asks.
        key = request.headers.get(KEY_HEADER) or f"body-{hashlib.sha256(body).hexdigest()[:32]}"
        count = self._counts.asked(key)
        try:
            asked = ChatRequest.model_validate_json(body)
            decision = decide(asked, self._rules)
        except ValidationError as error:
            return _refused(_BAD_REQUEST, _faults(error))
        except DirectiveError as error:
            return _refused(_BAD_REQUEST, str(error))
        return _Reply(asked, decision, count, decision.latency or self._latency, self._stopping)


class _Reply:
    """An answer, or what a message asked for in its place: late, broken off, or never."""

    def __init__(
        self, asked: ChatRequest, decision: Decision, count: Count, latency: Latency, stopping: asyncio.Event
    ) -> None:
        self._count = count
        self._stopping = stopping
        self._seconds = random.uniform(latency.least, latency.most)  # noqa: S311  # nobody needs to guess it
        self._failure = decision.failure(count.asked)
        self._status = 200
        self._pause = 0.0
        headers = {"content-type": "application/json"}
        self._parts: list[bytes]
        if self._failure and self._failure.kind == "error":
            self._status = self._failure.status
            self._parts = [_json(refusal(self._status, "The message asked for this error."))]
            if self._failure.retry_after:
                headers["retry-after"] = self._failure.retry_after
        elif asked.stream:
            headers["content-type"] = "text/event-stream"
            self._parts = [chunk.encode() for chunk in chunks(asked, decision.answer, count.key)]
            self._pause = self._seconds / len(self._parts)  # the answer as a whole takes as long as any
        else:
            self._parts = [_json(completion(asked, decision.answer, count.key))]
            headers["content-length"] = str(len(self._parts[0]))
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            hangs = self._failure is not None and self._failure.kind == "hang"
            await self._wait(gone, None if hangs else self._pause or self._seconds)
            if not gone.done() and not self._stopping.is_set():
                await self._send(send, gone)
        finally:
            gone.cancel()

    async def _wait(self, gone: asyncio.Future[None], seconds: float | None) -> None:
        """Wait as long as the answer takes, or a part of it, but no longer than somebody wants it."""
        stopped = asyncio.ensure_future(self._stopping.wait())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.wait((gone, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()

    async def _send(self, send: Send, gone: asyncio.Future[None]) -> None:
        await send({"type": "http.response.start", "status": self._status, "headers": self._headers})
        if self._failure and self._failure.kind == "cut":
            body = b"".join(self._parts)
            # To return without an end is how the server is made to break the connection.
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            return
        *parts, last = self._parts
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            if self._pause:
                await self._wait(gone, self._pause)
            if gone.done() or self._stopping.is_set():
                return  # without an end, which is how the connection is broken
        if self._failure is None and not gone.done():
            self._count.answered += 1
        await send({"type": "http.response.body", "body": last})


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes | None:
    """What was sent; None if it is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            return None
    return bytes(body)


def _too_large() -> Response:
    return _refused(_TOO_LARGE, f"The body is larger than {_MOST_BYTES} bytes.")


def _faults(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in error.errors())


def _refused(status: int, message: str) -> Response:
    return JSONResponse(refusal(status, message), status)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refused(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}. There are GET /v1/models, POST /v1/chat/completions, "
        "POST /v1/embeddings and GET /rehearsal/calls.",
    )


async def _report(_: Request, error: Exception) -> Response:
    log.error("a request could not be answered", exc_info=error)
    return _refused(_SERVER_ERROR, f"The rehearsal endpoint failed: {type(error).__name__}: {error}")


def _json(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


# The server ----------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """A server that leaves signals to its process, and says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @override
    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@asynccontextmanager
async def _running(endpoint: Endpoint, listening: socket.socket) -> AsyncIterator[None]:
    server = _Server(
        uvicorn.Config(
            endpoint.app,
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            log_level="critical",  # it would report each connection that a message asked to be broken off
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        await server.up.wait()
        yield
    finally:
        endpoint.stop()
        server.should_exit = True
        await task


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: the port is taken, or the host is not this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, since asyncio sets TCP_NODELAY only then; without it, each answer would take 40 ms more.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening


def _address(url: str) -> tuple[str, int]:
    """Host and port of our base address.

    Raises:
        SystemExit: it is none that can be served.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme != "http" or not parts.hostname or port is None or parts.path.rstrip("/") != _PATH:
        raise SystemExit(f"{PREFIX}REHEARSAL_URL: {url!r} cannot be served; http://host:port{_PATH} is expected.")
    return parts.hostname, port


def _rules(path: Path | None) -> Rules:
    """The rules of the file; without one, those of the demo's file, if it is there.

    Raises:
        SystemExit: the file is wrong.
    """
    if path is None and not DEFAULT_RULES.is_file():
        log.info("no rules: there is no %s, and %sREHEARSAL_RULES is not set", DEFAULT_RULES, PREFIX)
        return Rules()
    try:
        rules, _ = documents.read(path or DEFAULT_RULES, Rules)
    except documents.DocumentError as error:
        raise SystemExit(f"The rules of the rehearsal endpoint are wrong:\n{error}") from error
    return rules
