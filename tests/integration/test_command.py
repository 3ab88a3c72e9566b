"""The `perennial` command as people run it: real processes against the real stack that `perennial dev` starts."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from workers.doctor import Check
from workers.history import TreeReport
from workers.operations import AgentSummary
from workers.report import AgentReport
from workers.settings import PROVIDER_VARIABLES
from workflows import names
from workflows.events import Event
from workflows.messages import Reply, Rewound, Status, TurnOutcome
from workflows.spec import AgentSpec

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).parent / "perennial"
SECONDS = 60

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]")


def message(number: int) -> str:
    """A line of JSON that the store's subscriptions send to customer-service/lines."""
    data = {"customer_id": "lines", "text": "[[say noted]]"}
    event = {"specversion": "1.0", "id": f"line-{number}", "source": "/test", "type": "store.customer.message"}
    return json.dumps({**event, "data": data})


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Perennial:
    """Runs the command with a state directory; keyword arguments are settings, as in `task_queue="nobody"`."""

    state: Path

    def environment(self, **settings: str) -> dict[str, str]:
        ours = ("PERENNIAL_", "NO_COLOR", "FORCE_COLOR", "COLUMNS")
        others = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(ours) and name not in PROVIDER_VARIABLES
        }
        given = {f"PERENNIAL_{name.upper()}": value for name, value in settings.items()}
        return {**others, "TERM": "xterm-256color", "PERENNIAL_STATE_DIR": str(self.state), **given}

    def __call__(self, *arguments: str, stdin: str = "", **settings: str) -> Ran:
        """Run it with its output piped; that never brings escape codes or a traceback."""
        ran = subprocess.run(
            [COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=self.environment(**settings),
            timeout=SECONDS,
            check=False,
        )
        for text in (ran.stdout, ran.stderr):
            assert "\x1b" not in text
            assert "Traceback" not in text
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self.environment(**settings),
        )

    def on_terminal(self, *arguments: str, **variables: str) -> str:
        """What it writes to a terminal."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env={**self.environment(), **variables},
        )
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # the terminal's end, once the process has left
            while part := os.read(ours, 65536):
                written += part
        os.close(ours)
        assert process.wait(SECONDS) == 0, written
        return written.decode()


@contextlib.contextmanager
def ended(process: subprocess.Popen[str], seconds: float = SECONDS) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the test."""
    # A process that hangs would hang the reader of its output too.
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str, *, err: bool = False) -> str:
    """What a process writes, up to the line with this text."""
    stream = process.stderr if err else process.stdout
    assert stream
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if text in line:
            return "".join(lines)
    other = process.stdout if err else process.stderr
    raise AssertionError(f"ended without {text!r}: {''.join(lines)}{other.read() if other else ''}")


@pytest.fixture(scope="module")
def perennial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Perennial]:
    """The command, and a stack started with it."""
    command = Perennial(tmp_path_factory.mktemp("stack"))
    with ended(command.start("dev"), seconds=600) as stack:
        said = read_until(stack, "Ctrl-C drains")
        assert f"export PERENNIAL_STATE_DIR={command.state}" in said
        yield command
        stack.send_signal(signal.SIGINT)
        assert "goes on with the same agents" in read_until(stack, "stopped;")
        assert stack.wait(SECONDS) == 0


# Ask --------------------------------------------------------------------------------------------------------------


def test_ask_prints_the_reply_alone_and_what_it_cost_beside_it(perennial: Perennial) -> None:
    """Data goes to standard output, remarks to standard error; a rehearsal is marked as one."""
    ran = perennial("ask", "customer-service/asked", "[[say good morning]]")
    assert (ran.status, ran.out) == (0, "[rehearsal] good morning\n")
    assert re.fullmatch(r"turn 1 · 1 step · \d+ tokens in, \d+ out · rehearsal\n", ran.err)


