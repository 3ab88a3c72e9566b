"""TLS and logins, on Apache Kafka: whatever of ours speaks to it gets in as the settings say, or says why not."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from apache_kafka import PASSWORD, USER, ApacheKafka, unsecured_token
from recorders import ORDERS, QUICK, Rig, numbered
from servers import TemporalServer, eventually
from stack import PERENNIAL, STORE, run
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment
from traffic import letter

from activities.publish import Publish
from workers import kafka, topics
from workers.doctor import examine
from workers.exits import CommandError
from workers.ingest import Ingest, IngestError
from workers.settings import PREFIX, Settings
from workers.topics import Prepared
from workflows import names
from workflows.errors import Remedy
from workflows.events import Event, Outgoing
from workflows.messages import PublishRequest

pytestmark = pytest.mark.kafka

WRONG = "wrong battery"


@pytest.fixture(scope="session")
def guarded() -> Iterator[ApacheKafka]:
    """Apache Kafka with a listener for each way in."""
    with ApacheKafka(guarded=True) as cluster:
        yield cluster


@pytest.fixture
async def empty(guarded: ApacheKafka) -> ApacheKafka:
    """It, without others' topics."""
    await guarded.delete_topics()
    await guarded.create_topics(names.EVENTS_TOPIC, names.REPLIES_TOPIC, names.ACTIVITY_TOPIC, names.DEAD_LETTER_TOPIC)
    return guarded


def by(cluster: ApacheKafka, mechanism: str, *, password: str = PASSWORD, **changes: Any) -> dict[str, Any]:
    """The settings for a login over TLS."""
    return {
        "kafka_bootstrap": cluster.sasl_tls,
        "kafka_security_protocol": "SASL_SSL",
        "kafka_tls_ca": cluster.certificates.ca,
        "kafka_sasl_mechanism": mechanism,
        "kafka_sasl_username": USER,
        "kafka_sasl_password": password,
    } | changes


def by_token(cluster: ApacheKafka, **source: Any) -> dict[str, Any]:
    """The settings for a login with a token over TLS."""
    return by(cluster, "OAUTHBEARER", **source) | {"kafka_sasl_username": None, "kafka_sasl_password": None}


def ways(cluster: ApacheKafka, folder: Path) -> dict[str, dict[str, Any]]:
    """All ways in."""
    token = folder / "token"
    token.write_text(unsecured_token() + "\n")
    printing = shlex.join([sys.executable, "-c", "print(open(__import__('sys').argv[1]).read())", str(token)])
    certificate = {
        "kafka_tls_certificate": cluster.certificates.client,
        "kafka_tls_key": cluster.certificates.client_key,
        "kafka_tls_key_password": PASSWORD,
    }
    plain = {"kafka_bootstrap": cluster.sasl, "kafka_security_protocol": "SASL_PLAINTEXT", "kafka_tls_ca": None}
    return {
        "SCRAM-SHA-512": by(cluster, "SCRAM-SHA-512"),
        "SCRAM-SHA-256": by(cluster, "SCRAM-SHA-256"),
        "PLAIN": by(cluster, "PLAIN"),
        "OAUTHBEARER by file": by_token(cluster, kafka_oauth_token_file=token),
        "OAUTHBEARER by command": by_token(cluster, kafka_oauth_token_command=printing),
        "SCRAM-SHA-512 without TLS": by(cluster, "SCRAM-SHA-512", **plain),
        "a client certificate": {
            "kafka_bootstrap": cluster.tls,
            "kafka_security_protocol": "SSL",
            "kafka_tls_ca": cluster.certificates.ca,
            **certificate,
        },
    }


WAYS = [
    *("SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN", "OAUTHBEARER by file", "OAUTHBEARER by command"),
    *("SCRAM-SHA-512 without TLS", "a client certificate"),
]


