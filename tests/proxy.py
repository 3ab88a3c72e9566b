"""A TCP proxy on 127.0.0.1 that can be told to fail, at any moment: between a process of ours and a server.

    async with Proxy(temporal.port) as link:     # link.address instead of temporal.address
        link.cut()                  # connections are reset, new ones refused
        link.half_open()            # connections stay open, and nothing goes through
        link.drop_answers()         # the server gets what is asked; its answers do not come back
        link.delay(0.5)             # everything arrives later
        link.mend()

`KafkaProxy` stands before brokers. These tell their clients where to find them: through it, they tell of the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from enum import Enum, auto
from functools import partial
from typing import Self

from typing_extensions import override

from workers.ports import free_port

_HOST = "127.0.0.1"
_CHUNK = 256 * 1024
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: to close is to reset."""


class Fault(Enum):
    """What is wrong with a proxy."""

    NONE = auto()
    CUT = auto()
    HALF_OPEN = auto()
    NO_ANSWERS = auto()


class Proxy:
    """Forwards to ports on 127.0.0.1; each has a port here that takes its place, and stays the same."""

    def __init__(self, *targets: int) -> None:
        self.ports = {target: free_port() for target in targets}
        self.fault = Fault.NONE
        self.dropped = 0
        """Bytes of answers that were dropped."""
        self._delay = 0.0
        self._mended = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._connections: set[_Connection] = set()

    @property
    def address(self) -> str:
        """host:port, comma separated."""
        return ",".join(f"{_HOST}:{port}" for port in self.ports.values())

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    # Faults; each takes the place of the one before -----------------------------------------------------------------

    def cut(self) -> None:
        """Reset all connections, and refuse new ones."""
        self._become(Fault.CUT)
        self.reset()

    def half_open(self) -> None:
        """Connections stay open and nothing is forwarded, either way; new ones are accepted, and hang."""
        self._become(Fault.HALF_OPEN)

    def drop_answers(self) -> None:
        """What is asked arrives and takes effect; who asked never hears of it."""
        self._become(Fault.NO_ANSWERS)

    def delay(self, seconds: float) -> None:
        """What is read at once is forwarded so much later, in either direction."""
        self._become(Fault.NONE)
        self._delay = seconds

    def mend(self) -> None:
        """All is well again. Connections from which something was withheld are reset: it never arrives."""
        self._become(Fault.NONE)

    def reset(self) -> None:
        """Reset all connections; new ones may be made at once, unless they are refused."""
        for connection in self._connections:
            connection.reset()

    def _become(self, fault: Fault) -> None:
        if self.fault in {Fault.HALF_OPEN, Fault.NO_ANSWERS}:
            self.reset()
        self.fault, self._delay = fault, 0.0
        self._mended.set()
        self._mended = asyncio.Event()

    # Life ------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        for target, port in self.ports.items():
            self._servers.append(await asyncio.start_server(partial(self._serve, target), _HOST, port))
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        self._become(Fault.CUT)
        self.reset()
        if self._connections:
            await asyncio.wait([connection.task for connection in self._connections])

    async def _serve(self, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        connection = _Connection(task, writer)
        self._connections.add(connection)
        try:
            if self.fault is Fault.CUT:
                return
            while self.fault is Fault.HALF_OPEN:
                await self._mended.wait()
            there, asking = await asyncio.open_connection(_HOST, target)
            connection.writers.append(asking)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, asking))
                both.create_task(self._forward(there, writer, answers=True))
            await connection.end()
        except* (OSError, EOFError, asyncio.CancelledError):
            pass  # one of both has ended, or we were told to reset: the other sees a reset, too
        finally:
            self._connections.discard(connection)
            connection.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        data = b"begin"
        while data:
            data = await (self.read_answer(reader) if answers else reader.read(_CHUNK))
            if self._delay:
                await asyncio.sleep(self._delay)
            while self.fault is Fault.HALF_OPEN:
                await self._mended.wait()
            if answers and self.fault is Fault.NO_ANSWERS:
                self.dropped += len(data)
                continue
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def read_answer(self, reader: asyncio.StreamReader) -> bytes:
        """Something of what a server sends; nothing at its end."""
        return await reader.read(_CHUNK)


class KafkaProxy(Proxy):
    """Before brokers: in their answers, our ports stand for theirs, so that clients stay with us."""

    @override
    async def read_answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            size = await reader.readexactly(4)
        except asyncio.IncompleteReadError:
            return b""
        answer = await reader.readexactly(*struct.unpack(">i", size))
        for target, port in self.ports.items():
            answer = answer.replace(_place(target), _place(port))
        return size + answer


def _place(port: int) -> bytes:
    """A broker's host and port, as they stand in Kafka's answers, however the length of the host is written."""
    return _HOST.encode() + struct.pack(">i", port)


class _Connection:
    """A client's connection, and ours to the server in its stead."""

    def __init__(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        self.task = task
        self.writers = [writer]

    def reset(self) -> None:
        self.task.cancel()

    async def end(self) -> None:
        """Both sides have said all they had to say."""
        for writer in self.writers:
            writer.close()
            await writer.wait_closed()

    def abort(self) -> None:
        """Whatever is still open is reset."""
        for writer in self.writers:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
