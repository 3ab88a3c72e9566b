"""Specs: every mistake is named with file, line and field; an agent is given its newest spec."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import mcp_server
import pytest
from servers import eventually
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.ledger import Ledger
from activities.mcp_servers import Servers
from activities.specs import SpecError, Specs, SpecSet, check_servers, load_agent, load_specs
from workflows import names
from workflows.errors import Remedy
from workflows.messages import SpecRequest
from workflows.spec import ControlSpec, ListedTool, McpTool, ToolControl

TWIN = "name: desk\ninstructions: x\ntools:\n  - python: twins:refund\n    "
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
        (
            f"{TWIN}approval: {{default: allow, rules: [{{when: {{amonut: {{above: 5}}}}, then: ask}}]}}\n",
            ":4: tools.0: tool twins:refund: its approval has a rule about amonut, and it has no such argument; it has",
        ),
        (
            f"{TWIN}approval: {{rules: [{{when: {{amount: {{abvoe: 5}}}}, then: ask}}]}}\n",
            ":5: tools.0.approval.rules.0",
        ),
        (f"{TWIN}approval: sometimes\n", ":5: tools.0.approval.default: Input should be 'allow', 'ask' or 'refuse'"),
        (f"{TWIN}approval: {{expire_seconds: 5}}\n", ":5: tools.0.approval.expire_seconds: Extra inputs"),
        (
            "name: desk\ninstructions: x\ntools:\n  - python: twins:recall\nmemory: {}\n",
            ":5: memory: it brings a tool recall; rename the one among the tools",
        ),
        (
            "name: desk\ninstructions: x\ntools:\n  - python: twins:wake_me\nwake_ups: {}\n",
            ":5: wake_ups: it brings a tool wake_me; rename the one among the tools",
        ),
        ("name: desk\ninstructions: x\nwake_ups: {at_most: 51}\n", ":3: wake_ups.at_most: "),
        (
            "name: desk\ninstructions: x\nmemory:\n  read: [key, team]\n",
            ":4: memory: it names the scope team, and the agent is in none; say which with `team: NAME`",
        ),
        ("name: desk\ninstructions: x\nteam: Parcels!\n", ":3: team: String should match pattern"),
        (
            "name: desk\ninstructions: x\nschedules: [{name: a, cron: '@daily', time_zone: Europe/Atlantis}]\n",
            ":3: schedules.0: no time zone is named 'Europe/Atlantis'; name one as in Europe/Lisbon",
        ),
        (
            "name: desk\ninstructions: x\nquiet_hours: {from: '22:00', to: '07:00', time_zone: Atlantis}\n",
            ":3: quiet_hours: no time zone is named 'Atlantis'; name one as in Europe/Lisbon",
        ),
        ("name: desk\ninstructions: x\nquiet_hours: {from: 22:00, to: '07:00'}\n", ":3: quiet_hours.from: "),
        ("name: desk\ninstructions: x\nquiet_hours: {form: '22:00', to: '07:00'}\n", ":3: quiet_hours.from: "),
        (
            "name: desk\ninstructions: x\nschedules:\n  - {name: nightly, cron: 61 3 * * *}\n",
            ":4: schedules.0: Value error, '61' is not between 0 and 59",
        ),
        (
            "name: desk\ninstructions: x\nreply:\n  schema: {type: objekt}\n",
            ":4: reply: not a JSON Schema: $.type: 'objekt' is not valid",
        ),
        ("name: desk\ninstructions: x\nreply: {schema: gone.json}\n", ":3: reply: "),
        ("name: desk\ninstructions: x\nreply: {schema: {a: 2026-01-01}}\n", ":3: reply.schema.a: "),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    """P14: what was wrong, where, and what was expected."""
    for module in ("twins", "other_twins"):
        (tmp_path / f"{module}.py").write_text(
            "def look() -> str:\n    return ''\n\n\ndef recall() -> str:\n    return ''\n\n\n"
            "def wake_me() -> str:\n    return ''\n\n\n"
            "def refund(amount: int) -> str:\n    return ''\n"
        )
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


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("{}", ["remember", "recall", "forget"]),
        ("{write: []}", ["recall"]),
        ("{read: [], write: [tenant]}", ["remember", "forget"]),
        ("{read: [team]}\nteam: parcels", ["remember", "recall", "forget"]),
        ("null", []),
    ],
)
def test_a_memory_brings_its_tools(tmp_path: Path, memory: str, expected: list[str]) -> None:
    """As far as the spec allows what they do; the model is told of no scope that it may not use."""
    agent = load_agent(written(tmp_path, "desk.yaml", GOOD + f"memory: {memory}\n"))
    assert [definition.name for definition in agent.definitions] == list(agent.tools) == expected
    assert (agent.resolved({}).memory is None) == (not expected)
    for definition in agent.definitions:
        told = definition.description + str(definition.parameters)
        assert ("'tenant'" in told or "tenant:" in told) == ("tenant" in memory)
    assert agent.resolved({}).team == ("parcels" if "parcels" in memory else None)


def test_wake_ups_bring_their_tools_which_the_workflow_runs(tmp_path: Path) -> None:
    """No worker has a function for them."""
    agent = load_agent(written(tmp_path, "desk.yaml", f"{GOOD}wake_ups: {{at_most: 3}}\n"))
    control = agent.resolved({}).control("digest")
    assert control.wake_ups is not None
    assert control.wake_ups.at_most == 3
    tools = {name for name, tool in control.tools.items() if tool.built_in}
    assert tools == {names.WAKE_ME, names.LIST_WAKE_UPS, names.CANCEL_WAKE_UP}
    assert not tools & set(agent.tools)
    assert load_agent(written(tmp_path, "desk.yaml", GOOD)).resolved({}).control("digest").wake_ups is None


# Giving --------------------------------------------------------------------------------------------------------------


async def load(specs: SpecSet, ledger: Ledger, agent: str = "desk", known: str = "") -> ControlSpec | None:
    request = SpecRequest(tenant="store", agent=agent, known_digest=known)
    async with Servers(lambda _: {}) as servers:
        return await ActivityEnvironment().run(Specs(specs, ledger, servers).load_spec, request)


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
    assert first.tools.pop("read_result").repeatable, "it is offered beside every agent's tools"
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


# MCP servers ---------------------------------------------------------------------------------------------------------

HERE = Path(__file__).parents[1]


def a_server(state: Path, *offered: str, name: str = "x", more: str = "") -> str:
    """The YAML of the test's own MCP server, which offers these tools, or all."""
    state.mkdir(exist_ok=True)
    offers(state, *offered)
    return (
        f"  - mcp: {name}\n    command: {json.dumps([sys.executable, str(HERE / 'mcp_server.py'), str(state)])}\n{more}"
    )


