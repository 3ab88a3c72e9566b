"""The supervisor: starts components in order, keeps them running, ends them in order, leaves none behind."""

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import alive, until

from workers.supervisor import (
    Component,
    ComponentError,
    ComponentReport,
    Died,
    Draining,
    Ended,
    NotReady,
    Ready,
    Supervisor,
    describe_status,
    restart_delay,
)

SLEEP = "import time; print('here', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
)


async def is_ready() -> None:
    """A check that is content at once."""


async def is_never_ready() -> None:
    raise NotReady("it has not answered")


def python(name: str, code: str, **fields: object) -> Component:
    """A component that runs this Python code."""
    argv = (sys.executable, "-I", "-S", "-c", code)
    return Component(**{"name": name, "argv": argv, "environment": dict(os.environ), "check": is_ready, **fields})


def said(log: Path, text: str = "here") -> Callable[[], bool]:
    return lambda: log.exists() and text in log.read_text().partition("\n")[2]


def once_said(log: Path, text: str = "here") -> Callable[[], object]:
    """A check: ready when the component's log has this text."""

    async def check() -> None:
        if not said(log, text)():
            raise NotReady(f"{log} does not have {text!r} yet")

    return check


@asynccontextmanager
async def supervised(
    directory: Path, *components: Component, reports: list[ComponentReport]
) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(components, logs=directory, report=reports.append)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.stop()


@given(st.integers(1, 10_000))
def test_restarts_begin_at_once_and_slow_down_to_a_bound(deaths: int) -> None:
    """The first restart is at once; each further one waits no less than the one before, and ten seconds at most."""
    assert restart_delay(1) == 0
    assert restart_delay(deaths) <= restart_delay(deaths + 1) <= 10


@pytest.mark.parametrize(
    ("status", "words"), [(0, "exit status 0"), (3, "exit status 3"), (-9, "signal SIGKILL"), (-250, "signal 250")]
)
def test_a_status_is_put_in_words(status: int, words: str) -> None:
    """A person reads SIGKILL, not -9."""
    assert describe_status(status) == words


async def test_a_component_that_dies_is_started_again_and_said_so(tmp_path: Path) -> None:
    """A killed component is replaced by a new process, and the report has its status and where its log is."""
    reports: list[ComponentReport] = []
    async with supervised(tmp_path, python("worker", SLEEP), reports=reports) as supervisor:
        first = supervisor.pid("worker")
        assert first
        supervisor.kill("worker", signal.SIGKILL)
        async with asyncio.timeout(30):
            await supervisor.wait_ready("worker")
        second = supervisor.pid("worker")
        assert second
        assert second != first
        assert not alive(first)
        assert alive(second)
    assert Died("worker", -signal.SIGKILL, tmp_path / "worker.log", 0.0) in reports
    assert [report.again for report in reports if isinstance(report, Ready)] == [False, True]
    assert not alive(second)


async def test_a_component_that_dies_again_and_again_is_started_ever_more_slowly(tmp_path: Path) -> None:
    """The delays told grow, so that a broken component does not keep the machine busy."""
    reports: list[ComponentReport] = []
    code = "import time; time.sleep(0.3); raise SystemExit(7)"
    async with supervised(tmp_path, python("worker", code), reports=reports):
        await until(lambda: sum(isinstance(report, Died) for report in reports) >= 3)
    deaths = [report for report in reports if isinstance(report, Died)]
    assert [(death.status, death.restart_in) for death in deaths[:3]] == [(7, 0.0), (7, 0.5), (7, 1.0)]


async def test_a_component_that_is_never_ready_is_named_with_its_log_and_last_lines(tmp_path: Path) -> None:
    """start() fails within the bound, says which component, why, and what it wrote, and leaves nothing running."""
    pids: list[int] = []
    late = python("late", SLEEP, check=is_never_ready, ready_seconds=1.0)
    supervisor = Supervisor(
        [python("other", SLEEP), late],
        logs=tmp_path,
        report=lambda report: pids.append(report.pid) if isinstance(report, Ready) else None,
    )
    with pytest.raises(ComponentError) as failure:
        await supervisor.start()
    message = str(failure.value)
    assert message.startswith("late was not ready within 1 s: it has not answered")
    assert str(tmp_path / "late.log") in message
    assert "here" in message
    assert len(pids) == 1
    assert not alive(pids[0])
    assert supervisor.pid("late") is None


