"""How a command ends: its exit status, and the error that becomes one clear message.

raise CommandError("There is no agent 'x'. Known are: ...", status=BAD_INPUT)
"""

from __future__ import annotations

OK = 0
FAILED = 1
BAD_INPUT = 2


class CommandError(Exception):
    """A command can't do what it was asked to; the message says what was wrong, where, and what to do."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status