def offers(state: Path, *offered: str) -> None:
    """What the server offers from its next start on."""
    if offered:
        (state / "offer").write_text(" ".join(offered))


def desk(folder: Path, *tools: str) -> SpecSet:
    """The specs of a folder with one agent, with these tools."""
    written(folder, "desk.yaml", f"{GOOD}tools:\n{''.join(tools)}")
    return load_specs(folder)


async def recorded(ledger: Ledger, control: ControlSpec | None) -> list[str]:
    """The tools of a spec, as the ledger has it."""
    assert control is not None
    return [tool.name for tool in (await ledger.get_spec(control.digest)).tools]


async def test_the_tools_of_a_server_are_listed_once_for_a_version_of_the_file(tmp_path: Path) -> None:
    """A server that changes, or is away, changes nothing for agents, also with new workers; an edited file does."""
    state = tmp_path / "state"
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        specs = desk(tmp_path, a_server(state, "note", "talk", more="    prefix: x_\n"))
        first = await load(specs, ledger)
        assert await recorded(ledger, first) == ["x_note", "x_talk", "read_result"]
        assert mcp_server.done(state, "started")
        offers(state, "talk", "draw")
        before = len(mcp_server.done(state, "started"))
        assert await load(load_specs(tmp_path), ledger) == first
        assert len(mcp_server.done(state, "started")) == before, "nobody has asked it"
        with (tmp_path / "desk.yaml").open("a") as file:
            file.write("# now with pictures\n")
        second = await load(load_specs(tmp_path), ledger)
        assert await recorded(ledger, second) == ["x_talk", "x_draw", "read_result"]


async def test_workers_that_list_at_once_agree(tmp_path: Path) -> None:
    """What the first one records is every worker's, whatever the second was told."""
    state = tmp_path / "state"
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        specs = desk(tmp_path, a_server(state, "note"))
        (agent,) = specs
        other = [ListedTool(name="draw")]
        assert await ledger.put_listing(agent.name, agent.version, "x", other) == other
        assert await ledger.put_listing(agent.name, agent.version, "x", [ListedTool(name="note")]) == other
        assert await recorded(ledger, await load(specs, ledger)) == ["draw", "read_result"]