def test_ask_again_with_the_same_id_gives_the_same_reply(perennial: Perennial) -> None:
    """P1 for people: a question that is asked again, to be sure, is answered once; --json is the Reply model."""
    first = perennial("ask", "store/customer-service/twice", "[[say once]]", "--id", "q-1", "--json")
    again = perennial("ask", "store/customer-service/twice", "[[say once]]", "--id", "q-1", "--json")
    assert first.status == again.status == 0
    reply = Reply.model_validate_json(first.out)
    assert (reply.text, reply.turn, reply.rehearsal) == ("once", 1, True)
    assert Reply.model_validate_json(again.out) == reply
    assert first.err == again.err == ""


def test_ask_of_an_agent_that_has_no_answer_says_why(perennial: Perennial) -> None:
    """A refused model call is status 1 and the reason; with --json the failed reply is still data."""
    ran = perennial("ask", "customer-service/refused", "[[error 400]]", "--json")
    assert ran.status == 1
    assert Reply.model_validate_json(ran.out).outcome is TurnOutcome.FAILED
    assert "has no answer" in ran.err
    assert "HTTP status 400" in ran.err


def test_ask_without_workers_says_that_none_is_there_and_how_to_start_one(perennial: Perennial) -> None:
    """Nobody polls the task queue: the message names it, the remedy, and how to get the reply later."""
    ran = perennial("ask", "customer-service/unheard", "Hello?", "--timeout", "1", task_queue="nobody")
    assert (ran.status, ran.out) == (1, "")
    for part in ("within 1 s", "no agent worker polls the task queue 'nobody'", "perennial worker model", "--id "):
        assert part in ran.err


def test_a_namespace_that_is_not_there_is_said_at_once(perennial: Perennial) -> None:
    """Not asked for again and again: a namespace does not come by itself."""
    ran = perennial("ask", "customer-service/me", "Hello?", temporal_namespace="elsewhere")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert "Namespace elsewhere is not found" in ran.err


# Send and tail ----------------------------------------------------------------------------------------------------


def tailed(perennial: Perennial, agent: str, count: int) -> list[Event]:
    ran = perennial("tail", "--from-beginning", "--agent", agent, "--count", str(count), "--json")
    assert ran.status == 0, ran.err
    return [Event.model_validate_json(line) for line in ran.out.splitlines()]


def test_an_event_sent_from_arguments_is_answered_and_tail_shows_it(perennial: Perennial) -> None:
    """Issue 2, point 10: send prints the id, tail the reply and what became of the turn."""
    parts = ("--tenant", "store", "--agent", "logistics", "--subject", "sent-1", "--type", "note", "--id", "event-1")
    ran = perennial("send", *parts, "--data", '{"text": "[[say seen]]"}')
    assert (ran.status, ran.out, ran.err) == (0, "event-1\n", "sent 1 to agents.events\n")
    replied, completed = tailed(perennial, "logistics/sent-1", 2)
    assert (replied.type, completed.type) == (names.REPLY_TYPE, names.TURN_COMPLETED_TYPE)
    reply = Reply.model_validate(replied.data)
    assert (reply.text, [answered.id for answered in reply.answers]) == ("seen", ["event-1"])
    shown = perennial("tail", "--from-beginning", "--agent", "store/logistics/sent-1", "--count", "1")
    assert re.fullmatch(r"\d\d:\d\d:\d\d  reply      store/logistics/sent-1  \[rehearsal\] seen\n", shown.out)


def test_json_lines_are_sent_from_a_file_and_from_standard_input(perennial: Perennial, tmp_path: Path) -> None:
    """Events go where subscriptions send them; blank lines do no harm."""
    lines = [message(number) for number in range(3)]
    file = tmp_path / "events.jsonl"
    file.write_text(f"{lines[0]}\n\n{lines[1]}\n")
    ran = perennial("send", str(file), "--topic", "store.events", "--json")
    assert ran.status == 0
    assert json.loads(ran.out) == {"topic": "store.events", "sent": 2, "ids": ["line-0", "line-1"]}
    ran = perennial("send", "-", "--topic", "store.events", stdin=lines[2])
    assert (ran.status, ran.out) == (0, "line-2\n")
    answered: list[str] = []
    with ended(perennial.start("tail", "--from-beginning", "--agent", "customer-service/lines", "--json")) as tail:
        assert tail.stdout
        while len(answered) < 3:
            event = Event.model_validate_json(tail.stdout.readline())
            if event.type == names.REPLY_TYPE:
                answered += [answer.id for answer in Reply.model_validate(event.data).answers]
    assert answered == ["line-0", "line-1", "line-2"]


