"""The demo's carrier: an MCP server that tells where a parcel was last seen; see deploy/agents/logistics.yaml.

    python -m activities.demo_carrier       # over stdio

It stands for another company's system: it knows tracking numbers and nothing of the store's orders. What it tells
depends on the number alone, so it is the same whenever it is asked.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel, Field

_DEPOTS = ("Lyon", "Porto", "Leeds", "Grenoble", "Bilbao", "Innsbruck")
_EVENTS = ("arrived at the depot", "left the depot", "waits for customs", "held: the address is incomplete")


class Scan(BaseModel):
    """The last time that a parcel was scanned."""

    tracking: str
    depot: str
    event: str


def track_parcel(tracking: Annotated[str, Field(pattern=r"^[A-Z]\d{12}$", description="As on the label.")]) -> Scan:
    """Where a parcel was last scanned."""
    digest = sha256(tracking.encode()).digest()
    if digest[2] < 10:  # noqa: PLR2004  # about one in twenty-five
        raise ToolError(f"There is no scan of {tracking} yet.")
    return Scan(tracking=tracking, depot=_DEPOTS[digest[0] % len(_DEPOTS)], event=_EVENTS[digest[1] % len(_EVENTS)])


def server() -> MCPServer:
    """The server, to be run."""
    carrier = MCPServer("carrier")
    carrier.tool(annotations=ToolAnnotations(read_only_hint=True))(track_parcel)
    return carrier


if __name__ == "__main__":
    server().run()