async def test_a_tool_of_a_server_is_run_as_the_spec_says(tmp_path: Path) -> None:
    """Its own timeout and attempts; repeatable by what the spec says, else by what the server says."""
    limits = "    timeout_seconds: 3\n    attempts: 2\n"
    hinted = a_server(tmp_path / "1", "note", "wait", name="hinted", more=limits)
    told = a_server(tmp_path / "2", "note", name="told", more="    prefix: told_\n    repeatable: true\n")
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        control = await load(desk(tmp_path, hinted, told), ledger)
    assert control is not None
    timeout = timedelta(seconds=3)
    assert control.tools["note"] == ToolControl(timeout=timeout, repeatable=False, attempts=2)
    assert control.tools["wait"] == ToolControl(timeout=timeout, repeatable=True, attempts=2)
    assert control.tools["told_note"] == ToolControl(repeatable=True)


async def test_an_agent_whose_server_is_away_waits_for_it(tmp_path: Path) -> None:
    """Mail is not lost: it is retried, and says which server it is; what was not listed is not recorded."""
    state = tmp_path / "state"
    specs = desk(tmp_path, a_server(state, "note"), "  - {mcp: away, command: [no-such-server]}\n")
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        for _ in range(2):
            with pytest.raises(ApplicationError) as missing:
                await load(specs, ledger)
            assert (missing.value.type, missing.value.non_retryable) == (Remedy.RETRY_LATER, False)
            assert missing.value.message == (
                "Agent desk waits for the tools of its MCP servers, and so does its mail: "
                "MCP server away: there is no program no-such-server. Install it where the agent workers run."
            )
        (agent,) = specs
        assert await ledger.get_listing(agent.name, agent.version, "x") is None


async def test_a_slow_server_is_waited_for_and_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start may take longer than Temporal gives a try: the next try finds what the first one began."""
    monkeypatch.setattr("activities.specs._PATIENCE_SECONDS", 0.01)
    state = tmp_path / "state"
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger, Servers(lambda _: {}) as servers:
        activities = Specs(desk(tmp_path, a_server(state, "note")), ledger, servers)
        request = SpecRequest(tenant="store", agent="desk")

        async def given() -> ControlSpec | str | None:
            try:
                return await ActivityEnvironment().run(activities.load_spec, request)
            except ApplicationError as error:
                return f"{error.type}: {error.message}"

        async def listed() -> ControlSpec | None:
            found = await given()
            return None if isinstance(found, str) else found

        said = await given()
        assert isinstance(said, str)
        assert said.startswith(
            "RetryLater: The MCP servers of agent desk (x) have not listed their tools within 0.01 s"
        )
        assert await recorded(ledger, await eventually(listed)) == ["note", "read_result"]
    assert len(mcp_server.done(state, "started")) == 1


@pytest.mark.parametrize(
    ("more", "complaints"),
    [
        (
            ["    only: [note, gone, lo*]\n"],
            [":5: tools.0: MCP server one has no tool gone"],
        ),
        (["    only: ['lo*']\n"], [":5: tools.0: MCP server one has no tool lo*"]),
        (
            ["", ""],
            [
                (
                    ":7: tools.1: MCP server two has a tool note, and there is one of that name already "
                    "(of MCP server one); give the server a prefix, or leave the tool out with only"
                ),
            ],
        ),
        (["    prefix: read_\n", "    prefix: a_\n"], []),
    ],
)
async def test_what_is_wrong_with_a_server_is_named_with_file_and_line(
    tmp_path: Path, more: Sequence[str], complaints: Sequence[str]
) -> None:
    """P14: `perennial specs check` says it, and so does what the agent's mail waits for; nothing is recorded."""
    names = ("one", "two")
    tools = (a_server(tmp_path / name, "note", name=name, more=text) for name, text in zip(names, more, strict=False))
    specs = desk(tmp_path, *tools)
    async with Servers(lambda _: {}) as servers:
        found, faults = await check_servers(specs, servers)
    assert faults == [f"{tmp_path}/desk.yaml{complaint}" for complaint in complaints]
    assert list(found) == ([] if complaints else [("store", "desk")])
    if complaints:
        async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
            with pytest.raises(ApplicationError, match="desk waits for the tools of its MCP servers"):
                await load(specs, ledger)
            (agent,) = specs
            assert await ledger.get_listing(agent.name, agent.version, "one") is None


