"""`perennial demo`, run as people run it: as a process, on real servers; and what it counts."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio
from servers import eventually
from stack import Command, Finished, descendants, none_alive, perennial

from workers.demo import Report

pytestmark = pytest.mark.slow


def _line(event_id: str, **attributes: object) -> str:
    event = {"specversion": "1.0", "id": event_id, "source": "/own", "type": "store.customer.message"}
    return json.dumps({**event, "data": {"customer_id": "customer-01", "lang": "en", "text": "Hi"}, **attributes})


class _Runs(NamedTuple):
    """A demo of the shipped events, for scripts, and one of own events, for people."""

    shipped: Finished
    own: Finished


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def runs(tmp_path_factory: pytest.TempPathFactory) -> _Runs:
    """Both at once, each with a state directory of its own: the second mostly waits."""
    events = tmp_path_factory.mktemp("events") / "own.jsonl"
    lines = [_line("1"), _line("2", data={"customer_id": "customer-02", "text": "Hello"}), _line("1"), "{ not json"]
    events.write_text("\n".join(lines))
    shipped, own = await asyncio.gather(
        perennial("demo", "--json", "--seed", "20261", state=tmp_path_factory.mktemp("shipped"), seconds=150),
        perennial("demo", "--events", str(events), state=tmp_path_factory.mktemp("own"), seconds=150),
    )
    return _Runs(shipped, own)


@pytest.mark.timeout(180)
def test_the_demo_keeps_every_promise_and_says_so(runs: _Runs) -> None:
    """Issue 2, point 11: the shipped events, both workers killed, all counted; status 0 only when all of it holds."""
    assert runs.shipped.status == 0, runs.shipped.err
    report = Report.model_validate(runs.shipped.json)
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
    assert runs.shipped.err.count("SIGKILL to the") == 2, "it tells what it does while it does it"


@pytest.mark.timeout(180)
def test_the_demo_runs_on_events_of_ones_own(runs: _Runs) -> None:
    """`DEMO_EVENTS=file.jsonl`: good ones, one twice, one malformed; the summary for people is on standard output."""
    assert runs.own.status == 0, runs.own.err
    lines = [line for line in runs.own.out.splitlines() if line.startswith("  ")]
    figures = {line[2:24].strip(): line[24:31].strip() for line in lines}
    wanted = {"events in": "4", "accepted": "2", "duplicates dropped": "1", "dead-lettered": "1", "replies out": "2"}
    assert {label: figures[label] for label in wanted} == wanted
    assert "Every promise was kept" in runs.own.out


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
