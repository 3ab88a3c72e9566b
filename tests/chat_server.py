"""A chat-completions server that answers what a test tells it to, byte for byte, and keeps what it was sent.

    async with serving(refused(429, retry_after="7"), said("hello")) as server:
        ...  # server.url, server.requests, server.headers

For what the rehearsal endpoint doesn't do: broken bodies, odd fields, hung and closed connections.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What the server answers; `status` None: it closes the connection, `hang`: it never answers."""

    body: Any = None
    status: int | None = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    """How many bytes of the body are announced and not sent."""
    hang: bool = False

    def encode(self) -> bytes:
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        fields = {"content-type": "application/json", "content-length": str(len(body)), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"HTTP/1.1 {self.status} Status\r\n{head}\r\n".encode() + body[: len(body) - self.cut]


def said(
    text: str | None = None, *calls: tuple[str, str, str], finish: str = "stop", model: str = "real-1", **message: Any
) -> Reply:
    """A chat completion with this text and these calls (id, name, arguments)."""
    tool_calls = [
        {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, name, arguments in calls
    ]
    content = {"role": "assistant", "content": text, **({"tool_calls": tool_calls} if calls else {}), **message}
    return Reply(
        {
            "id": "c1",
            "object": "chat.completion",
            "created": 1,
            "model": model,
            "choices": [{"index": 0, "finish_reason": finish, "message": content}],
            "usage": {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34},
        }
    )


def refused(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """An error as OpenAI words it."""
    return Reply(
        {"error": {"message": message, "code": code}}, status, {k.replace("_", "-"): v for k, v in headers.items()}
    )


class Server:
    """An HTTP server that answers with `replies` in turn, the last one for ever, and keeps what it was sent.

    Args:
        replies: what it answers.
        keep: whether it keeps the requests, and not only their sizes.
    """

    def __init__(self, *replies: Reply, keep: bool = True) -> None:
        self.replies = list(replies)
        self.sizes: list[int] = []
        """Bytes of the requests' bodies."""
        self._keep = keep
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.arrived = asyncio.Event()
        self.left = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n"):
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers["content-length"]))
                self.sizes.append(len(body))
                if self._keep:
                    self.requests.append(json.loads(body))
                self.headers.append(headers)
                reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
                self.arrived.set()
                if reply.hang:
                    await reader.read()  # until the client closes
                if reply.hang or reply.status is None:
                    return
                writer.write(reply.encode())
                await writer.drain()
                if reply.cut:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.left.set()
            writer.close()


@asynccontextmanager
async def serving(*replies: Reply, keep: bool = True) -> AsyncIterator[Server]:
    """A server on a free port."""
    server = Server(*replies, keep=keep)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        listening.close()
        if server.sizes:
            await server.left.wait()
