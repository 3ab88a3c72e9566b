"""Settings: read once from the environment, all faults named together, frozen."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from workers import kafka
from workers.settings import (
    KAFKA_SECURITY_VARIABLES,
    PROVIDER_VARIABLES,
    STACK_FILE,
    Settings,
    SettingsError,
    provider_environment,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of our variables is set, and the state directory is empty."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PERENNIAL_{name.upper()}", raising=False)
    for name in PROVIDER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_without_any_variable_everything_is_on_this_machine() -> None:
    """The embedded stack's usual addresses; nothing leaves 127.0.0.1 unasked."""
    settings = Settings.load()
    assert settings.temporal_address == "127.0.0.1:7233"
    assert settings.kafka_bootstrap == "127.0.0.1:9092"
    assert settings.ledger_url == "sqlite:///.perennial/ledger.db"
    assert settings.specs == Path("deploy/agents")
    assert settings.task_queue == "perennial"
    assert settings.drain == timedelta(seconds=20)


def test_a_variable_is_the_prefix_and_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upper or lower case in the field, as pydantic-settings has it; texts become what the field is."""
    monkeypatch.setenv("PERENNIAL_TEMPORAL_ADDRESS", "temporal.internal:7233")
    monkeypatch.setenv("PERENNIAL_KAFKA_IDEMPOTENCE", "false")
    monkeypatch.setenv("PERENNIAL_DRAIN_SECONDS", "1.5")
    monkeypatch.setenv("PERENNIAL_MODELS", "models.yaml")
    settings = Settings.load()
    assert settings.temporal_address == "temporal.internal:7233"
    assert settings.kafka_idempotence is False
    assert settings.drain == timedelta(seconds=1.5)
    assert settings.models == Path("models.yaml")


def test_all_wrong_variables_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """P14: each by the name it has in the environment, with what was got and what is expected."""
    monkeypatch.setenv("PERENNIAL_DRAIN_SECONDS", "soon")
    monkeypatch.setenv("PERENNIAL_LOG_LEVEL", "LOUD")
    monkeypatch.setenv("PERENNIAL_TASK_QUEUE", "")
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    head, *lines = str(refused.value).splitlines()
    assert head == "These settings are wrong; correct them in the environment:"
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "PERENNIAL_DRAIN_SECONDS",
        "PERENNIAL_LOG_LEVEL",
        "PERENNIAL_TASK_QUEUE",
    ]
    assert any("(got 'soon')" in line for line in lines)
    assert any("'DEBUG', 'INFO', 'WARNING' or 'ERROR'" in line for line in lines)


def test_a_running_stack_is_found_in_its_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`perennial ask` in the directory of `perennial dev` needs no settings; the environment wins."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / STACK_FILE).write_text(
        "PERENNIAL_TEMPORAL_ADDRESS=127.0.0.1:1111\nPERENNIAL_KAFKA_BOOTSTRAP=127.0.0.1:2222\nOTHER=1\n"
    )
    assert Settings.load().temporal_address == "127.0.0.1:7233"
    monkeypatch.setenv("PERENNIAL_STATE_DIR", str(folder))
    monkeypatch.setenv("PERENNIAL_KAFKA_BOOTSTRAP", "127.0.0.1:3333")
    settings = Settings.load()
    assert (settings.temporal_address, settings.kafka_bootstrap) == ("127.0.0.1:1111", "127.0.0.1:3333")
    assert settings.state_dir == folder


def test_settings_do_not_change() -> None:
    """What a process read at its start holds until its end."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings.load().task_queue = "another"  # type: ignore[misc]


def test_every_setting_says_what_it_is_for() -> None:
    """The README's table and `perennial doctor` show it."""
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_providers_are_configured_by_the_variables_their_users_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are set and not empty, as they stand; nothing else of the environment."""
    assert provider_environment() == {}
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "")
    monkeypatch.setenv("SOME_API_KEY", "another")
    assert provider_environment() == {"OPENAI_API_KEY": "a-key"}


SCRAM = {
    "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
    "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
    "KAFKA_SASL_USERNAME": "perennial",
    "KAFKA_SASL_PASSWORD": "correct horse",
}
TOKEN = {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SASL_MECHANISM": "OAUTHBEARER"}


@pytest.mark.parametrize(
    ("variables", "faulty"),
    [
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}, ["KAFKA_SASL_MECHANISM"]),
        (SCRAM | {"KAFKA_SASL_PASSWORD": ""}, ["KAFKA_SASL_PASSWORD"]),
        (SCRAM | {"KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"}, ["KAFKA_SASL_MECHANISM"]),
        (SCRAM | {"KAFKA_TLS_CA": "ca.pem"}, ["KAFKA_TLS_CA"]),
        (SCRAM | {"KAFKA_TLS_KEY": "key.pem"}, ["KAFKA_TLS_KEY"]),
        (SCRAM | {"KAFKA_OAUTH_TOKEN_FILE": "token"}, ["KAFKA_OAUTH_TOKEN_FILE"]),
        ({"KAFKA_SASL_PASSWORD": "correct horse"}, ["KAFKA_SASL_PASSWORD"]),
        (TOKEN, ["KAFKA_OAUTH_TOKEN_FILE"]),
        (TOKEN | {"KAFKA_OAUTH_TOKEN_COMMAND": "print 'token"}, ["KAFKA_OAUTH_TOKEN_COMMAND"]),
        (TOKEN | {"KAFKA_OAUTH_TOKEN_COMMAND": "t", "KAFKA_OAUTH_TOKEN_FILE": "t"}, ["KAFKA_OAUTH_TOKEN_FILE"]),
        (
            {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_TLS_CA": "none.pem", "KAFKA_TLS_CERTIFICATE": "bad.pem"},
            ["KAFKA_TLS_CA", "KAFKA_TLS_CERTIFICATE"],
        ),
    ],
)
def test_kafka_s_security_settings_fit_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], faulty: list[str]
) -> None:
    """P14: what is missing and what would be of no effect is named; the password stands in no message."""
    (tmp_path / "bad.pem").write_text("no certificate")
    for name, value in variables.items():
        monkeypatch.setenv(f"PERENNIAL_{name}", value)
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    head, *lines = str(refused.value).splitlines()
    assert head == "These settings are wrong; correct them in the environment:"
    assert [line.split(":")[0].strip() for line in lines] == [f"PERENNIAL_{name}" for name in faulty]
    assert "correct horse" not in str(refused.value)


def test_a_way_into_kafka_is_what_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them reach aiokafka's clients, and the secrets no log."""
    for name, value in SCRAM.items():
        monkeypatch.setenv(f"PERENNIAL_{name}", value)
    settings = Settings.load()
    assert kafka.reached_by(settings).producer() == {
        "bootstrap_servers": "127.0.0.1:9092",
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "perennial",
        "sasl_plain_password": "correct horse",
        "acks": "all",
        "enable_idempotence": True,
    }
    assert "correct horse" not in f"{settings!r} {settings} {kafka.reached_by(settings)!r}"


def test_the_variables_of_kafka_s_security_are_all_of_them() -> None:
    """The embedded stack keeps them from its workers: its broker would not understand them."""
    ours = {name for name in Settings.model_fields if name.startswith(("kafka_tls", "kafka_sasl", "kafka_oauth"))}
    assert {f"PERENNIAL_{name.upper()}" for name in ours | {"kafka_security_protocol"}} == set(KAFKA_SECURITY_VARIABLES)
