"""`perennial demo`, run as people run it: as a process, on real servers; and what it counts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from servers import eventually
from stack import Command, descendants, none_alive, perennial

from workers.demo import Report

pytestmark = pytest.mark.slow


def _line(event_id: str, **attributes: object) -> str:
    event = {"specversion": "1.0", "id": event_id, "source": "/own", "type": "store.customer.message"}
    return json.dumps({**event, "data": {"customer_id": "customer-01", "lang": "en", "text": "Hi"}, **attributes})


@pytest.mark.timeout(180)
async def test_the_demo_keeps_every_promise_and_says_so(tmp_path: Path) -> None:
    """Issue 2, point 11: the shipped events, both workers killed, all counted; status 0 only when all of it holds."""
    finished = await perennial("demo", "--json", "--seed", "20261", state=tmp_path, seconds=150)
    assert finished.status == 0, finished.err
    report = Report.model_validate(finished.json)
    tally = report.tally
    assert report.kept
    assert report.seed == 20261
    assert sorted(kill.worker for kill in report.kills) == ["agent", "model"]
    assert all(kill.in_flight > 0 for kill in report.kills)
    assert tally.events_in >= 200
    assert tally.accepted + tally.duplicates + tally.dead_letters == tally.events_in
    assert (tally.lost, tally.answered_twice, tally.paid_twice, tally.missing, tally.skipped) == (0, 0, 0, 0, 0)
    assert tally.duplicates > 0
    assert tally.dead_letters > 0
    assert 0 < tally.replies <= tally.accepted
    assert tally.model_calls >= tally.replies
    assert tally.rehearsal
    assert tally.median_seconds is not None
    assert tally.p99_seconds is not None
    assert tally.median_seconds <= tally.p99_seconds
    assert finished.err.count("SIGKILL to the") == 2, "it tells what it does while it does it"


async def test_the_demo_runs_on_events_of_ones_own(tmp_path: Path) -> None:
    """`DEMO_EVENTS=file.jsonl`: good ones, one twice, one malformed; the summary for people is on standard output."""
    events = tmp_path / "own.jsonl"
    lines = [_line("1"), _line("2", data={"customer_id": "customer-02", "text": "Hello"}), _line("1"), "{ not json"]
    events.write_text("\n".join(lines))
    finished = await perennial("demo", "--events", str(events), state=tmp_path / "state")
    assert finished.status == 0, finished.err
    figures = {line[2:24].strip(): line[24:31].strip() for line in finished.out.splitlines() if line.startswith("  ")}
    wanted = {"events in": "4", "accepted": "2", "duplicates dropped": "1", "dead-lettered": "1", "replies out": "2"}
    assert {label: figures[label] for label in wanted} == wanted
    assert "Every promise was kept" in finished.out


@pytest.mark.parametrize("content", [None, ""])
async def test_events_that_are_not_there_are_bad_input(tmp_path: Path, content: str | None) -> None:
    """Status 2, one message that names the file, and nothing is started."""
    events = tmp_path / "own.jsonl"
    if content is not None:
        events.write_text(content)
    finished = await perennial("demo", "--events", str(events), state=tmp_path / "state")
    assert finished.status == 2
    assert str(events) in finished.err
    assert "Traceback" not in finished.err
    assert finished.out == ""
    assert not (tmp_path / "state" / "demo").exists()


async def test_an_interrupted_demo_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C while events are on their way: it says so, drains, and ends with a status other than 0."""
    async with Command("demo", state=tmp_path / "state") as demo:
        await eventually(lambda: "sending" in demo.said(), 60)
        children = descendants(demo.process.pid)
        assert len(children) >= 6
        demo.send_signal(signal.SIGINT)
        assert await demo.ended() == 1, demo.said()
        assert "interrupted" in demo.said()
        await none_alive(children)
