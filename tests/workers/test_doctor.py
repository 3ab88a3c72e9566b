"""The doctor on a machine where much is missing; where all is well: tests/integration/test_command.py."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from workers.doctor import Check, examine
from workers.settings import PROVIDER_VARIABLES, Settings


@pytest.fixture(autouse=True)
def _no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*PROVIDER_VARIABLES, *(name for name in os.environ if name.startswith("PERENNIAL_"))]:
        monkeypatch.delenv(name, raising=False)


async def looked(folder: Path, **settings: object) -> dict[str, Check]:
    nowhere = {
        "temporal_address": "127.0.0.1:1",
        "kafka_bootstrap": "127.0.0.1:1",
        "ledger_url": f"sqlite:///{folder}/ledger.db",
        "state_dir": folder / "state",
        "specs": folder / "specs",
    }
    return {check.what: check for check in await examine(Settings.model_validate({**nowhere, **settings}))}


async def test_everything_that_is_missing_is_named_with_what_to_do(tmp_path: Path) -> None:
    """All of it in one go; nothing is raised, and nothing is made."""
    checks = await looked(tmp_path)
    for what, remedy in (
        ("specs", ""),
        ("models", "Configure"),
        ("Temporal", "perennial dev"),
        ("Kafka", "perennial dev"),
    ):
        assert not checks[what].ok
        assert checks[what].needed
        assert remedy in checks[what].remedy
    assert "127.0.0.1:1 does not answer" in checks["Temporal"].found
    assert checks["ledger"].ok
    assert "not there yet" in checks["ledger"].found
    assert os.listdir(tmp_path) == []  # noqa: PTH208  # quick


@pytest.mark.parametrize("file", ["file/deep/ledger.db", "."])
async def test_a_ledger_that_can_not_be_is_found_out(tmp_path: Path, file: str) -> None:
    """A file where a folder should be, and a folder where the file should be."""
    (tmp_path / "file").touch()
    check = (await looked(tmp_path, ledger_url=f"sqlite:///{tmp_path}/{file}"))["ledger"]
    assert not check.ok
    assert str(tmp_path) in check.found
    assert "PERENNIAL_LEDGER_URL" in check.remedy


async def test_a_ledger_on_a_server_that_is_away_is_named_without_its_password(tmp_path: Path) -> None:
    """The message may be pasted into a ticket."""
    check = (await looked(tmp_path, ledger_url="postgresql://me:secret@127.0.0.1:1/agents"))["ledger"]
    assert not check.ok
    assert "127.0.0.1:1/agents" in check.found
    assert "secret" not in check.model_dump_json()


async def test_a_model_endpoint_is_connected_to_and_asked_nothing(tmp_path: Path) -> None:
    """One that listens and never answers is reachable; one that does not listen is not."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        assert (await looked(tmp_path, rehearsal_url=url))["model endpoint rehearsal"].ok
        silent.setblocking(False)
        connection, _ = silent.accept()
        connection.settimeout(5)
        assert connection.recv(100) == b""
        connection.close()
    check = (await looked(tmp_path, rehearsal_url=url))["model endpoint rehearsal"]
    assert (check.ok, check.remedy) == (False, "Start it, or correct its address")
    assert url in check.found


async def test_a_route_that_no_models_file_has_is_found_out(tmp_path: Path) -> None:
    """Before the agent's first turn fails of it."""
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "a.yaml").write_text("name: a\ntenant: acme\ninstructions: Be kind.\nroute: fast\n")
    checks = await looked(tmp_path, rehearsal_url="http://127.0.0.1:1/v1")
    assert checks["specs"].ok
    assert not checks["models"].ok
    assert "a wants route 'fast'" in checks["models"].found


async def test_embeddings_are_looked_at_and_not_needed(tmp_path: Path) -> None:
    """Without their key or their server, facts are found by words: it is told, and is no reason to fail."""
    models = tmp_path / "models.yaml"
    pools = "pools:\n  p: {model: 'openai-chat:x', base_url: 'http://127.0.0.1:1/v1'}\n"
    for embeddings, ok, found in [
        ("{model: 'openai:x', api_key_env: NO_SUCH_KEY}", False, "NO_SUCH_KEY"),
        ("{model: 'openai:x', base_url: 'http://127.0.0.1:1/v1'}", False, "http://127.0.0.1:1/v1"),
        ("{model: 'openai:x', base_url: 'http://127.0.0.1:%d/v1'}", True, "takes connections"),
    ]:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            models.write_text(f"{pools}embeddings: {embeddings.replace('%d', str(port))}\n")
            check = (await looked(tmp_path, models=models))["embeddings"]
        assert (check.ok, check.needed) == (ok, False)
        assert found in check.found
        assert ("by their words" in check.remedy) == (not ok)
    models.write_text(pools)
    assert "embeddings" not in await looked(tmp_path, models=models)


async def test_a_disk_that_is_nearly_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers and ledgers fail in odd ways without room."""
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    check = (await looked(tmp_path))["disk"]
    assert (check.ok, check.found) == (False, f"5 MB free for {tmp_path}/state")
    assert "Make room" in check.remedy
