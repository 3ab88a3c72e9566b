"""The command line without any server: what it takes, what it refuses, and with which words and exit status."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from workers import cli
from workers.settings import PROVIDER_VARIABLES, Settings

Run = Callable[..., tuple[int, str, str]]

COMMANDS = (
    *(
        "dev",
        "send",
        "tail",
        "ask",
        "agents",
        "show",
        "pause",
        "resume",
        "stop",
        "steer",
        "cancel-turn",
        "doctor",
        "demo",
    ),
    *("rewind", "fork", "verify"),
    *("approvals", "approvals list", "approvals approve", "approvals refuse", "tool", "tool list", "tool complete"),
    *("memory", "memory list", "memory forget", "budget", "budget show", "budget lift", "ingest", "ingest replay"),
    *("pins", "pins list", "pins add", "pins remove", "dlq", "dlq list", "dlq show", "dlq redrive", "dlq drop"),
    *("worker", "worker agent", "worker model", "worker ingest", "worker rehearsal", "specs", "specs check"),
)


@pytest.fixture(autouse=True)
def _nothing_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server, no provider, no specs; the ledger and the state in a folder of the test."""
    ours = ("PERENNIAL_", "NO_COLOR", "FORCE_COLOR")
    for name in [*PROVIDER_VARIABLES, *(name for name in os.environ if name.startswith(ours))]:
        monkeypatch.delenv(name, raising=False)
    for name in ("TEMPORAL_ADDRESS", "KAFKA_BOOTSTRAP"):
        monkeypatch.setenv(f"PERENNIAL_{name}", "127.0.0.1:1")
    monkeypatch.setenv("PERENNIAL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PERENNIAL_LEDGER_URL", f"sqlite:///{tmp_path}/ledger.db")
    monkeypatch.setenv("PERENNIAL_SPECS", str(tmp_path / "specs"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: its status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.run(arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert "\x1b" not in captured.out + captured.err
        return status, captured.out, captured.err

    return run


def typed(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Standard input."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))


# Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["", *sorted({command.split()[0] for command in COMMANDS if " " in command})])
def test_help_names_every_command_without_cutting_it_short(run: Run, group: str) -> None:
    """A newcomer reads one page, in whole sentences, also on a narrow terminal."""
    status, out, err = run(*group.split(), "--help")
    assert (status, err) == (0, "")
    assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} >= {
        command.split()[-1] for command in COMMANDS if command.split()[:-1] == group.split()
    }
    assert "..." not in out.replace("PERENNIAL_...", "").replace("[ARGS]...", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    """`--help` and `-h`, anywhere, are status 0."""
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    assert out.startswith(f"Usage: perennial {command} ")
    assert run(*command.split(), "-h")[1] == out


def test_version(run: Run) -> None:
    """The name and the number, for bug reports."""
    assert run("--version") == (0, "perennial 0.1.0\n", "")


def test_a_command_loads_only_what_it_needs() -> None:
    """`--help` answers at once, and `tail` begins without Temporal's client or the model library."""
    heavy = "{'temporalio', 'sqlalchemy', 'pydantic_ai', 'openai', 'starlette'}"
    for modules, unwanted in (
        ("workers.cli", f"{heavy} | {{'aiokafka', 'rich'}}"),
        ("workers.topics, workers.views", heavy),
        ("workers.operations, workers.views", f"{heavy} - {{'temporalio'}}"),
    ):
        code = f"import sys, {modules}; sys.exit(str(({unwanted}) & sys.modules.keys() or ''))"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert ran.stderr.strip() == "", modules


# Bad command lines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("tail", "--frob"), "No such option: --frob"),
        (("ask", "a/b"), "Missing argument 'TEXT'"),
        (("ask", "a/b", " "), "there is nothing to ask: the text is empty"),
        (("ask", "a/b", "Hello?", "--timeout", "soon"), "--timeout"),
        (("tail", "--count", "0"), "--count"),
        (("send",), "give either a FILE of events, or --type and the parts of one event"),
        (("send", "events.jsonl", "--type", "note"), "give either a FILE"),
        (
            ("send", "events.jsonl", "--subject", "a", "--tenant", "b"),
            "--subject, --tenant cannot be given with a FILE",
        ),
        (("send", "--type", "note", "--data", "Hello?"), "--data is not JSON"),
        (("send", "nowhere.jsonl"), "nowhere.jsonl can't be read: No such file"),
        (("ask", "logistics", "Hello?"), "'logistics' names no key: write logistics/KEY"),
        (("show", "//"), "'//' names no agent: write AGENT/KEY"),
        (("worker", "teapot"), "No such command 'teapot'"),
    ],
)
def test_a_bad_command_line_is_status_2_and_one_clear_message(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    """P14: what was wrong, on standard error; no server is asked."""
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_empty_input_and_input_that_is_no_event(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to send is bad input; so is a line that is no event, named with its place."""
    typed(monkeypatch, b"\n  \n")
    assert run("send", "-") == (2, "", "error: There is no event to send: the input is empty.\n")
    typed(monkeypatch, b'\n{"specversion": "1.0"}\n')
    status, out, err = run("send", "-")
    assert (status, out) == (2, "")
    assert "1 of 1 events are not valid, and nothing was sent:\n  standard input:2: " in err


def test_wrong_settings_are_all_named_with_what_they_hold(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once: both are there, with their names as in the environment."""
    monkeypatch.setenv("PERENNIAL_DRAIN_SECONDS", "x")
    monkeypatch.setenv("PERENNIAL_LOG_LEVEL", "LOUD")
    for command in (("agents",), ("doctor",), ("dev",), ("worker", "agent"), ("tail", "--json")):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert err.startswith("error: These settings are wrong")
        assert "PERENNIAL_DRAIN_SECONDS: " in err
        assert "(got 'x')" in err
        assert "PERENNIAL_LOG_LEVEL: " in err


# Specs ------------------------------------------------------------------------------------------------------------


def write_spec(tmp_path: Path, name: str, text: str) -> Path:
    folder = tmp_path / "specs"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_bad_specs_are_named_with_file_line_and_field(run: Run, tmp_path: Path) -> None:
    """All faults of all files at once, whichever command stumbles over them."""
    write_spec(tmp_path, "a.yaml", "name: a\ntenant: acme\ninstructions: Be kind.\ncolour: red\n")
    folder = write_spec(tmp_path, "b.yaml", "name: [\n")
    for command in (("specs", "check"), ("specs", "check", str(folder)), ("ask", "a/1", "Hello?"), ("show", "a/1")):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert f"{folder}/a.yaml:4: colour: " in err
        assert f"{folder}/b.yaml:2: not valid YAML" in err


def test_no_specs_at_all_is_not_in_order(run: Run, tmp_path: Path) -> None:
    """A wrong folder would otherwise pass every check."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        status, out, err = run("specs", "check", str(folder))
        assert (status, out) == (2, "")
        assert str(folder) in err


def test_an_agent_without_a_spec_is_refused_with_those_that_are_known(run: Run, tmp_path: Path) -> None:
    """A question to a mistyped name would otherwise wait for its answer."""
    write_spec(tmp_path, "a.yaml", "name: alice\ntenant: acme\ninstructions: Be kind.\n")
    status, out, err = run("ask", "alise/1", "Hello?")
    assert (status, out) == (2, "")
    assert err == "error: There is no agent for 'alise/1'. Known are: acme/alice. Write TENANT/AGENT/KEY.\n"


# Servers away -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("ask", "a/b", "Hello?"), ("agents",), ("show", "a/b"), ("pause", "a/b"), ("stop", "a/b")]
)
def test_temporal_away(run: Run, arguments: tuple[str, ...]) -> None:
    """Status 1, where it was looked for, and both remedies, in one line."""
    assert run(*arguments) == (
        1,
        "",
        (
            "error: Temporal at 127.0.0.1:1 does not answer. Start the embedded stack with `perennial dev`, or set "
            "PERENNIAL_TEMPORAL_ADDRESS.\n"
        ),
    )


@pytest.mark.parametrize("arguments", [("tail",), ("send", "--type", "note", "--subject", "a")])
def test_kafka_away(run: Run, arguments: tuple[str, ...]) -> None:
    """As with Temporal."""
    assert run(*arguments) == (
        1,
        "",
        (
            "error: Kafka at 127.0.0.1:1 does not answer. Start the embedded stack with `perennial dev`, or set "
            "PERENNIAL_KAFKA_BOOTSTRAP.\n"
        ),
    )


def test_a_state_directory_that_can_not_be_made(run: Run, tmp_path: Path) -> None:
    """`perennial dev` says so before it starts anything."""
    (tmp_path / "file").touch()
    status, _, err = run("dev", "--state-dir", str(tmp_path / "file" / "state"))
    assert status == 1
    assert f"error: The state directory {tmp_path}/file/state can't be written to: Not a directory" in err


def test_what_was_not_foreseen_is_a_message_too_and_debug_shows_where(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback for people; `--debug` has it for us."""

    def broken() -> None:
        raise ZeroDivisionError("by none")

    monkeypatch.setattr(Settings, "load", broken)
    status, out, err = run("agents")
    assert (status, out) == (1, "")
    assert err.startswith("error: ZeroDivisionError: by none\n")
    assert "perennial --debug" in err
    assert cli.run(("--debug", "agents")) == 1
    assert "Traceback" in capsys.readouterr().err


# MCP servers ------------------------------------------------------------------------------------------------------


def test_specs_check_asks_the_mcp_servers(run: Run, tmp_path: Path) -> None:
    """What an agent is offered is shown; a server that does not answer is said with file and line, unless offline."""
    spec = tmp_path / "desk.yaml"
    text = "name: desk\ninstructions: Answer.\ntools:\n  - {mcp: clock, command: [mcp-server-time], prefix: clock_}\n"
    spec.write_text(text)
    status, out, err = run("specs", "check", str(tmp_path))
    assert (status, err.splitlines()[-1]) == (0, "in order: 1 spec")
    assert "clock_get_current_time, clock_convert_time, read_result" in out
    status, out, _ = run("specs", "check", "--json", str(tmp_path))
    (found,) = json.loads(out)
    assert (status, found["name"], found["tools"][0]["mcp"]) == (0, "desk", "clock")
    assert found["offers"] == ["clock_get_current_time", "clock_convert_time", "read_result"]
    spec.write_text(f"{text}  - {{mcp: away, url: 'http://127.0.0.1:9/mcp'}}\n")
    status, out, err = run("specs", "check", str(tmp_path))
    assert (status, out) == (2, "")
    assert f"{spec}:5: tools.1: MCP server away at http://127.0.0.1:9/mcp can't be reached: " in err
    assert run("specs", "check", "--offline", str(tmp_path))[0] == 0