def test_lines_that_are_no_events_are_named_and_nothing_is_sent_except_raw(perennial: Perennial) -> None:
    """All faults at once, each with its place; --raw sends them, for whoever wants to see dead letters."""
    text = f"{message(7)}\nno json\n{{}}\n"
    ran = perennial("send", "-", "--topic", "store.events", stdin=text)
    assert (ran.status, ran.out) == (2, "")
    assert "2 of 3 events are not valid, and nothing was sent" in ran.err
    assert re.search(r"standard input:2: .*not JSON.*\n  standard input:3: ", ran.err)
    ran = perennial("send", "-", "--topic", "store.events", "--raw", stdin="no json\n")
    assert (ran.status, ran.out) == (0, "(standard input:1)\n")


def test_a_replay_of_what_was_answered_changes_nothing(perennial: Perennial) -> None:
    """Issue 3, point 7: duplicates are dropped, whenever it was; a place that is none is named, status 2."""
    event = {"specversion": "1.0", "source": "/test", "type": "note", "tenant": "store", "agent": "logistics"}
    lines = [json.dumps({**event, "id": f"n-{n}", "subject": "replayed", "data": {"n": n}}) for n in range(3)]
    assert perennial("send", "-", stdin="\n".join(lines)).status == 0
    before = tailed(perennial, "logistics/replayed", 2)
    assert {happened.type for happened in before} == {names.REPLY_TYPE, names.TURN_COMPLETED_TYPE}
    answered = Status.model_validate(shown(perennial, "logistics/replayed"))
    arguments = ("ingest", "replay", "agents.events", "--from", "earliest", "--agent", "logistics")
    while (ran := perennial(*arguments, "--json")).status == 0 and json.loads(ran.out)["known"] < 3:
        pass  # its turns are still being taken
    told = json.loads(ran.out)
    assert told["read"] >= 3, ran.err
    assert told["accepted"] == 0
    assert Status.model_validate(shown(perennial, "logistics/replayed")).accepted == answered.accepted == 3
    ran = perennial(*arguments)
    assert re.search(r"^ *handed over +0$", ran.out, re.MULTILINE)
    ran = perennial("ingest", "replay", "agents.events", "--from", "yesterday")
    assert (ran.status, ran.out) == (2, "")
    assert "'yesterday' is no place in a topic" in ran.err


def shown(perennial: Perennial, agent: str) -> object:
    return json.loads(perennial("show", agent, "--json").out)["status"]


def test_an_event_that_no_agent_takes_is_warned_of(perennial: Perennial) -> None:
    """It is sent (somebody else's workers may know better), and the person is told where it will end."""
    ran = perennial("send", "--type", "weather.changed", "--subject", "sky")
    assert ran.status == 0
    assert "warning: the event: no agent subscribes to events of type 'weather.changed'" in ran.err
    assert names.DEAD_LETTER_TOPIC in ran.err


def test_a_topic_that_does_not_exist_is_refused_with_those_that_do(perennial: Perennial) -> None:
    """A typing mistake would otherwise make a topic that nobody reads."""
    ran = perennial("send", "--type", "note", "--topic", "store.evnets")
    assert (ran.status, ran.out) == (2, "")
    assert "no topic 'store.evnets'" in ran.err
    assert "agents.events, " in ran.err
    assert "store.events" in ran.err


