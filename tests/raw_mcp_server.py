"""A server that speaks MCP by hand over stdio, for what the library would not let through.

    python raw_mcp_server.py TOOLS [GARBAGE] [ANSWER]

TOOLS is the JSON of its list of tools. GARBAGE is how many lines that are no JSON-RPC it writes when a tool is called,
before ANSWER: the JSON of the call's result, or `none`.
"""

import json
import sys
from typing import Any


def say(message: dict[str, Any]) -> None:
    write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    tools, garbage, answer = [*sys.argv[1:], *("[]", "0", "none")[len(sys.argv) - 1 :]]
    initialized = {
        "protocolVersion": "2025-06-18",
        "capabilities": {"tools": {}},
        "serverInfo": {"name": "raw", "version": "1"},
    }
    for line in sys.stdin:
        request = json.loads(line)
        match request["method"]:
            case "initialize":
                say({"id": request["id"], "result": initialized})
            case "tools/list":
                say({"id": request["id"], "result": {"tools": json.loads(tools)}})
            case "tools/call":
                write("log: not a word of JSON\n" * int(garbage))
                if answer != "none":
                    say({"id": request["id"], "result": json.loads(answer)})
            case _ if "id" in request:
                say({"id": request["id"], "error": {"code": -32601, "message": "Method not found"}})


if __name__ == "__main__":
    main()