async def test_a_component_that_dies_before_it_was_ready_is_given_up_soon(tmp_path: Path) -> None:
    """It gets three tries, not a minute; the error has its exit status and its last words, of the last try only."""
    code = "raise SystemExit('no such luck')"
    supervisor = Supervisor([python("worker", code, check=is_never_ready)], logs=tmp_path, report=lambda _report: None)
    with pytest.raises(ComponentError, match="worker did not come up \\(exit status 1\\)") as failure:
        await supervisor.start()
    assert str(failure.value).count("no such luck") == 2  # the command line and the last try
    log = (tmp_path / "worker.log").read_text()
    assert log.count("\nno such luck") == 3


async def test_a_component_that_refuses_its_settings_is_not_tried_again(tmp_path: Path) -> None:
    """Trying again would only say the same again."""
    code = "import sys; print('bad setting', flush=True); sys.exit(2)"
    supervisor = Supervisor(
        [python("worker", code, check=is_never_ready, refusal=2)], logs=tmp_path, report=lambda _report: None
    )
    with pytest.raises(ComponentError, match=r"exit status 2"):
        await supervisor.start()
    assert (tmp_path / "worker.log").read_text().count("\nbad setting") == 1


async def test_of_a_long_log_the_beginning_and_the_end_are_told(tmp_path: Path) -> None:
    """What a program says first and last is what matters; not all of a long stack."""
    code = "for n in range(100): print('line', n, flush=True)\nraise SystemExit(2)"
    supervisor = Supervisor(
        [python("worker", code, check=is_never_ready, refusal=2)], logs=tmp_path, report=lambda _report: None
    )
    with pytest.raises(ComponentError) as failure:
        await supervisor.start()
    lines = str(failure.value).splitlines()
    assert "  line 0" in lines
    assert "  line 50" not in lines
    assert lines[-1] == "  line 99"


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The error says which program can't be run."""
    missing = str(tmp_path / "missing")
    component = Component(name="worker", argv=(missing,), environment={}, check=is_never_ready)
    supervisor = Supervisor([component], logs=tmp_path, report=lambda _report: None)
    with pytest.raises(ComponentError, match=f"cannot run {missing}: No such file"):
        await supervisor.start()