def test_tail_shows_what_comes_from_now_on_until_ctrl_c(perennial: Perennial) -> None:
    """Without --from-beginning nothing of the past; each line at once, also on a pipe; Ctrl-C is a good end."""
    assert perennial("ask", "customer-service/tailed", "[[say before]]").status == 0
    with ended(perennial.start("tail", "--agent", "customer-service")) as tail:
        read_until(tail, "watching replies", err=True)
        assert perennial("ask", "customer-service/tailed", "[[say after]]").status == 0
        first = read_until(tail, "reply")
        assert first.endswith("[rehearsal] after\n")
        assert first.count("\n") == 1
        tail.send_signal(signal.SIGINT)
        assert tail.wait(SECONDS) == 0


def test_a_reader_that_has_seen_enough_ends_tail_quietly(perennial: Perennial) -> None:
    """`perennial tail | head -1`."""
    assert perennial("ask", "customer-service/piped", "[[say one]]").status == 0
    with ended(perennial.start("tail", "--from-beginning", "--json")) as tail:
        assert tail.stdout
        assert tail.stderr
        assert tail.stdout.readline()
        tail.stdout.close()
        assert perennial("ask", "customer-service/piped", "[[say two]]").status == 0
        tail.wait(SECONDS)
        assert "Traceback" not in tail.stderr.read()
        tail.stdout = None


# Agents -----------------------------------------------------------------------------------------------------------


def test_agents_are_listed_and_shown_and_steered(perennial: Perennial) -> None:
    """An agent's life at the terminal: asked, paused, resumed, stopped, and asleep with all it knows."""
    who = "store/security/account-7"
    verdict = {"verdict": "harmless", "log": ["hello"]}
    ran = perennial("ask", who, f"[[say {json.dumps(verdict)}]]", "--json")
    assert (ran.status, json.loads(ran.out)["data"]) == (0, verdict)

    table = perennial("agents", "--agent", "security")
    assert table.status == 0
    assert re.match(r"AGENT +STATE +SINCE +HINT\n", table.out)
    assert re.search(rf"^{who} +active +\d{{4}}-", table.out, re.MULTILINE)
    listed = TypeAdapter(list[AgentSummary]).validate_json(perennial("agents", "--json").out)
    assert ("security", "account-7") in {(agent.name, agent.key) for agent in listed}

    ran = perennial("pause", "security/account-7", "--reason", "inspection")
    assert (ran.status, ran.out) == (0, f"{who} is paused; 0 events waiting, until `perennial resume`\n")
    ran = perennial("show", who)
    assert ran.status == 0
    for part in (f"{who}  paused\n", "inspection", "1 turn (0 failed)", "agent: [rehearsal] {", "/workflows/agent"):
        assert part in ran.out
    ran = perennial("resume", who, "--json")
    assert Status.model_validate_json(ran.out).state == "idle"

    ran = perennial("stop", who)
    assert (ran.status, ran.out) == (0, f"{who} goes to sleep; its next event or question wakes it\n")
    deadline = time.monotonic() + SECONDS
    while (told := AgentReport.model_validate_json(perennial("show", who, "--json").out)).awake:
        assert time.monotonic() < deadline
    assert (told.state, told.steps, len(told.transcript)) == ("asleep", 1, 1)
    assert told.status
    assert told.status.turn == 1
    ran = perennial("stop", who)
    assert (ran.status, ran.out) == (1, "")
    assert "is asleep; only an agent that is awake can be told to stop" in ran.err


def test_an_agent_that_never_was_is_said_to_be_none(perennial: Perennial) -> None:
    """Not an empty page: the message says where to look."""
    ran = perennial("show", "customer-service/nobody")
    assert (ran.status, ran.out) == (1, "")
    assert "never been an agent store/customer-service/nobody. `perennial agents` lists" in ran.err


