"""Kafka: where it is, how to be let in, and why it does not let us in; all our Kafka clients are made of this.

    kafka = Kafka("kafka-1:9093", security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-512", username="u", ...)
    producer = AIOKafkaProducer(**kafka.producer(), linger_ms=5)     # every replica has what it says is sent
    consumer = AIOKafkaConsumer(**kafka.client(), group_id=...)
    denial = await kafka.denial()                                    # after a client could not connect

`workers/kafka.py` makes one from the settings, which have checked that its parts fit together.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from aiokafka import AIOKafkaProducer
from aiokafka.abc import AbstractTokenProvider
from aiokafka.conn import AIOKafkaConnection, OAuthAuthenticator, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
    for_code,
)
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from typing_extensions import override

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]

LARGEST = 64 * 1024 * 1024
"""Bytes of a record that our side lets pass: the broker decides what is too large for it."""

_ASK_SECONDS = 5
_TOKEN_SECONDS = 20
_SAID_CHARACTERS = 300
_REFUSALS = (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)


class TokenError(KafkaError):  # type: ignore[misc]  # aiokafka has no type hints
    """There is no token for OAUTHBEARER. A KafkaError, for aiokafka's clients survive no others here."""


@dataclass(frozen=True)
class Denial:
    """Why Kafka does not let us in."""

    why: str
    final: bool
    """Asking again is of no use until somebody has changed a setting, or the broker's."""


@dataclass(frozen=True)
class Kafka:
    """How to reach Kafka. Paths are PEM files; secrets stand in no repr."""

    bootstrap: str
    """host:port, comma separated."""
    idempotence: bool = True
    """The broker has idempotent producers; the embedded one has not."""
    security_protocol: SecurityProtocol = "PLAINTEXT"
    tls_ca: Path | None = None
    """Who may vouch for the brokers; without it, whom this machine trusts."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_key_password: str | None = field(default=None, repr=False)
    sasl_mechanism: SaslMechanism | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    token_command: str | None = field(default=None, repr=False)

    def client(self) -> dict[str, object]:
        """The arguments that all of aiokafka's clients take: where, and how to be let in."""
        return {"bootstrap_servers": self.bootstrap, **self._security}

    def producer(self) -> dict[str, object]:
        """The arguments of a producer: what it says is sent is on every replica, once where the broker can."""
        return {**self.client(), "acks": "all", "enable_idempotence": self.idempotence}

    async def connected_producer(self, **options: object) -> AIOKafkaProducer:
        """A producer that is connected; with further options of aiokafka's.

        Raises:
            KafkaError: it can't connect; nothing is left open.
        """
        producer = AIOKafkaProducer(**self.producer(), **options)
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer

    async def denial(self) -> Denial | None:
        """Why Kafka does not let us in; None when it does, or when it is away.

        aiokafka's clients say of every failure that they are "unable to bootstrap", so this asks the brokers once more.
        """
        found: Denial | None = None
        for server in self.bootstrap.split(","):
            host, _, port = server.strip().rpartition(":")
            denial = await self._denied_by(host.strip("[]"), int(port)) if port.isdecimal() else None
            if denial is None:
                continue
            if denial.final:
                return denial
            found = denial
        return found

    async def _denied_by(self, host: str, port: int) -> Denial | None:
        if not await _listens(host, port):
            return None
        try:
            async with asyncio.timeout(_ASK_SECONDS + _TOKEN_SECONDS):
                connection = await create_conn(host, port, request_timeout_ms=_ASK_SECONDS * 1000, **self._security)
                try:
                    await connection.send(MetadataRequest([]))
                    refused = self.idempotence and (await connection.send(InitProducerIdRequest(None, 0))).error_code
                finally:
                    connection.close()
        except (*_REFUSALS, TokenError, ssl.SSLError) as error:
            return Denial(self._why(error), final=True)
        except (KafkaError, OSError, TimeoutError):
            hint = f"it takes our connection and does not answer; does it speak {self.security_protocol} on this port?"
            return Denial(hint, final=False)
        no_ids = for_code(refused)
        if refused and not no_ids.retriable:
            why = f"it has no idempotent producers ({no_ids.__name__}); PERENNIAL_KAFKA_IDEMPOTENCE=false"
            return Denial(why, final=False)
        return None

    def _why(self, error: KafkaError | ssl.SSLError) -> str:
        match error:
            case TokenError():
                return str(error.args[0])
            case ssl.SSLCertVerificationError():
                return f"its certificate is not one we trust: {error.verify_message}"
            case ssl.SSLError():
                return f"TLS with it fails: {error.reason or error}"
        said = error.args[0] if error.args and isinstance(error.args[0], str) else type(error).__name__
        return f"it refuses our login by {self.sasl_mechanism}: {said}"

    @cached_property
    def _security(self) -> dict[str, object]:
        arguments: dict[str, object] = {"security_protocol": self.security_protocol}
        if self.security_protocol.endswith("SSL"):
            arguments["ssl_context"] = tls_context(
                self.tls_ca, self.tls_certificate, self.tls_key, self.tls_key_password
            )
        if self.security_protocol.startswith("SASL"):
            arguments |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password,
            }
            if self.sasl_mechanism == "OAUTHBEARER":
                arguments["sasl_oauth_token_provider"] = Token(self.token_file, self.token_command)
        return arguments


