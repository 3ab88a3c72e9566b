"""Specs: every mistake is named with file, line and field; an agent is given its newest spec."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.ledger import Ledger
from activities.specs import SpecError, Specs, SpecSet, load_agent, load_specs
from workflows.errors import Remedy
from workflows.messages import SpecRequest
from workflows.spec import ControlSpec, ToolControl

GOOD = "name: desk\ntenant: store\ninstructions: Answer.\n"


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path) -> list[str]:
    """The lines of the complaint about a folder."""
    with pytest.raises(SpecError) as error:
        load_specs(folder)
    return str(error.value).splitlines()


# Reading -------------------------------------------------------------------------------------------------------------


def test_the_specs_of_a_folder_are_read(tmp_path: Path) -> None:
    """`*.yaml` and `*.yml`, and nothing else; the topics are those subscribed to and `agents.events`."""
    written(tmp_path, "a.yaml", GOOD + "subscriptions:\n  - topic: store.events\n  - topic: store.alerts\n")
    written(tmp_path, "b.yml", "name: guard\ninstructions: Guard.\nsubscriptions: [{topic: store.events}]\n")
    written(tmp_path, "notes.txt", "not: [a spec")
    specs = load_specs(tmp_path)
    assert [(spec.tenant, spec.name) for spec in specs.agents] == [("store", "desk"), ("default", "guard")]
    assert specs.topics == ["agents.events", "store.alerts", "store.events"]
    agent = specs.get("store", "desk")
    assert agent is not None
    assert agent.file == tmp_path / "a.yaml"
    assert specs.get("default", "desk") is None


def test_an_empty_folder_has_no_agents(tmp_path: Path) -> None:
    """Not a mistake: agents may come later."""
    assert load_specs(tmp_path).agents == []


def test_a_folder_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    """P14: the setting that would help is in the message."""
    (line,) = refused(tmp_path / "none")
    assert str(tmp_path / "none") in line
    assert "PERENNIAL_SPECS" in line


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: Desk\ninstructions: x\n", ":1: name: String should match pattern"),
        ("name: desk\n", ":1: instructions: Field required"),
        ("name: desk\ninstructions: x\n\nintructions: y\n", ":4: intructions: Extra inputs are not permitted"),
        (
            "name: desk\ninstructions: x\nsubscriptions:\n  - topic: t\n  - topic: t\n    key: order\n",
            ":6: subscriptions.1.key: String should match pattern",
        ),
        ("name: desk\ninstructions: x\nbudget:\n  steps_per_turn: 0\n", ":4: budget.steps_per_turn: Input should be"),
        ("name: desk\ninstructions: x\ntools:\n  - python: nocolon\n", ":4: tools.0.python: String should match"),
        ("name: desk\n  instructions: x\n", ":2: not valid YAML: mapping values are not allowed here"),
        ("name: 'desk\n", ":2: not valid YAML: found unexpected end of stream"),
        ("", ":1: the file: Input should be a valid dictionary"),
        ("- name: desk\n", ":1: the file: Input should be a valid dictionary"),
        (
            "name: desk\ninstructions: x\ntools:\n  - python: json:loads\n  - python: no_module_here:f\n",
            ":5: tools.1: tool no_module_here:f: cannot import no_module_here",
        ),
        (
            "name: desk\ninstructions: x\ntools:\n  - python: json:no_function\n",
            ":4: tools.0: tool json:no_function: json has no function no_function",
        ),
        (
            "name: desk\ninstructions: x\ntools:\n  - python: twins:look\n  - python: other_twins:look\n",
            ":5: tools.1: a tool named look is there already",
        ),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    """P14: what was wrong, where, and what was expected."""
    for module in ("twins", "other_twins"):
        (tmp_path / f"{module}.py").write_text("def look() -> str:\n    return ''\n")
    path = written(tmp_path, "desk.yaml", text)
    assert any(line.startswith(f"{path}{complaint}") for line in refused(tmp_path)), refused(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """P14: a folder of that name, or bytes that are not UTF-8."""
    (tmp_path / "broken.yaml").write_bytes(b"name: \xff")
    (tmp_path / "folder.yaml").mkdir()
    lines = refused(tmp_path)
    assert [line.split(": cannot be read: ")[0] for line in lines] == [
        str(tmp_path / "broken.yaml"),
        str(tmp_path / "folder.yaml"),
    ]


def test_all_mistakes_of_all_files_are_named_together(tmp_path: Path) -> None:
    """P14: nobody likes to mend a folder one error at a time."""
    one = written(tmp_path, "1.yaml", "name: Desk\ninstructions: ''\n")
    two = written(
        tmp_path,
        "2.yaml",
        "name: desk\ninstructions: x\ntools:\n"
        "  - python: no_such_a:f\n  - python: json:loads\n  - python: no_such_b:f\n",
    )
    written(tmp_path, "3.yaml", GOOD)
    places = [line.split(": ")[0] + ": " + line.split(": ")[1] for line in refused(tmp_path)]
    assert places == [f"{one}:1: name", f"{one}:2: instructions", f"{two}:4: tools.0", f"{two}:6: tools.2"]


def test_two_files_cannot_define_one_agent(tmp_path: Path) -> None:
    """P14: both files are named; the same name in another tenant is another agent."""
    one = written(tmp_path, "1.yaml", GOOD)
    two = written(tmp_path, "2.yaml", GOOD)
    written(tmp_path, "3.yaml", "name: desk\ntenant: other\ninstructions: x\n")
    (line,) = refused(tmp_path)
    assert line == f"{two}: agent store/desk is defined in {one} already; rename one of them"


def test_a_tool_may_stand_in_a_file_beside_the_spec(tmp_path: Path) -> None:
    """The first agent of one's own is two files in one folder."""
    (tmp_path / "beside_tools.py").write_text('def greet(name: str) -> str:\n    """Greet."""\n    return name\n')
    path = written(tmp_path, "desk.yaml", GOOD + "tools: [{python: 'beside_tools:greet'}]\n")
    agent = load_agent(path)
    assert [definition.name for definition in agent.definitions] == ["greet"]
    specs = SpecSet([agent])
    assert specs.tool("agent/store/desk/order-1", "greet") is agent.tools["greet"]
    assert specs.tool("agent/store/desk/order-1", "look") is None
    assert specs.tool("agent/store/guard/order-1", "greet") is None


