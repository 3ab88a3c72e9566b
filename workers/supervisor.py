"""Start processes, keep them running, end them in order; leave none behind.

    supervisor = Supervisor(components, logs=state / "logs", report=print)
    await supervisor.start()        # returns when every component is ready
    supervisor.kill("agent", signal.SIGKILL)
    await supervisor.wait_ready("agent")
    await supervisor.stop()

What to run is plain data, a `Component` each. A component that ends by itself is started again, at once the first
time and then ever more slowly. Everything worth telling a person is passed to `report` as a small frozen object whose
`str()` is the sentence to print. `report` must not raise.

Components get process groups of their own, so that a terminal's Ctrl-C reaches only the supervisor, which drains.
If the supervisor itself is killed, the kernel kills its components (see `workers/spawn.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from typing_extensions import override

from workers.spawn import launcher

_FIRST_DELAY = 0.5
_MOST_DELAY = 10.0
_STEADY_SECONDS = 30.0
"""A component that stayed up so long counts as healthy: its next restart is at once again."""

_EARLY_DEATHS = 3
"""A component that dies so often before it was ready for the first time is given up."""

_PROBE_SECONDS = 0.05
_LARGE_LOG = 10_000_000
# Of a long log the beginning is told too: a Go program says why it panics, and then writes a hundred lines of stack.
_FIRST_LINES = 8
_LAST_LINES = 12
_READ_BYTES = 65_536


class ComponentError(Exception):
    """A component did not come up; the message has its name, the reason, its log file and the log's last lines."""


class NotReady(Exception):  # noqa: N818  # an answer, not an error
    """Raised by a component's `check` with the reason why it is not ready yet."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """What to run, and how to tell that it works."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    check: Callable[[], Awaitable[object]]
    """Returns when the component is ready, raises anything when it is not yet. Also run after each restart."""
    needs: tuple[str, ...] = ()
    """Components that have to be ready before this one is started for the first time."""
    stage: int = 0
    """Components are ended from the highest stage to the lowest, those of one stage together."""
    directory: Path | None = None
    """The working directory; without it, the supervisor's."""
    ready_seconds: float = 60.0
    """How long the first start may take."""
    refusal: int | None = None
    """The exit status with which it says that its settings are wrong, so that trying again would not help."""
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0
    """How long it may take to end after `stop_signal`, before it gets SIGKILL."""


@dataclass(frozen=True)
class Ready:
    """A component works, for the first time or again."""

    component: str
    pid: int
    seconds: float
    """Since it was started, this time."""
    again: bool
    """It was ready before and has died since."""

    @override
    def __str__(self) -> str:
        return f"{self.component} is ready{' again' if self.again else ''} after {self.seconds:.1f} s"


@dataclass(frozen=True)
class Died:
    """A component ended by itself and will be started again."""

    component: str
    status: int
    """The exit status; minus the signal's number when a signal ended it."""
    log: Path
    restart_in: float
    """Seconds until it is started again."""

    @override
    def __str__(self) -> str:
        when = f"in {self.restart_in:g} s" if self.restart_in else "at once"
        return f"{self.component} died ({describe_status(self.status)}), starting it again {when}; log: {self.log}"


@dataclass(frozen=True)
class NotStarted:
    """A component could not be started; it will be tried again."""

    component: str
    reason: str
    restart_in: float

    @override
    def __str__(self) -> str:
        return f"{self.component} can't be started ({self.reason}), trying again in {self.restart_in:g} s"


@dataclass(frozen=True)
class Draining:
    """A component was asked to end."""

    component: str
    at_most: float
    """Seconds it may take."""

    @override
    def __str__(self) -> str:
        return f"draining {self.component} (at most {self.at_most:g} s)"


@dataclass(frozen=True)
class Ended:
    """A component has ended, as it was asked to."""

    component: str
    status: int
    seconds: float
    killed: bool
    """It did not end in time, and was ended with SIGKILL."""
    log: Path

    @override
    def __str__(self) -> str:
        if self.killed:
            return f"{self.component} did not end within {self.seconds:.0f} s and was killed; log: {self.log}"
        return f"{self.component} ended after {self.seconds:.1f} s ({describe_status(self.status)})"


