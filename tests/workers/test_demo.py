"""The demo's parts that need no servers: its summary, what it holds against the metrics, and events of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from activities import metrics as _  # noqa: F401  # registers what is looked up below
from workers.console import Output
from workers.demo import EVENTS, Demo, Kill, Report, disagreements, summary
from workers.embedded import AGENT, INGEST, MODEL
from workers.exits import BAD_INPUT, CommandError
from workers.settings import Settings
from workers.tally import Tally, expect
from workflows import names

TALLY = Tally(
    events_in=10,
    accepted=7,
    duplicates=2,
    dead_letters=1,
    skipped=0,
    replies=6,
    failed=0,
    lost=0,
    answered_twice=0,
    model_calls=12,
    calls_repeated=1,
    paid_twice=0,
    median_seconds=0.5,
    p99_seconds=2.25,
    rehearsal=True,
    missing=0,
)
METRICS = {
    INGEST: {
        "perennial_events_received_total": 10.0,
        "perennial_dead_letters_total": 1.0,
        "perennial_events_accepted_total": 9.0,
    },
    AGENT: {"perennial_events_duplicate_total": 2.0},
    MODEL: {"perennial_model_calls_total": 12.0},
}


def report(found: tuple[str, ...] = (), **figures: object) -> Report:
    kill = Kill(worker=AGENT, pid=1, after=3, in_flight=4)
    tally = TALLY.model_copy(update=figures)
    return Report(seed=7, seconds=41.4, kills=[kill], tally=tally, disagreements=list(found))


def text(of: Report) -> str:
    return "\n".join(line.plain for line in summary(of))


def own_demo(tmp_path: Path, *lines: bytes) -> Demo:
    events = tmp_path / "events.jsonl"
    events.write_bytes(b"\n".join(lines))
    return Demo(Settings(state_dir=tmp_path, _env_file=None), Output(), events=events)


def letter(event_id: str, **attributes: object) -> bytes:
    event = {"specversion": "1.0", "id": event_id, "source": "/test", "type": "store.customer.message"}
    return json.dumps({**event, "data": {"customer_id": "customer-01", "text": "Hello"}, **attributes}).encode()


def test_the_summary_names_every_figure_that_the_issue_asks_for() -> None:
    """Issue 2, point 11; and that all is rehearsed, and how to repeat the run."""
    told = text(report())
    for label, figure in {
        "events in": "10",
        "accepted": "7",
        "duplicates dropped": "2",
        "dead-lettered": "1",
        "replies out": "6",
        "lost": "0",
        "answered twice": "0",
        "model calls paid twice": "0",
        "event to reply": "0.50 s",
    }.items():
        line = next(line for line in told.splitlines() if line.strip().startswith(label))
        assert line.strip().removeprefix(label).split("   ")[0].strip() or figure in line
        assert figure in line
    assert "99th percentile 2.25 s" in told
    assert "killed" in told
    assert "agent after 3 answers" in told
    assert "Every promise was kept in 41 s (seed 7)." in told
    assert "rehearsals" in told


@pytest.mark.parametrize("figure", ["lost", "answered_twice", "paid_twice", "missing"])
def test_one_broken_promise_is_enough(figure: str) -> None:
    """Each of the zeros is held by itself, and the summary says NOT OK, or what is missing."""
    broken = report(**{figure: 1})
    assert not broken.kept
    assert "A promise was broken" in text(broken)
    assert ("NOT OK" in text(broken)) == (figure != "missing")
    assert ("1 missing" in text(broken)) == (figure == "missing")


def test_metrics_that_disagree_break_the_promise_too() -> None:
    """Issue 2, point 12: the demo's summary agrees with the metrics; a contradiction is told."""
    said = disagreements(TALLY, METRICS)
    assert said == []
    said = disagreements(TALLY.model_copy(update={"events_in": 11}), METRICS)
    assert said == ["perennial_events_received_total is 10, counted were 11"]
    broken = report(tuple(said))
    assert not broken.kept
    assert said[0] in text(broken)


@pytest.mark.parametrize("worker", [AGENT, MODEL])
def test_a_worker_that_was_killed_may_have_forgotten_and_may_not_have_invented(worker: str) -> None:
    """Counters begin at nothing in a new process; more than what was counted from the outside is a lie."""
    ((metric, value),) = METRICS[worker].items()
    assert disagreements(TALLY, {**METRICS, worker: {metric: value - 1}}) == []
    assert len(disagreements(TALLY, {**METRICS, worker: {metric: value + 1}})) == 1


def test_the_metrics_compared_are_ones_that_workers_serve() -> None:
    """A metric that was renamed would read as zero, and contradict nothing."""
    served = {f"{family.name}_total" for family in REGISTRY.collect() if family.type == "counter"}
    assert {metric for of in METRICS.values() for metric in of} <= served


def test_own_events_go_where_they_belong(tmp_path: Path) -> None:
    """One that names its agent to agents.events, others to the topic of who wants them; what is no event to a topic."""
    addressed = letter("1", type="anything", agent="customer-service", tenant="store", subject="customer-09")
    demo = own_demo(tmp_path, addressed, letter("2"), letter("3", type="store.unknown"), b"no event")
    assert demo._topics == [names.EVENTS_TOPIC, "store.events", names.EVENTS_TOPIC, "store.events"]


def test_no_events_and_no_agents_are_bad_input(tmp_path: Path) -> None:
    """One message that names the file or folder and the remedy, and exit status 2."""
    with pytest.raises(CommandError, match=r"events\.jsonl holds no events") as empty:
        own_demo(tmp_path)
    settings = Settings(state_dir=tmp_path, _env_file=None)
    with pytest.raises(CommandError, match=r"missing\.jsonl can't be read: No such file.*--events") as missing:
        Demo(settings, Output(), events=tmp_path / "missing.jsonl")
    settings = Settings(state_dir=tmp_path, specs=tmp_path / "none", _env_file=None)
    with pytest.raises(CommandError, match=r"There are no agents in .*none.*PERENNIAL_SPECS") as nobody:
        Demo(settings, Output(), events=EVENTS)
    assert {refusal.value.status for refusal in (empty, missing, nobody)} == {BAD_INPUT}


def test_the_shipped_events_are_what_the_issue_asks_for(tmp_path: Path) -> None:
    """Issue 2, point 11: at least 200, for some 40 customers, in three languages, some duplicated, some malformed."""
    demo = Demo(Settings(state_dir=tmp_path, _env_file=None), Output(), events=EVENTS)
    lines = [(topic, line.value) for topic, line in zip(demo._topics, demo._lines, strict=True)]
    expected = expect(lines, demo._routes)
    assert len(lines) >= 200
    assert expected.repeated >= 5
    assert expected.rejected >= 5
    agents = {names.parse_workflow_id(pair.workflow_id) for pair in expected.pairs}
    assert {address.agent for address in agents} == {"customer-service", "logistics", "security"}
    assert len({address.key for address in agents if address.agent == "customer-service"}) >= 35
    text = EVENTS.read_text(encoding="utf-8")
    assert all(f'"lang": "{language}"' in text for language in ("en", "fr", "es"))