# Giving --------------------------------------------------------------------------------------------------------------


async def load(specs: SpecSet, ledger: Ledger, agent: str = "desk", known: str = "") -> ControlSpec | None:
    request = SpecRequest(tenant="store", agent=agent, known_digest=known)
    return await ActivityEnvironment().run(Specs(specs, ledger).load_spec, request)


async def test_an_agent_is_given_its_newest_spec_once(tmp_path: Path) -> None:
    """None when it knows the newest; the ledger keeps each, under its digest, for the entries that refer to it."""
    (tmp_path / "control_tools.py").write_text("def pay() -> str:\n    return ''\n")
    tools = "tools: [{python: 'control_tools:pay', repeatable: false, timeout_seconds: 3, attempts: 2}]\n"
    written(tmp_path, "desk.yaml", GOOD + tools + "hibernate_after_seconds: 60\n")
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        first = await load(load_specs(tmp_path), ledger)
        assert first is not None
        assert await load(load_specs(tmp_path), ledger, known=first.digest) is None
        written(tmp_path, "desk.yaml", "name: desk\ntenant: store\ninstructions: Answer in French.\n")
        second = await load(load_specs(tmp_path), ledger, known=first.digest)
        assert second is not None
        kept = [await ledger.get_spec(spec.digest) for spec in (first, second)]
    assert first.tools == {"pay": ToolControl(timeout=timedelta(seconds=3), repeatable=False, attempts=2)}
    assert first.hibernate_after == timedelta(minutes=1)
    assert second.digest != first.digest
    assert [spec.instructions for spec in kept] == ["Answer.", "Answer in French."]


async def test_an_agent_without_a_spec_waits_for_one(tmp_path: Path) -> None:
    """An operator can mend it, so mail is not lost: it is retried, and says which specs there are."""
    written(tmp_path, "desk.yaml", GOOD)
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        with pytest.raises(ApplicationError) as missing:
            await load(load_specs(tmp_path), ledger, agent="guard")
    assert (missing.value.type, missing.value.non_retryable) == (Remedy.RETRY_LATER, False)
    assert "no spec for agent 'guard' of tenant 'store'; known are: store/desk" in str(missing.value)