ComponentReport = Ready | Died | NotStarted | Draining | Ended


def describe_status(status: int) -> str:
    """An exit status in words: `exit status 1`, `signal SIGKILL`."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def restart_delay(deaths: int) -> float:
    """Seconds to wait before a component is started again, after so many deaths in a row (1 is the first)."""
    if deaths <= 1:
        return 0.0
    # The exponent is bounded too: a component may die all night.
    return float(min(_MOST_DELAY, _FIRST_DELAY * 2 ** min(deaths - 2, 16)))


class Supervisor:
    """Runs a set of components. `start` once, `stop` once."""

    def __init__(
        self,
        components: Sequence[Component],
        *,
        logs: Path,
        report: Callable[[ComponentReport], None],
        inherited: Sequence[int] = (),
    ) -> None:
        """Nothing is started yet.

        Args:
            components: what to run; the names they `need` are among them.
            logs: an existing directory for `{component}.log`.
            report: told what happens.
            inherited: file descriptors that every component keeps open, for example that of a lock.
        """
        self._keepers = {
            component.name: _Keeper(component, logs / f"{component.name}.log", report, inherited)
            for component in components
        }

    async def start(self) -> None:
        """Start the components, each when those it needs are ready, and wait until all are.

        When it fails or is cancelled, whatever was started is killed before it returns.

        Raises:
            ComponentError: a component did not become ready in time, or died again and again.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for keeper in self._keepers.values():
                    group.create_task(self._bring_up(keeper))
        except BaseExceptionGroup as failures:
            await self.kill_all()
            raise failures.exceptions[0] from None
        except BaseException:
            await self.kill_all()
            raise

    async def stop(self) -> None:
        """End the components stage by stage; kill those that don't end in time.

        When it is cancelled, whatever still runs is killed before it returns.
        """
        try:
            for stage in sorted({keeper.component.stage for keeper in self._keepers.values()}, reverse=True):
                ending = [keeper.end() for keeper in self._keepers.values() if keeper.component.stage == stage]
                await asyncio.gather(*ending)
        finally:
            await self.kill_all()

    async def kill_all(self) -> None:
        """Kill whatever runs, at once and in no order."""
        await asyncio.gather(*(keeper.abandon() for keeper in self._keepers.values()))

    def pid(self, component: str) -> int | None:
        """The process id of a component; None while it does not run."""
        return self._keepers[component].pid

    def kill(self, component: str, number: signal.Signals) -> None:
        """Send a signal to a component. After SIGKILL, `wait_ready` waits for the one that is started in its place.

        Raises:
            ProcessLookupError: it does not run just now.
        """
        self._keepers[component].kill(number)

    async def wait_ready(self, component: str) -> None:
        """Wait until a component is ready (again)."""
        await self._keepers[component].ready.wait()

    async def _bring_up(self, keeper: _Keeper) -> None:
        for needed in keeper.component.needs:
            await self.wait_ready(needed)
        await keeper.start()


