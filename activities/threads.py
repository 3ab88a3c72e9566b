"""A thread for each call of a sync tool: one that hangs keeps no other tool waiting, and not the worker from ending.

    threads = Threads()
    with threads.calling("look_up_order"):
        await schema.call(arguments, context)       # pydantic-ai calls a sync function in the thread

Nothing can end a thread. When a call is given up, at its timeout, its thread is left behind until its function returns,
if it ever does. Such threads are counted, and a tool of which too many hang is not called any more on this worker.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from pydantic_ai import Agent
from typing_extensions import override

from activities import metrics

log = logging.getLogger(__name__)

MOST_HUNG = 20
"""So many calls of one tool may hang on a worker; then it is not called there."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class HungError(Exception):
    """Too many calls of a tool hang on this worker; the message says so."""


class Threads:
    """The threads of all tools of a worker."""

    def __init__(self) -> None:
        self._hung: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def calling(self, tool: str) -> Iterator[None]:
        """Within it, a sync function is called in a thread of its own. One that has not returned at the end is hung.

        Raises:
            HungError: the tool hangs too often to be called again.
        """
        if self._hung[tool] >= MOST_HUNG:
            raise HungError(f"{MOST_HUNG} calls of {tool} hang on this worker. Mend the tool, and restart the worker.")
        executor = _OneThread(tool)
        try:
            with Agent.using_thread_executor(executor):
                yield
        finally:
            if executor.running:
                self._left_behind(tool, executor.running)

    def _left_behind(self, tool: str, future: Future[object]) -> None:
        self._count(tool, 1)
        log.warning(
            "a call of %s was given up and hangs; %d calls of it hang on this worker, which calls it no more at %d",
            tool,
            self._hung[tool],
            MOST_HUNG,
        )
        future.add_done_callback(lambda _: self._count(tool, -1))

    def _count(self, tool: str, more: int) -> None:
        with self._lock:
            self._hung[tool] += more
            metrics.hung_threads(tool, self._hung[tool])


class _OneThread(Executor):
    """Starts a thread for what is submitted. It is a daemon: the process does not wait for it."""

    def __init__(self, tool: str) -> None:
        self._tool = tool
        self._future: Future[object] | None = None

    @property
    def running(self) -> Future[object] | None:
        """What has not returned."""
        return self._future if self._future and not self._future.done() else None

    @override
    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()  # so that nobody takes it for one that can be cancelled

        def body() -> None:
            try:
                value = fn(*args, **kwargs)
            except StopIteration as error:  # no future takes it: whoever waits would wait for ever
                broke = RuntimeError("it raised StopIteration")
                broke.__cause__ = error
                future.set_exception(broke)
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is the caller's
                future.set_exception(error)
            else:
                future.set_result(value)

        self._future = future  # type: ignore[assignment]  # of any type
        threading.Thread(target=body, name=f"tool {self._tool}", daemon=True).start()
        return future