async def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A full or read-only disk is said plainly, with the path."""
    (tmp_path / "worker.log").mkdir()
    supervisor = Supervisor([python("worker", SLEEP)], logs=tmp_path, report=lambda _report: None)
    with pytest.raises(ComponentError, match=str(tmp_path / "worker.log")):
        await supervisor.start()


async def test_a_component_waits_for_those_it_needs(tmp_path: Path) -> None:
    """It is started when they are ready, wherever it stands in the list."""
    server_log = tmp_path / "server.log"
    seen = f"'here' in open({str(server_log)!r}).read().partition(chr(10))[2]"
    look = f"import time; print({seen}, flush=True); time.sleep(600)"
    reports: list[ComponentReport] = []
    worker = python("worker", look, needs=("server",), check=once_said(tmp_path / "worker.log", "True"))
    server = python("server", f"import time; time.sleep(0.3); {SLEEP}", check=once_said(server_log))
    async with supervised(tmp_path, worker, server, reports=reports):
        pass
    assert [report.component for report in reports if isinstance(report, Ready)] == ["server", "worker"]


async def test_components_are_ended_stage_by_stage_and_killed_when_they_do_not_end(tmp_path: Path) -> None:
    """Later stages end first; one that ignores SIGTERM is killed after its time, and that is said."""
    reports: list[ComponentReport] = []
    components = [
        python("server", SLEEP),
        python("worker", STUBBORN, stage=1, stop_seconds=0.5, check=once_said(tmp_path / "worker.log")),
        python("ingest", SLEEP, stage=2),
    ]
    async with supervised(tmp_path, *components, reports=reports) as supervisor:
        pids = [supervisor.pid(component.name) for component in components]
    order = [(type(report), report.component) for report in reports if isinstance(report, Draining | Ended)]
    assert order == [(kind, name) for name in ("ingest", "worker", "server") for kind in (Draining, Ended)]
    assert {report.component: report.killed for report in reports if isinstance(report, Ended)} == {
        "ingest": False,
        "worker": True,
        "server": False,
    }
    assert not any(pid and alive(pid) for pid in pids)


async def test_a_start_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C while the components come up."""
    pids: list[int] = []
    supervisor = Supervisor(
        [
            python("ready", SLEEP, check=once_said(tmp_path / "ready.log")),
            python("never", SLEEP, check=is_never_ready),
        ],
        logs=tmp_path,
        report=lambda report: pids.append(report.pid) if isinstance(report, Ready) else None,
    )
    starting = asyncio.create_task(supervisor.start())
    await until(lambda: bool(pids) and supervisor.pid("never") is not None)
    pids.append(supervisor.pid("never") or 0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(map(alive, pids))


async def test_a_stop_that_is_cancelled_kills_what_is_left(tmp_path: Path) -> None:
    """A second Ctrl-C while a component drains for long."""
    reports: list[ComponentReport] = []
    supervisor = Supervisor(
        [
            python("worker", STUBBORN, stop_seconds=600, check=once_said(tmp_path / "worker.log")),
            python("other", SLEEP),
        ],
        logs=tmp_path,
        report=reports.append,
    )
    await supervisor.start()
    pids = [supervisor.pid("worker") or 0, supervisor.pid("other") or 0]
    stopping = asyncio.create_task(supervisor.stop())
    await until(lambda: any(isinstance(report, Ended) for report in reports))
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert not any(map(alive, pids))


async def test_what_a_component_started_itself_dies_with_it(tmp_path: Path) -> None:
    """A killed component's own children are killed too; they would hold its port."""
    code = textwrap.dedent(f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {SLEEP!r}])
        print("child", child.pid, "born", flush=True)
        time.sleep(600)
    """)
    log = tmp_path / "worker.log"
    worker = python("worker", code, check=once_said(log, "born\n"))
    async with supervised(tmp_path, worker, reports=[]) as supervisor:
        child = int(log.read_text().rpartition("child ")[2].split()[0])
        assert alive(child)
        pid = supervisor.pid("worker")
        assert pid
        assert os.getpgid(pid) == pid  # so the terminal's Ctrl-C is not sent to it
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(child))


async def test_a_component_that_does_not_run_cannot_be_signalled(tmp_path: Path) -> None:
    """The fault tests learn that they killed nothing."""
    supervisor = Supervisor([python("worker", SLEEP)], logs=tmp_path, report=lambda _report: None)
    with pytest.raises(ProcessLookupError, match="worker"):
        supervisor.kill("worker", signal.SIGKILL)


async def test_a_large_log_is_moved_aside_and_a_small_one_is_continued(tmp_path: Path) -> None:
    """Logs are appended to over many starts, without growing for ever."""
    (tmp_path / "large.log").write_text("x" * 10_000_001)
    (tmp_path / "small.log").write_text("of yesterday\n")
    components = [python(name, SLEEP, check=once_said(tmp_path / f"{name}.log")) for name in ("large", "small")]
    async with supervised(tmp_path, *components, reports=[]):
        assert (tmp_path / "large.log.1").stat().st_size == 10_000_001
        assert (tmp_path / "large.log").stat().st_size < 1000
        assert (tmp_path / "small.log").read_text().startswith("of yesterday\n===")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
async def test_a_component_does_not_outlive_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """The supervisor gets kill -9: the kernel ends the component."""
    code = textwrap.dedent(f"""
        import asyncio, os, sys
        from pathlib import Path
        from workers.supervisor import Component, Supervisor
        logs = Path({str(tmp_path)!r})
        async def check():
            assert (logs / "worker.log").read_text().endswith("here\\n")
        async def main():
            argv = (sys.executable, "-I", "-S", "-c", {STUBBORN!r})
            component = Component(name="worker", argv=argv, environment={{}}, check=check)
            supervisor = Supervisor([component], logs=logs, report=lambda report: None)
            await supervisor.start()
            print(supervisor.pid("worker"), flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout
        pid = int(await process.stdout.readline())
        assert alive(pid)
    finally:
        process.kill()
        await process.communicate()
    await until(lambda: not alive(pid))