async def test_a_server_without_tools_is_named(tmp_path: Path) -> None:
    """P14: an agent that could do nothing would not be noticed."""
    raw = json.dumps([sys.executable, str(HERE / "raw_mcp_server.py"), "[]"])
    specs = desk(tmp_path, f"  - mcp: x\n    command: {raw}\n")
    async with Servers(lambda _: {}) as servers:
        assert await check_servers(specs, servers) == (
            {},
            [f"{tmp_path}/desk.yaml:5: tools.0: MCP server x lists no tools"],
        )


async def test_names_are_such_that_every_model_provider_takes_them(tmp_path: Path) -> None:
    """Dots and slashes are not; the server is asked by its own name."""
    listed = json.dumps([{"name": f"files/read.{'x' * 80}", "inputSchema": {"type": "object"}}])
    command = json.dumps([sys.executable, str(HERE / "raw_mcp_server.py"), listed])
    async with Servers(lambda _: {}) as servers:
        found, _ = await check_servers(desk(tmp_path, f"  - mcp: x\n    command: {command}\n"), servers)
    tool, _ = found["store", "desk"].tools
    assert tool.name == f"files_read_{'x' * 53}"
    assert tool.mcp == McpTool(server="x", tool=f"files/read.{'x' * 80}")


@pytest.mark.parametrize(
    ("tool", "complaint"),
    [
        ("{mcp: x}", "an MCP server has either a command or a url"),
        ("{mcp: x, command: [a], url: 'http://b'}", "an MCP server has either a command or a url"),
        ("{mcp: x, command: a b}", ".command: Input should be a valid list"),
        ("{mcp: X, command: [a]}", ".mcp: String should match pattern"),
        ("{mcp: x, command: [a], headers: {A: '${B}'}}", "headers go with a url"),
        ("{mcp: x, url: 'http://b', env: [A]}", "env goes with a command"),
        ("{mcp: x, url: 'ftp://b'}", "the url is not http://host/path or https://host/path"),
        ("{mcp: x, url: 'http://me:secret@b'}", "the url holds a password"),
        ("{mcp: x, url: 'http://b', headers: {Authorization: Bearer s3cret}}", ".headers.Authorization: String should"),
        ("{mcp: x, command: [a], env: [A=secret]}", ".env.0: String should match pattern"),
        ("{mcp: x, command: [a], only: []}", ".only: List should have at least 1 item"),
        ("{mcp: x, command: [a], prefix: a b}", ".prefix: String should match pattern"),
        ("{mcp: x, python: 'm:f', command: [a]}", ".python: Extra inputs are not permitted"),
    ],
)
def test_a_mistake_in_a_server_is_named(tmp_path: Path, tool: str, complaint: str) -> None:
    """P14: and a secret is refused, where it stands in the file."""
    path = written(tmp_path, "desk.yaml", f"{GOOD}tools:\n  - {tool}\n")
    (line,) = refused(tmp_path)
    assert line.startswith(f"{path}:5: tools.0")
    assert complaint in line


def test_two_servers_cannot_have_one_name(tmp_path: Path) -> None:
    """P14: what is recorded is recorded under it."""
    path = written(tmp_path, "desk.yaml", f"{GOOD}tools:\n  - {{mcp: x, command: [a]}}\n  - {{mcp: x, command: [b]}}\n")
    (line,) = refused(tmp_path)
    assert line == f"{path}:6: tools.1: an MCP server named x is there already; give each its own name"


def test_the_name_of_perennial_s_own_tool_is_taken(tmp_path: Path) -> None:
    """P14."""
    (tmp_path / "taken_tools.py").write_text("def read_result() -> str:\n    return ''\n")
    written(tmp_path, "desk.yaml", f"{GOOD}tools:\n  - python: taken_tools:read_result\n")
    (line,) = refused(tmp_path)
    assert "a tool named read_result is there already" in line


# What waits ----------------------------------------------------------------------------------------------------------


def test_what_a_tool_waits_for_reaches_the_workflow(tmp_path: Path) -> None:
    """The policy and the time for an answer from outside are part of what the workflow decides by."""
    (tmp_path / "twins.py").write_text("def refund(amount: int) -> str:\n    return ''\n")
    written(tmp_path, "a.yaml", TWIN + "approval: ask\n    answers: later\n    answer_within_seconds: 60\n")
    agent = load_specs(tmp_path).get("default", "desk")
    assert agent is not None
    resolved = agent.resolved({})
    control = resolved.control("digest").tools["refund"]
    assert control.approval is not None
    assert (control.approval.default, control.answer_within) == ("ask", timedelta(minutes=1))
    carried = ControlSpec.model_validate_json(resolved.control("d").model_dump_json())
    assert carried.tools == resolved.control("d").tools
