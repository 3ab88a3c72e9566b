"""A real MCP server for tests: it writes down what it is asked to do, and misbehaves when asked to.

    python mcp_server.py STATE          over stdio
    python mcp_server.py STATE PORT     over streamable HTTP, at http://127.0.0.1:PORT/mcp

It offers the tools that the file STATE/offer names, or all; `done` reads what it has written down.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ImageContent, TextContent, ToolAnnotations

STATE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def write(state: Path, **what: Any) -> None:
    with (state / "done.jsonl").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **what}) + "\n")


def done(state: Path, kind: str = "") -> list[dict[str, Any]]:
    """What a server with this state has been asked to do, one kind of it or all."""
    file = state / "done.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if kind in {"", line["kind"]}]


async def note(text: str, ctx: Context) -> str:
    """Write something down."""
    meta: Any = ctx.request_context.meta or {}
    write(STATE, kind="note", text=text, key=meta.get("perennial/idempotencyKey"), secret=os.environ.get("SECRET"))
    return f"noted: {text}"


async def wait(seconds: float, text: str = "") -> str:
    """Take so long."""
    write(STATE, kind="began", text=text)
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        write(STATE, kind="cancelled", text=text)
        raise
    write(STATE, kind="ended", text=text)
    return "waited"


async def hang(seconds: float) -> str:
    """Answer nothing and nobody for so long."""
    write(STATE, kind="hangs")
    time.sleep(seconds)  # noqa: ASYNC251  # that is the misbehaviour
    return "hung"


async def refuse(reason: str) -> str:
    """Refuse."""
    raise ToolError(reason)


async def die() -> str:
    """End the server."""
    write(STATE, kind="died")
    os._exit(3)


async def talk(characters: int) -> str:
    """Say so much."""
    return "é" * characters


async def draw() -> list[TextContent | ImageContent]:
    """Return what is no text."""
    picture = ImageContent(type="image", data="AAAA", mime_type="image/png")
    return [TextContent(type="text", text="a picture"), picture]


def main() -> None:
    server = MCPServer("odd", log_level="ERROR")
    offered = (STATE / "offer").read_text().split() if (STATE / "offer").exists() else None
    hints = {"wait": ToolAnnotations(read_only_hint=True), "die": ToolAnnotations(idempotent_hint=True)}
    for tool in (note, wait, hang, refuse, die, talk, draw):
        name = tool.__name__
        if offered is None or name in offered:
            server.tool(annotations=hints.get(name), structured_output=False)(tool)
    write(STATE, kind="started")
    if len(sys.argv) > 2:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
    else:
        server.run("stdio")


if __name__ == "__main__":
    main()