def tls_context(
    ca: Path | None, certificate: Path | None, key: Path | None, key_password: str | None
) -> ssl.SSLContext:
    """For connections to brokers whose certificates this CA vouches for, and whose host names these carry.

    Raises:
        OSError: a file can't be read, or holds something else; the message says which.
    """
    with _naming(ca):
        context = ssl.create_default_context(cafile=ca)
    if certificate is not None:
        with _naming(certificate if key is None else key):
            # Without a password, OpenSSL would ask the terminal for one.
            context.load_cert_chain(certificate, key, key_password or "")
    return context


@contextlib.contextmanager
def _naming(file: Path | None) -> Iterator[None]:
    """Errors of the `ssl` module do not say which file they are about."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{file}: {getattr(error, 'reason', None) or error.strerror or error}") from error


class Token(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka has no type hints
    """The token for OAUTHBEARER: what is in a file, or what a command prints, asked anew for every connection.

    So a token may be short-lived: whoever renews the file, or the command, decides. The command is run without a shell.
    """

    def __init__(self, file: Path | None, command: str | None) -> None:
        self._file = file
        self._command = command

    @override
    async def token(self) -> str:
        token = await (self._printed(self._command) if self._command else asyncio.to_thread(self._read))
        if not token or not token.isascii() or len(token.split()) != 1:
            raise TokenError(f"{self._source} gives no token: it has to be one word")
        return token

    @property
    def _source(self) -> str:
        # Arguments may be secrets.
        return f"the token command {shlex.split(self._command)[0]!r}" if self._command else f"the file {self._file}"

    def _read(self) -> str:
        assert self._file is not None
        try:
            return self._file.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise TokenError(f"{self._source} can't be read: {error.strerror}") from error

    async def _printed(self, command: str) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *shlex.split(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise TokenError(f"{self._source} can't be run: {error.strerror}") from error
        try:
            async with asyncio.timeout(_TOKEN_SECONDS):
                printed, said = await process.communicate()
        except TimeoutError as error:
            raise TokenError(f"{self._source} has not ended within {_TOKEN_SECONDS} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            complaint = said.decode(errors="replace").strip()[-_SAID_CHARACTERS:]
            raise TokenError(f"{self._source} has ended with status {process.returncode}: {complaint}")
        return printed.decode(errors="replace").strip()


async def _listens(host: str, port: int) -> bool:
    """Whether anybody takes a connection there."""
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    except (OSError, TimeoutError):
        return False
    return True


class _TokenAuthenticator(OAuthAuthenticator):  # type: ignore[misc]  # aiokafka has no type hints
    """Asks for the reason when a token is refused (RFC 7628, 3.2.3).

    aiokafka 0.14 takes the refusal for an acceptance: its clients then send their first request into a login that is
    still going on, and wait for the answer, without an error and without an end.
    """

    @override
    async def step(self, payload: bytes | None) -> tuple[bytes, bool] | None:
        if self._token_sent and payload:
            return b"\x01", True
        step: tuple[bytes, bool] | None = await super().step(payload)
        return step


def _authenticator_oauth(connection: AIOKafkaConnection) -> _TokenAuthenticator:
    return _TokenAuthenticator(sasl_oauth_token_provider=connection._sasl_oauth_token_provider)  # noqa: SLF001


AIOKafkaConnection.authenticator_oauth = _authenticator_oauth