def test_show_without_the_ledger_says_so(perennial: Perennial) -> None:
    """The password in its URL is not shown."""
    url = "postgresql://me:secret@127.0.0.1:1/agents"
    ran = perennial("show", "customer-service/nobody", ledger_url=url)
    assert (ran.status, ran.out) == (1, "")
    assert "127.0.0.1:1/agents did not work" in ran.err
    assert "PERENNIAL_LEDGER_URL" in ran.err
    assert "secret" not in ran.err


# An agent's past --------------------------------------------------------------------------------------------------


def told(perennial: Perennial, who: str, text: str) -> str:
    """Ask an agent; the entry that holds its answer."""
    ran = perennial("ask", who, text, "--json")
    assert ran.status == 0, ran.err
    return str(Reply.model_validate_json(ran.out).entry)


def tree_of(perennial: Perennial, who: str) -> TreeReport:
    ran = perennial("show", who, "--tree", "--json")
    assert ran.status == 0, ran.err
    return TreeReport.model_validate_json(ran.out)


def test_an_agent_is_rewound_and_its_past_is_a_tree(perennial: Perennial) -> None:
    """Issue 4, point 7: its head is the entry, by a prefix of its id; the next turn goes on there; nothing is lost."""
    who = "store/customer-service/rewound"
    first, second = (told(perennial, who, f"[[say answer {number}]]") for number in (1, 2))
    ran = perennial("rewind", who, first[:10], "--dry-run")
    assert (ran.status, ran.err) == (0, "nothing was changed\n")
    assert ran.out == f"{who} goes back to entry {first[:12]} (turn 1, step 1): 1 step left on a branch\n"
    assert tree_of(perennial, who).head == second

    ran = perennial("rewind", "customer-service/rewound", first[:10], "--reason", "a wrong turning")
    assert ran.status == 0, ran.err
    assert f"{who} goes on behind entry {first[:12]} (turn 1, step 1); 1 step left at entry {second[:12]}" in ran.out
    assert f"`perennial rewind {who} {second}` goes back to where it was." in ran.err
    third = told(perennial, who, "[[say answer 3]]")

    tree = tree_of(perennial, who)
    assert (tree.head, tree.entries) == (third, 3)
    assert [(node.entry, node.parent, node.live) for node in tree.nodes] == [
        (first, None, True),
        (second, first, False),
        (third, first, True),
    ]
    (left,) = tree.nodes[1].left
    assert left.reason == "a wrong turning"
    ran = perennial("show", who, "--tree")
    lines = [re.sub(r"turn \d, step 1 · ([0-9a-f]{12}) · .* → ", r"\1 ", line) for line in ran.out.splitlines()]
    lines[3] = re.sub(r"left .* by .*:", "left by:", lines[3])
    assert lines == [
        f"{who}  3 entries",
        f"● {first[:12]} [rehearsal] answer 1",
        f"├─ ○ {second[:12]} [rehearsal] answer 2",
        "│      left by: a wrong turning",
        f"● {third[:12]} [rehearsal] answer 3  ← head",
    ]
    rewound = next(event for event in tailed(perennial, who, 7) if event.type == names.AGENT_REWOUND_TYPE)
    assert Rewound.model_validate(rewound.data).old_head == second
    ran = perennial("rewind", who, third, "--json")
    assert (ran.status, ran.err) == (0, f"{who} is there already\n")


def test_an_agent_that_sleeps_is_rewound(perennial: Perennial) -> None:
    """It is woken for it, as for a question."""
    who = "store/customer-service/sleeper"
    first, second = (told(perennial, who, f"[[say answer {number}]]") for number in (1, 2))
    assert perennial("stop", who).status == 0
    deadline = time.monotonic() + SECONDS
    while AgentReport.model_validate_json(perennial("show", who, "--json").out).awake:
        assert time.monotonic() < deadline
    ran = perennial("rewind", who, first, "--json")
    assert ran.status == 0, ran.err
    made = Rewound.model_validate_json(ran.out)
    assert (made.head, made.old_head, made.turn) == (first, second, 2)
    third = told(perennial, who, "[[say answer 3]]")
    assert [node.parent for node in tree_of(perennial, who).nodes if node.entry == third] == [first]