def wrongs(cluster: ApacheKafka, folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Settings that do not get in, and what is said about them."""
    stale = folder / "stale"
    stale.write_text(unsecured_token(seconds=-60))
    failing = shlex.join([sys.executable, "-c", "raise SystemExit('the vault is sealed')"])
    refused = "it refuses our login by"
    sealed = by_token(cluster, kafka_oauth_token_command=failing)
    stranger = by(cluster, "SCRAM-SHA-512", kafka_tls_ca=cluster.certificates.stranger)
    return {
        "a wrong password, SCRAM": (by(cluster, "SCRAM-SHA-512", password=WRONG), f"{refused} SCRAM-SHA-512: "),
        "a wrong password, PLAIN": (by(cluster, "PLAIN", password=WRONG), f"{refused} PLAIN: "),
        "an unknown user": (by(cluster, "SCRAM-SHA-256", kafka_sasl_username="nobody"), f"{refused} SCRAM-SHA-256: "),
        "a token that has expired": (by_token(cluster, kafka_oauth_token_file=stale), f"{refused} OAUTHBEARER: "),
        "no token": (by_token(cluster, kafka_oauth_token_file=folder / "none"), "none can't be read: No such file"),
        "a token command that fails": (sealed, "has ended with status 1: the vault is sealed"),
        "a CA that does not know the broker": (stranger, "its certificate is not one we trust: "),
        "a login where none is asked": (
            by(
                cluster,
                "SCRAM-SHA-512",
                kafka_bootstrap=cluster.bootstrap,
                kafka_security_protocol="SASL_PLAINTEXT",
                kafka_tls_ca=None,
            ),
            f"{refused} SCRAM-SHA-512: ",
        ),
    }


WRONGS = [
    *("a wrong password, SCRAM", "a wrong password, PLAIN", "an unknown user", "a token that has expired", "no token"),
    *("a token command that fails", "a CA that does not know the broker", "a login where none is asked"),
]


def variables(settings: dict[str, Any]) -> dict[str, str]:
    """As in a process's environment."""
    return {PREFIX + name.upper(): str(value) for name, value in settings.items() if value is not None}


def reply(number: int) -> Outgoing:
    """The number-th reply of an agent."""
    agent = "agent/store/desk/order-42"
    return Outgoing(
        topic=names.REPLIES_TOPIC,
        id=names.reply_id(agent, number, 0),
        type=names.REPLY_TYPE,
        source=agent,
        subject="order-42",
        time=datetime(2026, 1, 2, tzinfo=UTC),
        extensions={"tenant": "store", "agent": "desk"},
        data={"text": f"réponse {number}"},
    )


async def publish(settings: Settings, message: Outgoing) -> None:
    """Run the activity as Temporal does."""
    async with aclosing(Publish(kafka.reached_by(settings))) as activity:
        await ActivityEnvironment().run(activity.publish, PublishRequest(messages=[message]))


async def first(settings: Settings, topic: str) -> Event:
    """The first event that `perennial tail` shows."""
    async with asyncio.timeout(60), aclosing(topics.watch(settings, [topic], from_beginning=True)) as events:
        return await anext(events)


async def count(cluster: ApacheKafka, topic: str) -> int:
    """How many records are on a topic, asked of the open listener."""
    async with cluster.admin() as admin:
        assert topic in await admin.list_topics()
    from aiokafka import AIOKafkaConsumer, TopicPartition  # noqa: PLC0415

    consumer = AIOKafkaConsumer(bootstrap_servers=cluster.bootstrap)
    await consumer.start()
    try:
        return sum((await consumer.end_offsets([TopicPartition(topic, number) for number in range(4)])).values())
    finally:
        await consumer.stop()


@pytest.fixture
async def scram_rig(temporal_server: TemporalServer, empty: ApacheKafka) -> AsyncIterator[Rig]:
    """Ingest by SCRAM over TLS; the test's own producer goes in by the open door."""
    rig = Rig(temporal_server, empty, **by(empty, "SCRAM-SHA-512"))
    async with rig.recording():
        yield rig


async def test_by_scram_over_tls_events_go_the_whole_road(scram_rig: Rig, empty: ApacheKafka) -> None:
    """Issue 3, 8: send, ingest with its dead letters, publish and tail; nobody uses another listener unasked."""
    sent = [Prepared("here:1", letter("customer-1", "Hello?"), b"customer-1", "1")]
    async with scram_rig.ingesting():
        for number in range(30):
            await scram_rig.order("a", number)
        assert await scram_rig.arrive("a", 30) == numbered("a", range(30))
        await topics.send(scram_rig.settings, names.EVENTS_TOPIC, sent)
        [unknown] = await scram_rig.dead_letters(1)  # the recorder's ingest knows no customer service
    assert (unknown.reason, unknown.original.value) == ("unknown_agent", sent[0].value)
    assert await scram_rig.committed(ORDERS) == 30
    await publish(scram_rig.settings, reply(1))
    assert (await first(scram_rig.settings, names.REPLIES_TOPIC)).data == {"text": "réponse 1"}


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_in_leads_in(empty: ApacheKafka, tmp_path: Path, way: str) -> None:
    """Issue 3, 8: what the settings offer, works: producers, a consumer and an admin client get in."""
    settings = Settings(**ways(empty, tmp_path)[way])
    assert await kafka.reached_by(settings).denial() is None
    text = f"by {way}"
    await topics.send(settings, names.EVENTS_TOPIC, [Prepared("here:1", letter("c", text), b"c", str(uuid4()))])
    assert (await first(settings, names.EVENTS_TOPIC)).data == {"text": text}
    await publish(settings, reply(7))
    assert (await first(settings, names.REPLIES_TOPIC)).id == reply(7).id


@pytest.mark.parametrize("wrong", WRONGS)
async def test_who_is_not_let_in_says_why(
    temporal_server: TemporalServer, empty: ApacheKafka, tmp_path: Path, wrong: str
) -> None:
    """P14, P4: ingest ends, commands fail, the activity is retried, each with the reason; there is no dead letter."""
    wanting, why = wrongs(empty, tmp_path)[wrong]
    rig = Rig(temporal_server, empty, **wanting)
    async with rig.recording():
        await rig.order("a", 1)
        with pytest.raises(IngestError) as ended:
            await Ingest(await rig.connect(), rig.settings, [rig.spec], limits=QUICK).run(asyncio.Event())
    with pytest.raises(CommandError) as failed:
        await topics.topics(rig.settings)
    with pytest.raises(ApplicationError) as retried:
        await publish(rig.settings, reply(1))
    assert (retried.value.type, retried.value.non_retryable) == (Remedy.RETRY_LATER, False)
    for said in (str(ended.value), str(failed.value), retried.value.message):
        assert why in said
        assert rig.settings.kafka_bootstrap in said
        assert PASSWORD not in said
        assert WRONG not in said
    assert await count(empty, names.DEAD_LETTER_TOPIC) == 0


@pytest.mark.parametrize("wrong", ["TLS to a port without", "no TLS to a port with it", "no login", "no certificate"])
async def test_a_broker_that_hangs_up_is_asked_again_and_the_hint_is_given(empty: ApacheKafka, wrong: str) -> None:
    """P14, P5: it may be about to stop, so ingest goes on asking; but what is said points to the likely cause."""
    tls = {"kafka_security_protocol": "SSL", "kafka_tls_ca": empty.certificates.ca}
    wrongs: dict[str, dict[str, Any]] = {
        "TLS to a port without": by(empty, "PLAIN", kafka_bootstrap=empty.bootstrap),
        "no TLS to a port with it": {"kafka_bootstrap": empty.tls},
        "no login": {"kafka_bootstrap": empty.sasl},
        "no certificate": tls | {"kafka_bootstrap": empty.tls},
    }
    settings = Settings(**wrongs[wrong])
    denial = await kafka.reached_by(settings).denial()
    assert denial
    hint = (
        f"it takes our connection and does not answer; does it speak {settings.kafka_security_protocol} on this port?"
    )
    assert denial.final or hint == denial.why
    with pytest.raises(CommandError) as failed:
        await topics.topics(settings)
    assert denial.why in str(failed.value)


async def test_with_a_wrong_password_processes_and_commands_end_with_status_1(
    temporal_server: TemporalServer, empty: ApacheKafka, tmp_path: Path
) -> None:
    """P14: one sentence, the right status, and the password in no output."""
    wrong = variables(by(empty, "SCRAM-SHA-512", password=WRONG)) | {
        "PERENNIAL_TEMPORAL_ADDRESS": temporal_server.address,
        "PERENNIAL_SPECS": str(STORE),
        "PERENNIAL_STATE_DIR": str(tmp_path),
    }
    file = tmp_path / "events.jsonl"
    file.write_bytes(letter("customer-1", "Hello?"))
    for command in (["worker", "ingest"], ["send", str(file)], ["tail"], ["doctor"]):
        ended = await run(str(PERENNIAL), *command, variables=wrong)
        said = ended.out + ended.err
        assert ended.status == 1, said
        assert "it refuses our login by SCRAM-SHA-512" in " ".join(said.split()), command
        assert WRONG not in said
        assert "Traceback" not in said
    assert await count(empty, names.DEAD_LETTER_TOPIC) == 0


async def test_doctor_says_who_refuses_and_what_to_do(empty: ApacheKafka, tmp_path: Path) -> None:
    """P14: "does not let us in" is another remedy than "does not answer"."""
    wrong = by(empty, "PLAIN", password=WRONG)
    settings = Settings(**wrong, temporal_address="127.0.0.1:1", specs=STORE, state_dir=tmp_path)
    checks = {check.what: check for check in await examine(settings)}
    assert "it refuses our login by PLAIN" in checks["Kafka"].found
    assert checks["Kafka"].remedy == "Check the PERENNIAL_KAFKA_* settings"


async def test_a_token_that_is_renewed_is_used_for_the_next_connection(empty: ApacheKafka, tmp_path: Path) -> None:
    """Tokens may be short-lived: the same client goes on with the file's next one."""
    token = tmp_path / "token"
    token.write_text(unsecured_token(seconds=-60))
    settings = Settings(**by_token(empty, kafka_oauth_token_file=token))
    async with aclosing(Publish(kafka.reached_by(settings))) as activity:
        with pytest.raises(ApplicationError, match="it refuses our login by OAUTHBEARER"):
            await ActivityEnvironment().run(activity.publish, PublishRequest(messages=[reply(1)]))
        token.write_text(unsecured_token())
        await ActivityEnvironment().run(activity.publish, PublishRequest(messages=[reply(1)]))
    assert (await first(settings, names.REPLIES_TOPIC)).id == reply(1).id


async def test_a_login_that_is_refused_later_ends_ingest(
    temporal_server: TemporalServer, empty: ApacheKafka, tmp_path: Path
) -> None:
    """P4: it is no outage to wait for; a supervisor's restart says so at once. Nothing is lost or dead-lettered."""
    token = tmp_path / "token"
    token.write_text(unsecured_token())
    rig = Rig(temporal_server, empty, **by_token(empty, kafka_oauth_token_file=token))
    async with rig.recording():
        ingest = Ingest(await rig.connect(), rig.settings, [rig.spec], limits=QUICK)
        running = asyncio.create_task(ingest.run(asyncio.Event()))
        await rig.order("a", 1)
        await rig.arrive("a", 1)
        token.write_text(unsecured_token(seconds=-60))
        empty.kill()
        empty.start()
        await eventually(running.done, seconds=90)
        with pytest.raises(IngestError, match="refuses our login by OAUTHBEARER"):
            running.result()
        await rig.order("a", 2)
        token.write_text(unsecured_token())
        async with rig.ingesting():
            assert list(dict.fromkeys(await rig.arrive("a", 2, seconds=45))) == numbered("a", [1, 2])
    assert await count(empty, names.DEAD_LETTER_TOPIC) == 0


def test_secrets_stand_in_no_repr(guarded: ApacheKafka) -> None:
    """Logs and tracebacks show settings; they show no password."""
    settings = Settings(**by(guarded, "PLAIN"))
    for shown in (
        repr(settings),
        str(settings),
        repr(kafka.reached_by(settings)),
        json.dumps(str(settings.model_dump())),
    ):
        assert PASSWORD not in shown
