"""Kafka, as the settings have it: what every Kafka client of a process is made of.

producer = AIOKafkaProducer(**kafka.reached_by(settings).producer())
"""

from __future__ import annotations

from activities.kafka import Kafka
from workers.settings import Settings


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
