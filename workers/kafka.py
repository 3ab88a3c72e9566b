"""Kafka, as the settings have it: what every Kafka client of a process is made of.

producer = AIOKafkaProducer(**kafka.reached_by(settings).producer())
kafka.heed_refusals(consumer)       # of a group, once it is started and before it subscribes
offset = await kafka.offset_at(consumer, partition, datetime(2026, 11, 1, tzinfo=UTC))
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import GroupLoadInProgressError, for_code
from aiokafka.protocol.commit import OffsetFetchRequest

from activities.kafka import Kafka
from workers.settings import Settings

Start = Literal["earliest", "latest"] | datetime
"""A place in a topic: its first record, behind its last one, or the first record of a time."""


def reached_by(settings: Settings) -> Kafka:
    """How these settings reach Kafka."""
    key_password, password = settings.kafka_tls_key_password, settings.kafka_sasl_password
    return Kafka(
        bootstrap=settings.kafka_bootstrap,
        idempotence=settings.kafka_idempotence,
        security_protocol=settings.kafka_security_protocol,
        tls_ca=settings.kafka_tls_ca,
        tls_certificate=settings.kafka_tls_certificate,
        tls_key=settings.kafka_tls_key,
        tls_key_password=key_password.get_secret_value() if key_password else None,
        sasl_mechanism=settings.kafka_sasl_mechanism,
        username=settings.kafka_sasl_username,
        password=password.get_secret_value() if password else None,
        token_file=settings.kafka_oauth_token_file,
        token_command=settings.kafka_oauth_token_command,
    )


async def offset_at(consumer: AIOKafkaConsumer, partition: TopicPartition, start: Start) -> int:
    """The offset of the first record at or after a place; behind the last one, if there is none.

    Raises:
        KafkaError: Kafka does not say.
    """
    offset: int
    if start == "earliest":
        offset = (await consumer.beginning_offsets([partition]))[partition]
        return offset
    if isinstance(start, datetime):
        found = (await consumer.offsets_for_times({partition: int(start.timestamp() * 1000)}))[partition]
        if found is not None and found.offset >= 0:
            offset = found.offset
            return offset
    offset = (await consumer.end_offsets([partition]))[partition]
    return offset


def heed_refusals(consumer: AIOKafkaConsumer) -> None:
    """Let a consumer that is told "ask later" when it asks what is committed ask later.

    A coordinator that has just been started refuses with an error for the request as a whole, and names no partition.
    aiokafka (0.14) looks at the partitions only, and takes it that nothing was ever committed: it begins at the first
    record, and we, where a subscription starts at `latest`, behind the last one.
    """
    group = consumer._coordinator  # noqa: SLF001  # there is no other way in
    ask = group._send_req  # noqa: SLF001

    async def send(request: object) -> Any:
        answer = await ask(request)
        code = getattr(answer, "error_code", 0) if isinstance(request, OffsetFetchRequest) else 0
        if code:
            error = for_code(code)
            if error is not GroupLoadInProgressError:
                group.coordinator_dead()  # it is another broker by now: look for it
            raise error(f"what is committed: {answer}")
        return answer

    group._send_req = send  # noqa: SLF001
