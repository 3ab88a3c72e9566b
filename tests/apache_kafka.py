"""Apache Kafka for tests: brokers in KRaft mode, from Maven's jars, on free ports; to be used as `servers.Broker` is.

    with ApacheKafka() as kafka: ...                # one node; kafka.bootstrap, kafka.create_topics(...)
    with ApacheKafka(nodes=3) as kafka:             # each topic on all three
        kafka.kill(2); kafka.start(2)               # SIGKILL, and again on the same ports: it remembers
        await kafka.move_leaders("orders")
    with ApacheKafka(guarded=True) as kafka:        # also listeners with TLS and logins
        kafka.sasl_tls, kafka.certificates.ca

It needs Java 17 and Maven; the jars named by tests/kafka/pom.xml are fetched once and kept where Maven keeps them.
A node is one process, broker and controller at once, and ends by its process id.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.admin import AlterPartitionReassignmentsRequest
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.types import Array, Int8, Int16, Int32, Schema, String
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from servers import eventually
from typing_extensions import override

from workers.ports import HOST, free_ports

USER, PASSWORD = "perennial", "correct horse"
"""Whom the guarded listeners let in, by PLAIN and SCRAM."""

_POM = Path(__file__).parent / "kafka" / "pom.xml"
_START_SECONDS = 90
_JVM = ("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true")
_LOGGING = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
)
_STARTED = "Kafka Server started"
_JAAS = "org.apache.kafka.common.security"


class ApacheKafka:
    """A cluster of its own, in a directory of its own, which goes when it ends.

    Args:
        nodes: 1 or 3; topics have as many replicas.
        guarded: also listen with TLS (client certificates wanted), and with logins over TLS and without.
        settings: of the brokers, beside or instead of ours.
    """

    idempotent = True
    """It has idempotent producers."""
    remembers = True
    """What it was told is there when it was killed and is started again."""

    def __init__(self, nodes: int = 1, *, guarded: bool = False, settings: Mapping[str, str] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="perennial-kafka-"))
        self.certificates = Certificates(self._folder)
        listeners = ("PLAINTEXT", "CONTROLLER", *(("SSL", "SASL_SSL", "SASL_PLAINTEXT") if guarded else ()))
        numbers = range(1, nodes + 1)
        free = free_ports({f"{listener} {number}": 0 for number in numbers for listener in listeners})
        self._ports = {number: {of: free[f"{of} {number}"] for of in listeners} for number in numbers}
        if guarded:
            self.certificates.make()
        self._settings = dict(settings or {})
        self._nodes = {number: _Node(number, self._folder, self._properties(number)) for number in numbers}
        self._formatted = False

    # Where ---------------------------------------------------------------------------------------------------------

    @property
    def bootstrap(self) -> str:
        """For everybody."""
        return self._addresses("PLAINTEXT")

    @property
    def tls(self) -> str:
        """For those with a client certificate."""
        return self._addresses("SSL")

    @property
    def sasl_tls(self) -> str:
        """For those who log in, by any mechanism, over TLS."""
        return self._addresses("SASL_SSL")

    @property
    def sasl(self) -> str:
        """For those who log in without TLS."""
        return self._addresses("SASL_PLAINTEXT")

    def _addresses(self, listener: str) -> str:
        return ",".join(f"{HOST}:{ports[listener]}" for ports in self._ports.values())

    # Life ----------------------------------------------------------------------------------------------------------

    def start(self, node: int | None = None) -> None:
        """Start a node, or all, and wait until they serve."""
        if not self._formatted:
            cluster = base64.urlsafe_b64encode(uuid4().bytes).decode().rstrip("=")
            formatting = [one.format(cluster) for one in self._nodes.values()]
            for one in formatting:
                said, _ = one.communicate(timeout=_START_SECONDS)
                assert one.returncode == 0, said.decode()
            self._formatted = True
        started = self._chosen(node)
        for one in started:
            one.launch()
        for one in started:
            one.wait_started()

    def kill(self, node: int | None = None) -> None:
        """SIGKILL to a node, or to all that run. What is on their disks stays."""
        for one in self._chosen(node):
            one.kill()

    def stop(self, node: int) -> None:
        """SIGTERM: it hands its leaderships over, and ends."""
        self._nodes[node].stop()

    def suspend(self, node: int | None = None) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        for one in self._chosen(node):
            one.signal(signal.SIGSTOP)

    def resume(self, node: int | None = None) -> None:
        """SIGCONT."""
        for one in self._chosen(node):
            one.signal(signal.SIGCONT)

    def log(self, node: int) -> str:
        """What a node has said since it was last started."""
        return self._nodes[node].log.read_text(errors="replace")

    def _chosen(self, node: int | None) -> list[_Node]:
        return list(self._nodes.values()) if node is None else [self._nodes[node]]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    # Topics --------------------------------------------------------------------------------------------------------

    async def create_topics(self, *topics: str, partitions: int = 4) -> None:
        """Create those that are not there, and wait until every node that runs knows them."""
        async with self.admin() as admin:
            await admin.create_topics([NewTopic(topic, partitions, len(self._nodes)) for topic in topics])

            async def known() -> bool:
                for node in self._running():
                    described = [await self._described(admin, node, topic) for topic in topics]
                    if any(len(found) < partitions or min(led[0] for led in found.values()) < 1 for found in described):
                        return False
                return True

            await eventually(known)

    async def delete_topics(self, *topics: str) -> None:
        """These; without any named all, save Kafka's own, so that the next test begins with none."""
        async with self.admin() as admin:
            doomed = topics or await self._own_topics(admin)
            if doomed:
                await admin.delete_topics(list(doomed))

            async def gone() -> bool:
                return not set(doomed) & set(await self._own_topics(admin))

            await eventually(gone)

    async def leaders(self, topic: str) -> dict[int, int]:
        """The node that leads, by partition; 0 or less where none does."""
        return {partition: replicas[0] for partition, replicas in (await self._replicas(topic)).items()}

    async def move_leaders(self, topic: str) -> None:
        """Let each partition be led by the next of its replicas."""
        before = await self._replicas(topic)
        after = {partition: [*others, leader] for partition, (leader, *others) in before.items()}
        async with self.admin() as admin:
            wanted = [(topic, [(partition, replicas, {}) for partition, replicas in after.items()], {})]
            answer = await admin._send_to_controller(AlterPartitionReassignmentsRequest(30_000, wanted, {}))
            assert answer.error_code == 0, answer
            elected = await admin._send_to_controller(_ElectLeaders([(topic, list(after))]))
            assert elected.error_code == 0, elected

        async def moved() -> bool:
            leaders = await self.leaders(topic)
            return all(leaders[partition] == replicas[0] for partition, replicas in after.items())

        await eventually(moved)

    async def in_sync(self) -> None:
        """Wait until each node that runs has all of every partition."""
        async with self.admin() as admin:

            async def whole() -> bool:
                answer = await admin._send_request_to_node(self._running()[0], MetadataRequest(None))
                described = [one for topic in answer.to_object()["topics"] for one in topic["partitions"]]
                return all(set(one["isr"]) == set(self._running()) for one in described)

            await eventually(whole, 60)

    async def _replicas(self, topic: str) -> dict[int, list[int]]:
        """The nodes that have a partition, its leader first."""
        async with self.admin() as admin:
            return await self._described(admin, self._running()[0], topic)

    @staticmethod
    async def _described(admin: AIOKafkaAdminClient, node: int, topic: str) -> dict[int, list[int]]:
        """As one node has it: the nodes that have a partition, its leader first."""
        answer = await admin._send_request_to_node(node, MetadataRequest([topic]))
        return {
            one["partition"]: [one["leader"], *(node for node in one["replicas"] if node != one["leader"])]
            for described in answer.to_object()["topics"]
            for one in described["partitions"]
        }

    def _running(self) -> list[int]:
        return [number for number, node in self._nodes.items() if node.runs]

    @staticmethod
    async def _own_topics(admin: AIOKafkaAdminClient) -> list[str]:
        return [topic for topic in await admin.list_topics() if not topic.startswith("__")]

    @contextlib.asynccontextmanager
    async def admin(self) -> Any:
        """An admin client."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        try:
            await admin.start()
            yield admin
        finally:
            await admin.close()

    # Settings ------------------------------------------------------------------------------------------------------

    def _properties(self, number: int) -> dict[str, str]:
        nodes, ports = len(self._ports), self._ports[number]
        addresses = {listener: f"{listener}://{HOST}:{port}" for listener, port in ports.items()}
        voters = (f"{other}@{HOST}:{of['CONTROLLER']}" for other, of in self._ports.items())
        own = {
            "process.roles": "broker,controller",
            "node.id": str(number),
            "controller.quorum.voters": ",".join(voters),
            "listeners": ",".join(addresses.values()),
            "advertised.listeners": ",".join(to for name, to in addresses.items() if name != "CONTROLLER"),
            "listener.security.protocol.map": ",".join(
                f"{name}:{'PLAINTEXT' if name == 'CONTROLLER' else name}" for name in ports
            ),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(self._folder / f"node-{number}"),
            "auto.create.topics.enable": "false",
            "auto.leader.rebalance.enable": "false",  # leaders move when a test says so
            "default.replication.factor": str(nodes),
            "min.insync.replicas": str(max(1, nodes - 1)),
            "offsets.topic.num.partitions": "4",
            "offsets.topic.replication.factor": str(nodes),
            "transaction.state.log.num.partitions": "4",
            "transaction.state.log.replication.factor": str(nodes),
            "transaction.state.log.min.isr": str(max(1, nodes - 1)),
            "group.initial.rebalance.delay.ms": "0",
            # As soon as the embedded broker, so that tests of either wait alike.
            "broker.session.timeout.ms": "6000",
            "group.min.session.timeout.ms": "1000",
            "log.cleaner.dedupe.buffer.size": str(8 * 1024 * 1024),
            "message.max.bytes": str(16 * 1024 * 1024),
        }
        if "SSL" in ports:
            own |= self._guards()
        return own | self._settings

    def _guards(self) -> dict[str, str]:
        mechanisms = "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER"
        own = {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.certificates.server),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.certificates.ca),
            "listener.name.ssl.ssl.client.auth": "required",
            "sasl.enabled.mechanisms": mechanisms,
        }
        for listener in ("sasl_ssl", "sasl_plaintext"):
            of = f"listener.name.{listener}"
            plain = f'{_JAAS}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
            own |= {
                f"{of}.plain.sasl.jaas.config": plain,
                f"{of}.scram-sha-256.sasl.jaas.config": f"{_JAAS}.scram.ScramLoginModule required;",
                f"{of}.scram-sha-512.sasl.jaas.config": f"{_JAAS}.scram.ScramLoginModule required;",
                f"{of}.oauthbearer.sasl.jaas.config": f"{_JAAS}.oauthbearer.OAuthBearerLoginModule required;",
                f"{of}.oauthbearer.sasl.server.callback.handler.class": (
                    f"{_JAAS}.oauthbearer.internals.unsecured.OAuthBearerUnsecuredValidatorCallbackHandler"
                ),
            }
        return own


class _Node:
    """One process."""

    def __init__(self, number: int, folder: Path, properties: Mapping[str, str]) -> None:
        self.number = number
        self._properties = folder / f"node-{number}.properties"
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        self.log = folder / f"node-{number}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def format(self, cluster: str) -> subprocess.Popen[bytes]:
        """Begin to make its directory, with the users that log in by SCRAM."""
        users = (f"{mechanism}=[name={USER},password={PASSWORD}]" for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"))
        arguments = [f"--cluster-id={cluster}", "--config", str(self._properties)]  # it may begin with a dash
        for user in users:
            arguments += ["--add-scram", user]
        return subprocess.Popen(
            _java("kafka.tools.StorageTool", "format", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def launch(self) -> None:
        with self.log.open("wb") as log:
            command = _java("kafka.Kafka", str(self._properties))
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_started(self) -> None:
        assert self._process
        deadline = time.monotonic() + _START_SECONDS
        while _STARTED not in (said := self.log.read_text(errors="replace")):
            assert self._process.poll() is None, f"Kafka has ended with {self._process.returncode}: {said[-3000:]}"
            assert time.monotonic() < deadline, f"Kafka does not start: {said[-3000:]}"
            time.sleep(0.05)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        if self._process is not None and self.runs:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        assert self._process
        self._process.terminate()
        self._process.wait(timeout=_START_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)


def _java(main: str, *arguments: str) -> list[str]:
    java = shutil.which("java")
    assert java, "Apache Kafka needs Java 17 (on Debian: openjdk-17-jre-headless)"
    return [java, *_JVM, *_LOGGING, "-cp", _class_path(), main, *arguments]


@functools.cache
def _class_path() -> str:
    """The jars, which Maven fetches where it has not before."""
    maven = shutil.which("mvn")
    assert maven, "Apache Kafka is fetched by Maven (on Debian: maven)"
    with tempfile.NamedTemporaryFile(prefix="perennial-kafka-") as file:
        goal = [
            "--batch-mode",
            "--quiet",
            f"--file={_POM}",
            "dependency:build-classpath",
            f"-Dmdep.outputFile={file.name}",
        ]
        with (Path(tempfile.gettempdir()) / f"perennial-maven-{os.getuid()}.lock").open("w") as lock:
            # One at a time: Maven does not keep two of itself from writing the same jar.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for offline in (["--offline"], []):
                done = subprocess.run([maven, *offline, *goal], capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    return Path(file.name).read_text().strip()
    raise AssertionError(f"Maven can't fetch Apache Kafka:\n{done.stdout}{done.stderr}")


# What aiokafka has no request for --------------------------------------------------------------------------------


class _ElectLeadersResponse(Response):
    API_KEY, API_VERSION = 43, 1
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        (
            "results",
            Array(
                ("topic", String("utf-8")),
                ("partitions", Array(("partition", Int32), ("error_code", Int16), ("message", String("utf-8")))),
            ),
        ),
    )


class _ElectLeadersStruct(RequestStruct):
    API_KEY, API_VERSION = 43, 1
    RESPONSE_TYPE = _ElectLeadersResponse
    SCHEMA = Schema(
        ("election_type", Int8),
        ("topics", Array(("topic", String("utf-8")), ("partitions", Array(Int32)))),
        ("timeout_ms", Int32),
    )


class _ElectLeaders(Request[_ElectLeadersStruct]):
    """Make the first of its replicas lead each of these partitions."""

    API_KEY = 43

    def __init__(self, topics: list[tuple[str, list[int]]]) -> None:
        self._topics = topics

    @override
    def build(self, request_struct_class: type[_ElectLeadersStruct]) -> _ElectLeadersStruct:
        preferred = 0
        return request_struct_class(preferred, self._topics, 30_000)


# Who they are ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """PEM files of a CA of the test's own, and of whom it vouches for."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def server(self) -> Path:
        return self.folder / "server.pem"

    @property
    def client(self) -> Path:
        return self.folder / "client.pem"

    @property
    def client_key(self) -> Path:
        """Encrypted, with the password `PASSWORD`."""
        return self.folder / "client.key"

    @property
    def stranger(self) -> Path:
        """Another CA, which vouches for nobody."""
        return self.folder / "stranger.pem"

    def make(self) -> None:
        """Make all of them."""
        ca_key, ca = _certificate("the tests' CA")
        self.ca.write_bytes(_pem(ca))
        self.stranger.write_bytes(_pem(_certificate("a stranger")[1]))
        key, certificate = _certificate("broker", (ca_key, ca))
        self.server.write_bytes(_key_pem(key) + _pem(certificate))
        key, certificate = _certificate(USER, (ca_key, ca))
        self.client.write_bytes(_pem(certificate))
        self.client_key.write_bytes(_key_pem(key, PASSWORD))


def _certificate(
    name: str, issuer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None = None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    signer, signed_by = issuer[0] if issuer else key, issuer[1].subject if issuer else subject
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
    )
    return key, builder.sign(signer, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey, password: str | None = None) -> bytes:
    secrecy: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        secrecy = serialization.BestAvailableEncryption(password.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secrecy)


def unsecured_token(user: str = USER, seconds: float = 3600) -> str:
    """A token as Kafka's own test validator takes it: a JSON web token that nobody has signed."""
    now = time.time()
    parts = ({"alg": "none"}, {"sub": user, "iat": now - 1, "exp": now + seconds})
    encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    return f"{'.'.join(encoded)}."
