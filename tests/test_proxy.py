"""The tests' proxy, between a client and a small server of lines: each fault does what its name says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from proxy import KafkaProxy, Proxy
from servers import AnyBroker, eventually

_WITHHELD_SECONDS = 0.3
"""So long an answer is waited for that must not come; on this machine one comes within a millisecond."""


class Echo:
    """Answers each line with itself, and remembers it."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.open = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            async for line in reader:
                self.heard.append(line.strip())
                writer.write(line)
            writer.write(b"bye\n")
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()


@dataclass
class Line:
    """A client's connection to the proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, text: bytes) -> bytes:
        self.writer.write(text + b"\n")
        return (await self.reader.readline()).strip()

    async def ask_in_vain(self, text: bytes) -> None:
        """Say something, to which nothing comes back."""
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self.ask(text), _WITHHELD_SECONDS)

    async def is_reset(self) -> None:
        """Wait for the reset."""
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(5):
                await self.reader.read()


Dial = Callable[[Proxy], Awaitable[Line]]


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    """Makes connections to a proxy, which are closed at the end."""
    lines: list[Line] = []

    async def to(link: Proxy) -> Line:
        (port,) = link.ports.values()
        lines.append(Line(*await asyncio.open_connection("127.0.0.1", port)))
        return lines[-1]

    yield to
    for line in lines:
        line.writer.transport.abort()


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def link(echo: Echo) -> AsyncIterator[Proxy]:
    async with echo.serving() as port, Proxy(port) as link:
        yield link
        link.reset()
        await eventually(lambda: not echo.open and not link.connections)


async def test_without_a_fault_all_goes_through(link: Proxy, dial: Dial) -> None:
    """Both ways, also what is large, and the end: what was said before it arrives."""
    line = await dial(link)
    assert await line.ask(b"one") == b"one"
    large = b"x" * 60_000
    assert await line.ask(large) == large
    line.writer.write_eof()
    assert await line.reader.read() == b"bye\n"


async def test_cut_resets_and_refuses_until_it_is_mended(echo: Echo, link: Proxy, dial: Dial) -> None:
    """Both sides of a connection end; who connects anew is reset before anything is heard of it."""
    line = await dial(link)
    await line.ask(b"before")
    link.cut()
    await line.is_reset()
    await eventually(lambda: not echo.open)
    with pytest.raises(ConnectionResetError):
        await (await dial(link)).ask(b"during")
    link.mend()
    assert await (await dial(link)).ask(b"after") == b"after"
    assert echo.heard == [b"before", b"after"]


async def test_half_open_forwards_nothing_and_what_was_withheld_never_arrives(
    echo: Echo, link: Proxy, dial: Dial
) -> None:
    """Old connections and new ones hang, neither ends; when it is over all of them are reset."""
    old = await dial(link)
    await old.ask(b"before")
    link.half_open()
    new = await dial(link)
    await old.ask_in_vain(b"old")
    await new.ask_in_vain(b"new")
    old.writer.write_eof()
    assert echo.open == 1, "the server does not learn of an end either"
    link.mend()
    await old.is_reset()
    await new.is_reset()
    assert await (await dial(link)).ask(b"after") == b"after"
    assert echo.heard == [b"before", b"after"]


async def test_dropped_answers_leave_what_was_asked_done(echo: Echo, link: Proxy, dial: Dial) -> None:
    """The server hears it, and who asked does not hear of it."""
    line = await dial(link)
    link.drop_answers()
    await line.ask_in_vain(b"during")
    await (await dial(link)).ask_in_vain(b"anew")
    assert echo.heard == [b"during", b"anew"]
    assert link.dropped == len(b"during\nanew\n")
    link.mend()
    await line.is_reset()
    assert await (await dial(link)).ask(b"after") == b"after"


async def test_delay_is_felt_both_ways_and_nothing_is_lost(link: Proxy, dial: Dial) -> None:
    """An answer takes twice the delay."""
    line = await dial(link)
    link.delay(_WITHHELD_SECONDS)
    loop = asyncio.get_running_loop()
    asked = loop.time()
    assert await line.ask(b"one") == b"one"
    assert loop.time() - asked >= 2 * _WITHHELD_SECONDS
    link.mend()
    assert await line.ask(b"two") == b"two"


async def test_a_server_that_is_away_is_away_behind_the_proxy_too(dial: Dial) -> None:
    """Who connects is reset."""
    async with Echo().serving() as port:
        pass
    async with Proxy(port) as link:
        await (await dial(link)).is_reset()


async def test_clients_of_a_broker_stay_with_its_proxy(broker: AnyBroker) -> None:
    """A broker tells its clients where it is; were they not told of the proxy, its faults would do nothing."""
    await broker.create_topics("proxied")
    async with KafkaProxy(*(int(place.rpartition(":")[2]) for place in broker.bootstrap.split(","))) as link:
        producer = AIOKafkaProducer(bootstrap_servers=link.address, acks="all", request_timeout_ms=2000)
        await producer.start()
        try:
            await producer.send_and_wait("proxied", b"before", partition=0)
            assert all(f"{node.host}:{node.port}" in link.address for node in producer.client.cluster.brokers())
            link.cut()
            with pytest.raises(KafkaError):
                await producer.send_and_wait("proxied", b"during", partition=0)
            link.mend()
            await producer.send_and_wait("proxied", b"after", partition=0)
        finally:
            await producer.stop()
