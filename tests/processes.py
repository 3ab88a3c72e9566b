"""For tests that start processes: is one still there, and a small stand-in for our workers."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether this process still runs; one that has ended and waits to be reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc/self").exists() else True
    except OSError:
        return False


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for a condition; TimeoutError when it does not come true."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what changes is outside this process
            await asyncio.sleep(0.02)


# Serves its PERENNIAL_ variables as JSON where a worker serves /metrics, or where the rehearsal endpoint answers.
STAND_IN_WORKER = """
import http.server, json, os, signal, sys
ours = {name: value for name, value in os.environ.items() if name.startswith("PERENNIAL_")}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(ours).encode())
def stop(*_):
    print("drained", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
rehearsal = sys.argv[1] == "rehearsal"
address = ours["PERENNIAL_REHEARSAL_URL"].split("/")[2] if rehearsal else ours["PERENNIAL_METRICS_ADDRESS"]
host, port = address.split(":")
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""


def stand_in_argv(name: str) -> tuple[str, ...]:
    """In place of `workers.embedded.worker_argv`."""
    return (sys.executable, "-I", "-S", "-c", STAND_IN_WORKER, name)