def test_tool_calls_are_listed_before_they_are_rewound_over(perennial: Perennial) -> None:
    """Without --yes somebody has to agree: on a terminal it is asked, in a pipe it is refused; --yes does it."""
    who = "store/customer-service/customer-01"
    first = told(perennial, who, "[[say hello]]")
    refund = '{"order_id": "order-1002", "amount_cents": 700, "reason": "arrived damaged"}'
    told(perennial, who, f"[[call refund {refund}]]")
    ran = perennial("rewind", who, first)
    assert (ran.status, ran.out) == (2, "")
    assert "Tool calls were made there; a rewind does not undo them:" in ran.err
    assert re.search(r'turn 2, step 1  refund \{"order_id":.*\}  \w+, repeatable$', ran.err, re.MULTILINE)
    assert "say --yes" in ran.err
    assert "Rewind over them? [y/N]" in answered(perennial, "n", 1, "rewind", who, first)
    assert tree_of(perennial, who).head != first
    assert "goes on behind" in answered(perennial, "y", 0, "rewind", who, first)
    assert tree_of(perennial, who).head == first
    told(perennial, who, f"[[call refund {refund}]]")
    ran = perennial("rewind", who, first, "--yes", "--json")
    assert ran.status == 0, ran.err
    (call,) = Rewound.model_validate_json(ran.out).calls
    assert (call.name, json.loads(call.arguments)["amount_cents"]) == ("refund", 700)


