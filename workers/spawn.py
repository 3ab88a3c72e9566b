"""Become another program, one that does not outlive the process that started it.

    python -I -S workers/spawn.py PARENT_PID PROGRAM [ARGUMENT...]

On Linux the kernel kills the program when its parent dies, however it dies (PR_SET_PDEATHSIG; it is sent when the
*thread* that started the program ends). Elsewhere the program is run without that.

A program of its own, and not a `preexec_fn`, because Python code between fork and exec can deadlock where the parent
has threads. It imports next to nothing: it costs each start some 25 ms.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def launcher() -> list[str]:
    """What to put before a command, so that it ends with this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid())]


def main() -> None:
    """Replace this process by the program."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it died before we could ask
            sys.exit("the process that starts this one is gone")
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two, and the program would inherit that
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606  # no shell is what we want
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
