"""Free TCP ports of this machine: for servers, and to be found again by whoever restarts them.

port = free_port()
ports = free_ports({"temporal": 7233, "kafka": 9092, "metrics": 0})     # the usual ones where they are free
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Mapping

HOST = "127.0.0.1"

_STEP = 10
# Below the ports that the system gives to connections. One of those could be taken between our look and the server's;
# and while the server is down, a client that tries to connect to it could be given just that port, and so be connected
# to itself.
_ANY = range(10_000, 32_000)
_TRIES = 100


def free_ports(usual: Mapping[str, int], claim: Callable[[int], bool] = lambda _: True) -> dict[str, int]:
    """A free port on 127.0.0.1 for each name: the usual one, else one ten, twenty, ... above it, else any.

    Args:
        usual: the port to try first, by name; 0 for any.
        claim: asked before a port at or above a usual one is tried, which others are likely to choose too; False
            leaves it alone.
    """
    with contextlib.ExitStack() as held:  # all of them at once, so that no port is given twice
        chosen: dict[str, int] = {}
        for name, first in usual.items():
            near = range(first, min(first + _TRIES * _STEP, 65_536), _STEP) if first else ()
            for port in (*near, *random.sample(_ANY, _TRIES), 0):
                if port in near and not claim(port):
                    continue
                probe = socket.socket()
                # As servers do, so that connections of a stack that has just ended are not in the way.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                    # Two sockets that only share a bound port don't clash until they listen.
                    probe.listen(1)
                except OSError:
                    probe.close()
                    continue
                held.enter_context(probe)
                chosen[name] = probe.getsockname()[1]
                break
        return chosen


def free_port() -> int:
    """A free port on 127.0.0.1."""
    return free_ports({"port": 0})["port"]