def answered(perennial: Perennial, answer: str, status: int, *arguments: str) -> str:
    """Run a command on a terminal, and answer what it asks; what it has written."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=perennial.environment()
    )
    os.close(theirs)
    written = b""
    with ended(process), contextlib.suppress(OSError):
        while part := os.read(ours, 65536):
            if b"[y/N]" in part:
                os.write(ours, f"{answer}\n".encode())
            written += part
    os.close(ours)
    assert process.returncode == status, written
    return written.decode()


def test_a_fork_shares_the_past_and_goes_its_own_way(perennial: Perennial) -> None:
    """Nothing is copied; the other goes on as it was; the tree names the fork; a key that was used is refused."""
    who = "store/customer-service/original"
    first, second = (told(perennial, who, f"[[say answer {number}]]") for number in (1, 2))
    ran = perennial("fork", who, first[:16], "what-if")
    assert ran.status == 0, ran.err
    assert ran.out == f"store/customer-service/what-if begins behind entry {first[:12]} (turn 1, step 1)\n"
    own = told(perennial, "customer-service/what-if", "[[say another answer]]")
    tree = tree_of(perennial, "customer-service/what-if")
    assert (tree.head, tree.entries, tree.forked_from) == (own, 1, who)
    assert [(node.entry, node.agent) for node in tree.nodes] == [(first, who), (own, tree.agent)]
    of_other = tree_of(perennial, who)
    assert (of_other.head, of_other.nodes[0].forks) == (second, ["store/customer-service/what-if"])
    status = Status.model_validate(shown(perennial, "customer-service/what-if"))
    assert (status.turn, status.model_calls) == (1, 1)
    for key in ("what-if", "original"):
        ran = perennial("fork", who, second, key)
        assert (ran.status, ran.out) == (2, "")
        assert f"There is an agent store/customer-service/{key} already" in ran.err
    ran = perennial("verify", "customer-service/what-if", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["read"]["entries"] == 2


def test_an_entry_that_is_not_the_agents_is_refused(perennial: Perennial) -> None:
    """P14: what is wrong with it, status 2; and nothing is changed."""
    mine = told(perennial, "customer-service/mine", "[[say mine]]")
    theirs = told(perennial, "customer-service/theirs", "[[say theirs]]")
    for entry, complaint in [
        ("xyz", "'xyz' is no entry's id"),
        ("f" * 64, "has no entry 'ffff"),
        (theirs, "is of store/customer-service/theirs, and on no branch of store/customer-service/mine"),
        (theirs[:20], f"has no entry '{theirs[:20]}'"),
    ]:
        for arguments in (("rewind",), ("fork",)):
            last = ("new-key",) if arguments == ("fork",) else ()
            ran = perennial(*arguments, "customer-service/mine", entry, *last)
            assert (ran.status, ran.out) == (2, "")
            assert complaint in ran.err
    assert tree_of(perennial, "customer-service/mine").head == mine
    ran = perennial("rewind", "customer-service/never", mine)
    assert (ran.status, ran.out) == (2, "")
    assert "store/customer-service/never has no entries" in ran.err


def test_a_fork_without_workers_says_that_none_is_there(perennial: Perennial) -> None:
    """Within the time that was given, and with the remedy."""
    entry = told(perennial, "customer-service/unforked", "[[say one]]")
    ran = perennial("fork", "customer-service/unforked", entry, "unheard-fork", "--timeout", "1", task_queue="nobody")
    assert (ran.status, ran.out) == (1, "")
    assert "has not answered within 1 s: no agent worker polls the task queue 'nobody'" in ran.err


def test_verify_finds_what_was_changed_and_says_that_the_rest_is_as_it_was(perennial: Perennial) -> None:
    """Status 1, and the entry is named; mended, status 0."""
    who = "store/customer-service/verified"
    told(perennial, who, "[[say one]]")
    entry = told(perennial, who, "[[say two]]")
    assert perennial("verify", who).err.endswith(": all as it was recorded\n")
    with contextlib.closing(sqlite3.connect(perennial.state / "ledger.db", isolation_level=None)) as database:
        (body,) = database.execute("SELECT body FROM entries WHERE id = ?", (entry,)).fetchone()
        database.execute("UPDATE entries SET body = ? WHERE id = ?", (body.replace(b"two", b"six"), entry))
        for arguments in ((who,), ("--all",)):
            ran = perennial("verify", *arguments)
            assert ran.status == 1
            assert f"entry {entry} of agent/{who}: its hash is another\n" in ran.out
        database.execute("UPDATE entries SET body = ? WHERE id = ?", (body, entry))
    ran = perennial("verify", "--all", "--json")
    assert (ran.status, json.loads(ran.out)["findings"]) == (0, [])
    assert perennial("verify").status == perennial("verify", who, "--all").status == 2
    assert perennial("verify", "customer-service/never").status == 2


# Looking after it -------------------------------------------------------------------------------------------------


def test_doctor_finds_everything_in_order(perennial: Perennial) -> None:
    """Status 0, and a line for each thing looked at."""
    ran = perennial("doctor")
    assert (ran.status, ran.err) == (0, "all is well\n"), ran.out
    for what in ("specs", "models", "ledger", "Temporal", "agent worker", "Kafka", "topics", "ingest worker", "disk"):
        assert re.search(rf"^ok +{what}  ", ran.out, re.MULTILINE), what


def test_doctor_names_what_is_missing_and_changes_nothing(perennial: Perennial, tmp_path: Path) -> None:
    """Status 1, the remedy for each; a ledger that is not there is not made by looking."""
    ledger = tmp_path / "new" / "ledger.db"
    ran = perennial(
        "doctor", "--json", task_queue="nobody", ledger_url=f"sqlite:///{ledger}", kafka_bootstrap="127.0.0.1:1"
    )
    checks = {check.what: check for check in TypeAdapter(list[Check]).validate_json(ran.out)}
    assert ran.status == 1
    assert ran.err == "not right: agent worker, model worker, Kafka\n"
    assert {what for what, check in checks.items() if not check.ok} == {"agent worker", "model worker", "Kafka"}
    assert "perennial worker agent" in checks["agent worker"].remedy
    assert "perennial dev" in checks["Kafka"].remedy
    assert not ledger.parent.exists()


def test_specs_are_checked(perennial: Perennial) -> None:
    """Those of the store are in order; --json is the specs themselves, and what tools they are offered."""
    ran = perennial("specs", "check", "deploy/agents", "--json")
    told = json.loads(ran.out)
    assert all("read_result" in spec.pop("offers") for spec in told)
    specs = TypeAdapter(list[AgentSpec]).validate_python(told)
    assert (ran.status, [spec.name for spec in specs]) == (
        0,
        ["customer-service", "logistics", "print-room", "security"],
    )
    ran = perennial("specs", "check")
    assert (ran.status, ran.err) == (0, "in order: 4 specs\n")
    assert ran.out.startswith("AGENT ")


# On a terminal ----------------------------------------------------------------------------------------------------


def test_a_terminal_gets_colour_unless_it_is_not_wanted(perennial: Perennial) -> None:
    """And NO_COLOR is respected."""
    assert perennial("ask", "customer-service/colour", "[[say red]]").status == 0
    coloured = perennial.on_terminal("agents", "--agent", "customer-service")
    assert "store/customer-service/colour" in coloured
    assert COLOUR.search(coloured)
    plain = perennial.on_terminal("agents", "--agent", "customer-service", NO_COLOR="1")
    assert "store/customer-service/colour" in plain
    assert not COLOUR.search(plain)


# Processes --------------------------------------------------------------------------------------------------------

AWAY = {"temporal_address": "127.0.0.1:1", "kafka_bootstrap": "127.0.0.1:1"}


def test_a_worker_with_bad_input_ends_with_status_2_and_one_message(tmp_path: Path) -> None:
    """Settings, specs, models, rules: the log says which and where, and nothing is tried over and over."""
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "ill.yaml").write_text("name: ill\ntenant: acme\ninstructions: Be kind.\ncolour: red\n")
    models = tmp_path / "models.yaml"
    models.write_text("pools: 7\n")
    perennial = Perennial(tmp_path / "state")
    cases: list[tuple[str, dict[str, str], str]] = [
        ("ingest", {"drain_seconds": "soon"}, "PERENNIAL_DRAIN_SECONDS: "),
        ("agent", {"specs": str(specs)}, f"{specs}/ill.yaml:4: colour: "),
        ("ingest", {"specs": str(specs)}, f"{specs}/ill.yaml:4: colour: "),
        ("model", {"models": str(models)}, f"{models}:1: pools: "),
        ("model", {}, "No model is configured"),
        ("agent", {"metrics_address": "nowhere"}, "PERENNIAL_METRICS_ADDRESS"),
        ("rehearsal", {"rehearsal_rules": str(tmp_path / "none.yaml")}, f"{tmp_path}/none.yaml"),
    ]
    started = [(perennial.start("worker", name, **AWAY, **wrong), message) for name, wrong, message in cases]
    for (process, message), case in zip(started, cases, strict=True):
        with ended(process):
            _, log = process.communicate(timeout=SECONDS)
            assert process.returncode == 2, (case, log)
            assert message in log, (case, log)
            assert "Traceback" not in log, case
            assert len(re.findall("CRITICAL|^error: ", log, re.MULTILINE)) == 1, (case, log)


def test_a_worker_waits_for_servers_that_are_away_and_ends_well_when_asked(tmp_path: Path) -> None:
    """A server away is said plainly and waited for (P5); SIGTERM in that time is status 0."""
    perennial = Perennial(tmp_path / "state")
    rehearsal = {"rehearsal_url": "http://127.0.0.1:1/v1"}
    with contextlib.ExitStack() as stack:
        names_ = ("agent", "model", "ingest")
        workers = [stack.enter_context(ended(perennial.start("worker", name, **AWAY, **rehearsal))) for name in names_]
        for worker in workers:
            read_until(worker, "Temporal at 127.0.0.1:1 does not answer, waiting for it", err=True)
            worker.send_signal(signal.SIGTERM)
        for worker in workers:
            _, log = worker.communicate(timeout=SECONDS)
            assert (worker.returncode, "Traceback" in log) == (0, False), log
