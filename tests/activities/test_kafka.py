"""The token for OAUTHBEARER, and why Kafka does not let us in; on Apache Kafka: integration/test_kafka_security.py."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path

import pytest
from aiokafka.conn import AIOKafkaConnection
from servers import AnyBroker

from activities.kafka import Kafka, Token, TokenError, _TokenAuthenticator


def python(code: str, *arguments: str) -> str:
    """A command line that runs this."""
    return shlex.join([sys.executable, "-c", code, *arguments])


async def test_a_token_is_read_anew_each_time(tmp_path: Path) -> None:
    """Whoever renews the file need not tell us."""
    file = tmp_path / "token"
    token = Token(file, None)
    for written in ("first\n", "second"):
        file.write_text(written)
        assert await token.token() == written.strip()


async def test_a_token_is_what_the_command_prints(tmp_path: Path) -> None:
    """It is run without a shell, and what it says beside does not matter."""
    said = "import sys; print('$HOME'); print('renewed', file=sys.stderr)"
    assert await Token(None, python(said)).token() == "$HOME"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("no-such-command-here --secret x", "'no-such-command-here' can't be run: No such file or directory"),
        (python("raise SystemExit('the vault is sealed')"), "has ended with status 1: the vault is sealed"),
        (python("print()"), "gives no token: it has to be one word"),
        (python("print('two words')"), "gives no token: it has to be one word"),
    ],
)
async def test_a_command_that_gives_no_token_is_told_of(command: str, why: str) -> None:
    """P14: which command, and what it said; never its arguments, nor what it printed."""
    with pytest.raises(TokenError) as failed:
        await Token(None, command).token()
    said = str(failed.value)
    assert why in said
    assert "secret" not in said
    assert "two words" not in said


async def test_a_broker_that_is_away_or_lets_us_in_denies_nothing(broker: AnyBroker) -> None:
    """Nobody is told to correct a setting that is right."""
    assert await Kafka(broker.bootstrap, idempotence=broker.idempotent).denial() is None
    assert await Kafka("127.0.0.1:1,127.0.0.1:2").denial() is None


async def test_a_server_that_is_no_kafka_is_hinted_at() -> None:
    """It takes the connection, and hangs up."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        denial = await Kafka(f"127.0.0.1:{port}").denial()
    assert denial
    assert not denial.final
    assert "does it speak PLAINTEXT on this port?" in denial.why


def test_our_clients_ask_why_a_token_was_refused() -> None:
    """The one thing changed in aiokafka, for all clients of the process."""
    connection = AIOKafkaConnection.__new__(AIOKafkaConnection)
    connection._sasl_oauth_token_provider = Token(None, "true")
    assert isinstance(connection.authenticator_oauth(), _TokenAuthenticator)