class _Keeper:
    """Keeps one component running."""

    def __init__(
        self, component: Component, log: Path, report: Callable[[ComponentReport], None], inherited: Sequence[int]
    ) -> None:
        self.component = component
        self.ready = asyncio.Event()
        self._log = log
        self._report = report
        self._inherited = tuple(inherited)
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._prober: asyncio.Task[None] | None = None
        self._log_start = 0
        self._ending = False
        self._deaths = 0
        self._reason = "it did not start"
        # Set once it is known how the first start went: `_failure` says how it failed.
        self._settled = asyncio.Event()
        self._failure: str | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start it, and wait until it is ready for the first time."""
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.component.name}")
        try:
            async with asyncio.timeout(self.component.ready_seconds):
                await self._settled.wait()
        except TimeoutError:
            self._failure = f"was not ready within {self.component.ready_seconds:g} s: {self._reason}"
        if self._failure:
            raise ComponentError(
                f"{self.component.name} {self._failure}\nIts log, {self._log}, says:\n{self._log_tail()}"
            )

    async def end(self) -> None:
        """Ask it to end, wait, and kill it when it does not."""
        self._ending = True
        process, began, killed = self._process, time.monotonic(), False
        if self._task is None or process is None:
            return await self.abandon()
        if self.component.stop_signal != signal.SIGKILL:
            self._report(Draining(self.component.name, self.component.stop_seconds))
        self._signal(self.component.stop_signal)
        done, _ = await asyncio.wait([self._task], timeout=self.component.stop_seconds)
        if not done:
            killed = True
            self._signal(signal.SIGKILL)
            await asyncio.wait([self._task])
        status = await process.wait()
        self._report(Ended(self.component.name, status, time.monotonic() - began, killed, self._log))
        return None

    async def abandon(self) -> None:
        """Kill it, if it runs, and start it no more."""
        self._ending = True
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    def kill(self, number: signal.Signals) -> None:
        if self._process is None or self._process.returncode is not None:
            raise ProcessLookupError(f"{self.component.name} does not run just now")
        if number == signal.SIGKILL:
            self._not_ready()
        self._signal(number)

    async def _keep(self) -> None:
        while True:
            began = time.monotonic()
            try:
                status = await self._live()
            except OSError as error:  # no file descriptors, a full disk: worth another try
                status = None
                self._reason = str(error)
            if self._ending:
                return
            self._deaths = 1 if time.monotonic() - began > _STEADY_SECONDS else self._deaths + 1
            if not self._settled.is_set() and (
                self._deaths == _EARLY_DEATHS or (status is not None and status == self.component.refusal)
            ):
                ended = self._reason if status is None else describe_status(status)
                self._failure = f"did not come up ({ended})"
                self._settled.set()
                return
            delay = restart_delay(self._deaths)
            if status is None:
                self._report(NotStarted(self.component.name, self._reason, delay))
            else:
                self._report(Died(self.component.name, status, self._log, delay))
            await asyncio.sleep(delay)

    async def _live(self) -> int:
        """One life of the process, from its start to its exit status. Cancelled, it kills it."""
        with self._open_log() as log:
            self._process = process = await asyncio.create_subprocess_exec(
                *(*launcher(), *self.component.argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.component.environment),
                cwd=self.component.directory,
                start_new_session=True,
                pass_fds=self._inherited,
            )
        self._prober = prober = asyncio.create_task(self._probe(process))
        try:
            return await process.wait()
        finally:
            self._not_ready()
            self._signal(signal.SIGKILL)  # also whatever it has started and left in its group
            await asyncio.wait([prober])
            await process.wait()
            self._process = None

    async def _probe(self, process: asyncio.subprocess.Process) -> None:
        began = time.monotonic()
        while True:
            try:
                await self.component.check()
                break
            except Exception as error:  # noqa: BLE001  # whatever fails the check is why it is not ready
                self._reason = str(error) or type(error).__name__
            await asyncio.sleep(_PROBE_SECONDS)
        self.ready.set()
        self._report(Ready(self.component.name, process.pid, time.monotonic() - began, self._settled.is_set()))
        self._settled.set()

    def _not_ready(self) -> None:
        if self._prober:
            self._prober.cancel()
        self.ready.clear()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the component's process group, if there is anybody in it."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    @contextlib.contextmanager
    def _open_log(self) -> Iterator[BinaryIO]:
        if self._log.exists() and self._log.stat().st_size > _LARGE_LOG:
            self._log.replace(self._log.with_name(self._log.name + ".1"))
        with self._log.open("ab", buffering=0) as log:
            self._log_start = log.tell()
            log.write(f"=== {datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {' '.join(self.component.argv)}\n".encode())
            yield log

    def _log_tail(self) -> str:
        """What this component wrote since it was started last, indented; of much, the first and the last lines."""
        try:
            with self._log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, end - _READ_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError as error:
            lines = [f"(it can't be read: {error})"]
        if len(lines) > _FIRST_LINES + _LAST_LINES:
            lines = [*lines[:_FIRST_LINES], "[...]", *lines[-_LAST_LINES:]]
        return "\n".join(f"  {line}" for line in lines)
